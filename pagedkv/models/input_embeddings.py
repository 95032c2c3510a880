"""Rows of embeddings given by the caller in place of those of tokens, for the length of a forward.

Owns their way into the model, by a hook on its input embedding, and the proof that this is what the model makes of ``inputs_embeds``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.call import logits_of
from pagedkv.models.context import active_step

_NUM_TOKENS = 3
_SEED = 20260106


class InputEmbeddings:
    """Gives one model rows of embeddings in place of those that it looks up.

    Args:
        model: the model; its input embedding is what is hooked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._width: int | None = None

    def width(self) -> int:
        """Numbers in a row.

        Raises:
            UnsupportedModelError: rows given in place of looked-up ones are not what the model makes of ``inputs_embeds``.

        Cost: two forwards of 3 tokens the first time, nothing after it.
        """
        if self._width is None:
            self._width = self._proven_width()
        return self._width

    @contextmanager
    def given(self, rows: Tensor, is_given: Tensor) -> Iterator[None]:
        """Within a ``with`` block, have a forward that runs in this thread take some tokens' rows from ``rows``.

        Args:
            rows: ``[T, H]`` in the order of the step's tokens.
            is_given: ``[T]`` bool, which of them count.
        """

        def replace(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            step = active_step()
            if step is None:
                return output  # another thread's ordinary forward
            tokens: Tensor | None = getattr(step, "tokens", None)
            own, which = (rows[None], is_given[None]) if tokens is None else (rows[tokens], is_given[tokens])
            return torch.where(which[..., None], own, output)

        handle = self._embedding().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def _embedding(self) -> nn.Module:
        embedding = self._model.get_input_embeddings()
        if not isinstance(embedding, nn.Module):
            raise UnsupportedModelError(f"{type(self._model).__name__} has no input embedding")
        return embedding

    def _proven_width(self) -> int:
        model, name, device = self._model, type(self._model).__name__, self._model.device
        embedding = self._embedding()
        tokens = torch.arange(_NUM_TOKENS, device=device)[None]
        with torch.no_grad():
            looked_up = embedding(tokens)
            noise = torch.randn(looked_up.shape, generator=torch.Generator().manual_seed(_SEED)).to(device, looked_up.dtype)
            rows = looked_up + noise * looked_up.abs().max()
            handle = embedding.register_forward_hook(lambda module, _, output: rows)
            try:
                ours = logits_of(model(input_ids=tokens))
            finally:
                handle.remove()
            try:
                theirs = logits_of(model(inputs_embeds=rows))
            except Exception as error:  # whatever a model raises, it does not take them
                raise UnsupportedModelError(f"{name} takes no inputs_embeds: {type(error).__name__}: {error}") from error
            without = logits_of(model(input_ids=tokens))
        if not torch.equal(ours, theirs) or torch.equal(ours, without):
            raise UnsupportedModelError(f"{name} makes something else of inputs_embeds than of rows in place of those of its tokens")
        return int(rows.shape[-1])
