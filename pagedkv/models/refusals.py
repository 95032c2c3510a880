"""What is refused before anything is run, each with its reason.

Owns the rules that a look at the class and the config can decide. What only running shows is found by ``probe.py``
(layers, masks) and ``selfcheck.py`` (numbers).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.adapters import AdaptedModel, unwrapped
from pagedkv.models.call import ModelCall

# Short probes do not reach the cases in which these are wrong, so they are named.
_DENIED = {
    "doge": "its cached and its cache-less forward disagree beyond keep_window_size in transformers itself",
}


def check_model(model: object) -> PreTrainedModel:
    """The same object, or what it wraps, known to be a causal language model in evaluation mode on one device.

    Raises:
        UnsupportedModelError: names the model and the reason.
    """
    if isinstance(model, AdaptedModel):
        model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers PreTrainedModel (an unwrapped one is needed)")
    name = type(model).__name__
    check_config(model.config, name=name)
    if not model.can_generate() or _head(model) is None:
        raise UnsupportedModelError(f"{name} has no causal language model head: load it with AutoModelForCausalLM")
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode: a K/V cache is for inference, call model.eval()")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModelError(f"{name} is spread over {', '.join(devices)}: one device is supported")
    return model


def check_config(config: PreTrainedConfig, *, name: str) -> None:
    """Raise ``UnsupportedModelError`` for a config that cannot be run exactly, whatever the weights."""
    if config.is_encoder_decoder and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{name}: transformers knows no encoder-decoder of it that reads text; its encoder reads images or sound"
        )
    text = config.get_text_config(decoder=True)
    for candidate in (config, text):
        reason = _DENIED.get(candidate.model_type)
        if reason is not None:
            raise UnsupportedModelError(f"{name} ({candidate.model_type}): {reason}")


def refusal(model: PreTrainedModel, reasons: Mapping[str, str]) -> UnsupportedModelError:
    """The error for a model that cannot be run in any of some ways, with the reason against each, or against all."""
    causes = []
    if kept := _kept_on_modules(model):
        causes.append(f" It keeps state on its modules, which belongs to no sequence: {', '.join(kept)}.")
    if own := _own_cache_layers(model):
        causes.append(f" Its layers keep more than K/V, in cache layers of their own: {', '.join(own)}.")
    if _disagrees_on_positions(model):
        causes.append(" With position_ids 0, 1, ..., which generate() gives it, its own forward computes other logits than without.")
    if len(set(reasons.values())) == 1 and not causes:
        return UnsupportedModelError(next(iter(reasons.values())))
    each = "; ".join(f"{way}: {reason}" for way, reason in reasons.items())
    return UnsupportedModelError(f"{type(model).__name__} cannot be run exactly in any way.{''.join(causes)} {each}")


def _disagrees_on_positions(model: PreTrainedModel) -> bool:
    """Whether a model counts positions in a way of its own, unless they are given: then transformers has two answers."""
    if model.device.type == "meta":
        return False
    tokens = torch.arange(5, 10, device=model.device)
    try:
        call = ModelCall(model)
        if not call.takes_positions:
            return False
        own, given = call.plain(tokens).float(), call.plain(tokens, tokens - 5).float()
        return not torch.allclose(own, given, rtol=1e-2, atol=1e-2, equal_nan=True)
    except Exception:  # whatever a model raises, this is not what is wrong with it
        return False


def _kept_on_modules(model: PreTrainedModel) -> list[str]:
    """Names of the first tensors that modules hold beside parameters and buffers, as calls have left them."""
    found = [f"{name}.{key}" for name, module in model.named_modules() for key, value in vars(module).items() if isinstance(value, Tensor)]
    return found[:2]


def _own_cache_layers(model: PreTrainedModel) -> list[str]:
    """Classes of the layers of the cache that ``generate`` would make, as far as the model's own code brings them."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # whatever it lacks in a config, then generate does not make one either
        return []
    return sorted({type(layer).__name__ for layer in layers if type(layer).__module__ != DynamicCache.__module__})


def _head(model: PreTrainedModel) -> object | None:
    try:
        head: object | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except (AttributeError, NotImplementedError):
        return None
    return head
