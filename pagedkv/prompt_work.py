"""What a step does for prompts beside the usual: takes them as embeddings, rotates long ones apart, pools hidden states, scores tokens.

Owns which live requests want that. Does not own what they get (``Response``), nor how a model is hooked (``ModelRunner``).
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from pagedkv.models import ModelRunner
from pagedkv.plan import StepPlan
from pagedkv.pooling import without_prompt_logits
from pagedkv.responses import Response
from pagedkv.sampling import prompt_logprobs
from pagedkv.seating import Seating
from pagedkv.storage import KVStorage, StepBatch


class PromptWork:
    """Does it for an engine's steps; a step without such requests passes through at the cost of a test.

    Args:
        runner: the model.
        seating: whose row is whose.
    """

    def __init__(self, runner: ModelRunner, seating: Seating) -> None:
        self._runner = runner
        self._seating = seating
        self._responses: dict[str, Response] = {}

    def add(self, request_id: str, response: Response) -> None:
        """Have a request looked after, if its prompt comes as embeddings, is pooled, or is longer than most may be."""
        if _is_special(response):
            self._responses[request_id] = response

    def discard(self, request_id: str) -> None:
        """A request has ended."""
        self._responses.pop(request_id, None)

    def clear(self) -> None:
        """All have."""
        self._responses.clear()

    def trimmed(self, plan: StepPlan) -> StepPlan:
        """The plan without the logits of prompts that are pooled."""
        pooled = [seq for seq, response in self._in(plan) if response.pooler is not None]
        return without_prompt_logits(plan, pooled) if pooled else plan

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """As ``ModelRunner.forward``, with embeddings put in and hidden states taken out."""
        work = self._in(batch.plan)
        if not work:
            return self._runner.forward(batch, storage)
        poolers = [(seq, response.pooler) for seq, response in work if response.pooler is not None]
        embeds = [(seq, response.embeds) for seq, response in work if response.embeds is not None]
        far = [seq for seq, response in work if response.is_far]
        with (
            self._runner.prompt_embeds(*_rows(batch, embeds)) if embeds else nullcontext(),
            self._runner.far_apart(_marked(batch, far)) if far else nullcontext(),
        ):
            if not poolers:
                return self._runner.forward(batch, storage)
            logits, states = self._runner.forward_with_hidden_states(batch, storage)
        for seq, pooler in poolers:
            first, end = batch.plan.cu_seqlens_q[seq : seq + 2].tolist()
            pooler.take(int(batch.plan.positions[first]), states[first:end])
        return logits

    def book_logprobs(self, plan: StepPlan, logits: Tensor) -> None:
        """Add the log-probabilities of a step's prompt tokens to the responses that want them; twice changes nothing."""
        if len(plan.logits_indices) == len(plan.sampling_seqs):
            return
        for seq, row in enumerate(plan.rows.tolist()):
            response, _ = self._seating.owner(row)
            wanted = response.params.prompt_logprobs
            if wanted is None:
                continue
            first, end = int(plan.cu_seqlens_q[seq]), int(plan.cu_seqlens_q[seq + 1])
            prompt = response.record.request.prompt_token_ids
            position = int(plan.positions[first])
            booked = len(response.prompt_logprobs) - 1
            again = booked - position  # computed before, and again after a preemption or for another continuation
            count = min(end - first, len(prompt) - 1 - position) - again  # the last prompt token predicts the output, not the prompt
            if count <= 0:
                continue
            start = int(np.searchsorted(plan.logits_indices, first)) + again
            entries = prompt_logprobs(logits[start : start + count], prompt[booked + 1 : booked + 1 + count], wanted)
            response.prompt_logprobs.extend(map(response.completion(0).with_texts, entries))

    def _in(self, plan: StepPlan) -> list[tuple[int, Response]]:
        """Those of a step, with the place of each in its plan."""
        if not self._responses:
            return []
        owners = ((seq, self._seating.owner(row)[0]) for seq, row in enumerate(plan.rows.tolist()))
        return [(seq, owner) for seq, owner in owners if _is_special(owner)]


def _is_special(response: Response) -> bool:
    return response.pooler is not None or response.embeds is not None or response.is_far


def _marked(batch: StepBatch, seqs: list[int]) -> Tensor:
    """``[T]`` which tokens are of these sequences."""
    marks = np.zeros(batch.plan.num_seqs, dtype=np.bool_)
    marks[seqs] = True
    return torch.from_numpy(np.repeat(marks, batch.plan.query_lens)).to(batch.token_ids.device)


def _rows(batch: StepBatch, embeds: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """``[T, H]`` given rows, and ``[T]`` which tokens have one."""
    plan, like = batch.plan, embeds[0][1]
    rows = like.new_zeros((plan.num_tokens, like.shape[1]))
    is_given = torch.zeros(plan.num_tokens, dtype=torch.bool, device=like.device)
    for seq, given in embeds:
        first, end = plan.cu_seqlens_q[seq : seq + 2].tolist()
        position = int(plan.positions[first])
        part = given[position : position + end - first]
        rows[first : first + len(part)] = part
        is_given[first : first + len(part)] = True
    return rows, is_given
