"""Models inside of what adapter libraries wrap them in.

Owns the unwrapping and the proof that nothing is lost by it: an adapter that lives in the model's own layers (LoRA and its kin) is run
with them, one that adds to the input or the cache is not.
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.call import logits_of

_NUM_TOKENS = 5


@runtime_checkable
class AdaptedModel(Protocol):
    """A wrapper around a model, as PEFT's ``PeftModel`` is one."""

    def get_base_model(self) -> nn.Module:
        """The model inside, with the adapters in its layers."""


def unwrapped(model: AdaptedModel) -> PreTrainedModel:
    """The model inside of a wrapper.

    Raises:
        UnsupportedModelError: the wrapper computes something else than the model inside, so that leaving it out would be wrong.

    Cost: two forwards of 5 tokens.
    """
    inside, name = model.get_base_model(), type(model).__name__
    if not isinstance(inside, PreTrainedModel):
        raise UnsupportedModelError(f"{name} wraps a {type(inside).__name__}, which is not a transformers PreTrainedModel")
    wrapper = cast(nn.Module, model)
    if inside.training or wrapper.training or inside.device.type == "meta":
        return inside  # refused for that
    tokens = torch.arange(_NUM_TOKENS, device=inside.device)[None]
    try:
        with torch.no_grad():
            same = torch.equal(logits_of(wrapper(input_ids=tokens)), logits_of(inside(input_ids=tokens)))
    except Exception as error:  # whatever a wrapper raises, it cannot be left out
        raise UnsupportedModelError(f"{name} cannot be compared with the {type(inside).__name__} that it wraps: {error}") from error
    if not same:
        raise UnsupportedModelError(
            f"{name} computes something else than the {type(inside).__name__} that it wraps (a prompt or prefix in front of the tokens, "
            "for example): only adapters within the model's layers are served"
        )
    return inside
