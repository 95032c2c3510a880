"""What a request's tokens are when its model runs nothing else: transformers' own ``generate``, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from pagedkv.testing.simulated_load import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GenerateAlone:
    """The oracle of ``simulate_engine``: greedy tokens by a model's ``generate``, kept for when they are asked for again.

    Args:
        model: the same one that the engine runs, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def __call__(self, job: Job) -> list[list[int]]:
        """The tokens of each continuation of a job, stops not looked at."""
        key = job.prompt, job.max_tokens
        if key not in self._known:
            self._known[key] = self._generate(*key)
        return [self._known[key]] * job.n

    def _generate(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=self._model.device)
        loop = cast("Callable[..., Any]", self._model.generate)
        with torch.no_grad():
            found = loop(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0
            )
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return tokens
