"""How a model is called on packed tokens: which arguments its forward takes, learned once.

Owns the argument list and the slicing of logits to the rows that are wanted. It does not own what happens inside.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pagedkv.errors import UnsupportedModelError


class PackedCall:
    """Calls a causal language model on ``T`` packed tokens of several sequences.

    Args:
        model: the model; its signature is read here, once.

    Raises:
        UnsupportedModelError: the model takes no ``position_ids`` (its positions could not differ per sequence) or no
            ``past_key_values``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        outer = _parameters(model)
        inner = _parameters(model.base_model) if isinstance(model.base_model, torch.nn.Module) else outer
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
        for name in ("position_ids", "past_key_values"):
            if name not in outer and not (passes_on and name in inner):
                raise UnsupportedModelError(f"{type(model).__name__}.forward takes no {name}: sequences of a batch cannot keep their own")
        self._model = model
        self._keeps = "logits_to_keep" in outer
        self._use_cache = "use_cache" in outer or (passes_on and "use_cache" in inner)

    def __call__(self, token_ids: Tensor, positions: Tensor, *, cache: Cache, logits_indices: Tensor) -> Tensor:
        """Logits ``[K, V]`` of the rows ``logits_indices [K]`` of ``token_ids [T]`` at ``positions [T]``, all int64.

        Runs under ``no_grad``, not inference mode: buffers that a model keeps (rope tables) stay usable in training.
        """
        arguments: dict[str, Any] = {"position_ids": positions[None], "past_key_values": cache}
        if self._use_cache:
            arguments["use_cache"] = True
        if self._keeps:
            arguments["logits_to_keep"] = logits_indices
        with torch.no_grad():
            logits = logits_of(self._model(input_ids=token_ids[None], **arguments))[0]
            return logits if self._keeps else logits[logits_indices]

    def plain(self, token_ids: Tensor) -> Tensor:
        """Logits ``[T, V]`` of one sequence by the model's own forward, without any cache."""
        with torch.no_grad():
            arguments = {"use_cache": False} if self._use_cache else {}
            return logits_of(self._model(input_ids=token_ids[None], **arguments))[0]


def logits_of(output: Any) -> Tensor:
    """The logits ``[1, K, V]`` in what a model returned; a model may be set to return tuples, with the logits first."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"the model returned {type(output).__name__} without logits")
    return logits


def _parameters(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)
