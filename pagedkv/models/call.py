"""How a model is called during a step: which arguments its forward takes, learned once.

Owns the argument list and the slicing of logits to those that are wanted. It does not own what happens inside.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from pagedkv.errors import UnsupportedModelError

# What a model calls its cache: from transformers 5.24 on, before, and recurrent models before. A model that is not transformers' own may
# keep an older name.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What the models of the installed transformers, and their ``generate``, call the argument that takes a cache."""


def cache_argument(module: torch.nn.Module) -> str:
    """The name under which a layer takes the cache; ``CACHE_ARGUMENT`` where it takes anything by name."""
    parameters = _parameters(module)
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENT)


def model_cache_argument(model: PreTrainedModel) -> str:
    """The name under which a causal language model takes the cache.

    Raises:
        UnsupportedModelError: it takes none under any name of ``CACHE_ARGUMENTS``.
    """
    names = _argument_names(model)
    found = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__}.forward takes no cache: it keeps no K/V that could be paged")
    return found


class ModelCall:
    """Calls a causal language model on rows of tokens over a cache of ours: one row of packed tokens, or one row a sequence.

    Args:
        model: the model; its signature is read here, once.

    Raises:
        UnsupportedModelError: the model takes no cache under any name of ``CACHE_ARGUMENTS``.

    Attributes:
        model: the model.
        cache_argument: what it calls its cache.
        takes_positions: whether it takes ``position_ids``, so that tokens of one row can be of several sequences.
        takes_mask: whether it takes its ``mask_argument``, so that rows can be of several lengths.
    """

    mask_argument = "attention_mask"

    def __init__(self, model: PreTrainedModel) -> None:
        names = _argument_names(model)
        self.model = model
        self.cache_argument = model_cache_argument(model)
        self.takes_positions = "position_ids" in names
        self.takes_mask = self.mask_argument in names
        self._keeps = "logits_to_keep" in _parameters(model)
        self._use_cache = "use_cache" in names

    def __call__(
        self, token_ids: Tensor, positions: Tensor, *, cache: Cache, columns: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Run the model on some rows.

        Runs under ``no_grad``, not inference mode: buffers that a model keeps (rope tables) stay usable in training.

        Args:
            token_ids: ``[R, Q]`` int64.
            positions: ``[R, Q]`` int64; not passed on to a model that takes none.
            cache: what the model stores K/V in and gets them from.
            columns: ``[C]`` int64 places in the rows whose logits are wanted.
            attention_mask: ``[R, K]`` int64, 1 for the keys of each row that are there; None when the cache alone decides.

        Returns:
            ``[R, C, V]`` logits.
        """
        arguments: dict[str, Any] = {self.cache_argument: cache}
        if self.takes_positions:
            arguments["position_ids"] = positions
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        if self._use_cache:
            arguments["use_cache"] = True
        if self._keeps:
            arguments["logits_to_keep"] = columns
        with torch.no_grad():
            logits = logits_of(self.model(input_ids=token_ids, **arguments))
            return logits if self._keeps else logits[:, columns]

    def plain(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits ``[T, V]`` of one sequence by the model's own forward, without any cache; positions are its own choice, or given."""
        with torch.no_grad():
            arguments: dict[str, Any] = {"use_cache": False} if self._use_cache else {}
            if positions is not None:
                arguments["position_ids"] = positions[None]
            return logits_of(self.model(input_ids=token_ids[None], **arguments))[0]


def logits_of(output: Any) -> Tensor:
    """The logits ``[R, C, V]`` in what a model returned; a model may be set to return tuples, with the logits first."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"the model returned {type(output).__name__} without logits")
    return logits


def _argument_names(model: PreTrainedModel) -> frozenset[str]:
    """What a model takes by name: its own arguments, and those of the model inside of it where it passes on what it does not know."""
    outer = _parameters(model)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
    inner = model.base_model if passes_on else None
    return frozenset((*outer, *_parameters(inner))) if isinstance(inner, torch.nn.Module) else frozenset(outer)


def _parameters(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)
