"""From hidden states to embeddings: what a request may ask, and the sum that grows as its prompt is computed.

It owns neither the hidden states (``ModelRunner``) nor when they are computed (``Scheduler``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pagedkv.checks import flag, shown
from pagedkv.errors import InvalidRequestError
from pagedkv.outputs import Float32Array
from pagedkv.plan import StepPlan
from pagedkv.sampling import SamplingParams

Pooling = Literal["last", "mean", "all"]
_POOLINGS = ("last", "mean", "all")

ONLY_PROMPT = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
"""How a request for hidden states is sampled: one token, which nobody sees, ends it."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What of a prompt's last hidden states is wanted.

    Args:
        pooling: ``"last"``: that of the last token; ``"mean"``: the mean over all tokens; ``"all"``: one each. The last two compute the
            whole prompt, so that no cached prefix is used.
        normalize: whether each is brought to length 1.

    Raises:
        InvalidRequestError: names what is wrong.
    """

    pooling: Pooling = "last"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in _POOLINGS:
            raise InvalidRequestError(f"pooling is {shown(self.pooling)}: it must be one of {', '.join(_POOLINGS)}")
        flag("normalize", self.normalize, error=InvalidRequestError)

    @property
    def whole_prompt(self) -> bool:
        """Whether every token of the prompt has to be computed."""
        return self.pooling != "last"


class Pooler:
    """Takes one prompt's hidden states in as they are computed, chunk by chunk.

    Args:
        params: what is wanted of them.
        num_tokens: of the prompt.
    """

    def __init__(self, params: PoolingParams, num_tokens: int) -> None:
        self.params = params
        self._num_tokens = num_tokens
        self._num_taken = 0
        self._sum: Tensor | None = None
        self._parts: list[Tensor] = []

    def take(self, position: int, states: Tensor) -> None:
        """Take ``[N, H]`` states of the tokens from ``position`` on; those that were taken before (a preemption) are passed over."""
        if not self.params.whole_prompt:
            if position + len(states) == self._num_tokens:
                self._parts = [states[-1].float()]
            return
        fresh = states[self._num_taken - position :].float()
        taken = self._num_taken + len(fresh)
        # One statement: a step that is stopped between the two would be undone, and its tokens counted twice or never.
        if self.params.pooling == "all":
            self._parts, self._num_taken = [*self._parts, fresh], taken
        elif len(fresh):
            total = fresh.sum(dim=0)
            self._sum, self._num_taken = total if self._sum is None else self._sum + total, taken

    def result(self) -> Float32Array:
        """``[H]``, or ``[P, H]`` for all; read-only."""
        if self.params.pooling == "mean" and self._sum is not None:
            pooled = self._sum / self._num_tokens
        else:
            pooled = torch.cat(self._parts) if self.params.pooling == "all" else self._parts[0]
        if self.params.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        result: Float32Array = pooled.cpu().numpy()
        result.flags.writeable = False
        return result


def without_prompt_logits(plan: StepPlan, seqs: list[int]) -> StepPlan:
    """A plan that wants no logits of these sequences but those that are sampled from: of a prompt that is pooled, nobody reads others."""
    owners = np.searchsorted(plan.cu_seqlens_q, plan.logits_indices, side="right") - 1
    kept = ~np.isin(owners, seqs)
    kept[plan.sampling_logits] = True
    places = np.cumsum(kept) - 1
    return replace(plan, logits_indices=plan.logits_indices[kept], sampling_logits=places[plan.sampling_logits])
