"""The last hidden states of a step's tokens: ``last_hidden_state`` of the model's body, behind which is its output head.

Owns their way out of the model, by a hook that is there for the length of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import active_step

_NUM_TOKENS = 3


class HiddenStates:
    """Takes the last hidden states out of one model.

    Args:
        model: with its head; its body is where they come from.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._body: torch.nn.Module | None = None

    def body(self) -> torch.nn.Module:
        """The part of the model that gives hidden states, one for each token.

        Raises:
            UnsupportedModelError: there is none.

        Cost: one forward of 3 tokens the first time, nothing after it.
        """
        if self._body is None:
            model = self._model
            candidates = (model.base_model, model.get_decoder())  # type: ignore[no-untyped-call]
            parts = [part for part in candidates if part is not model and isinstance(part, torch.nn.Module)]
            seen: list[list[object]] = [[] for _ in parts]
            handles = [part.register_forward_hook(partial(_note, calls)) for part, calls in zip(parts, seen, strict=True)]
            try:
                with torch.no_grad():
                    model(input_ids=torch.arange(_NUM_TOKENS, device=model.device)[None])
            finally:
                for handle in handles:
                    handle.remove()
            self._body = next((part for part, calls in zip(parts, seen, strict=True) if len(calls) == 1 and _is_states(calls[0])), None)
        if self._body is None:
            raise UnsupportedModelError(
                f"no part of {type(self._model).__name__} gives one hidden state for each token to its head: they cannot be taken"
            )
        return self._body

    @contextmanager
    def taken(self, num_tokens: int) -> Iterator[list[Tensor]]:
        """Take those of a forward that runs in this thread within a ``with`` block, which may call the model several times.

        Yields:
            a list that holds them at the end, ``[T, H]`` in the order of the step's tokens, as its only element.

        Raises:
            UnsupportedModelError: as ``body``; at the end: not all tokens went through the model's body.
        """
        body = self.body()
        result: list[Tensor] = []
        parts: list[tuple[Tensor | None, Tensor]] = []

        def take(module: torch.nn.Module, _: Any, output: Any) -> None:
            step = active_step()
            if step is not None:  # else it is another thread's ordinary forward
                parts.append((getattr(step, "tokens", None), output[0]))

        handle = body.register_forward_hook(take)
        try:
            yield result
        finally:
            handle.remove()
        whole = parts[0][1].new_empty((num_tokens, parts[0][1].shape[-1])) if parts else torch.empty(0)
        count = 0
        for tokens, states in parts:
            whole[slice(None) if tokens is None else tokens.flatten()] = states.flatten(0, 1)
            count += states.shape[0] * states.shape[1]
        if count != num_tokens:
            raise UnsupportedModelError(f"{count} of {num_tokens} tokens went through the body of {type(self._model).__name__}")
        result.append(whole)


def _note(calls: list[object], module: torch.nn.Module, _: object, output: Any) -> None:
    calls.append(output[0])


def _is_states(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == (1, _NUM_TOKENS)
