"""Whether two contestants made the same tokens, and how close the call was where they did not. No clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from workloads import Workload


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the answers to the same requests differ.

    Attributes:
        num_requests: compared.
        num_unequal: of those, with any other token.
        num_tokens: compared.
        num_different: of those, places with another token; after a first difference most of a request's tokens differ.
        first: per unequal request the place of its first difference.
    """

    num_requests: int
    num_unequal: int
    num_tokens: int
    num_different: int
    first: Mapping[int, int]

    @classmethod
    def of(cls, tokens: Mapping[int, Sequence[int]], others: Mapping[int, Sequence[int]]) -> Agreement:
        """Compare answers by request; requests that ``others`` does not have are left out."""
        first, different, compared = {}, 0, 0
        for index, wanted in others.items():
            given = tokens[index]
            places = [place for place in range(max(len(given), len(wanted))) if given[place : place + 1] != wanted[place : place + 1]]
            different += len(places)
            compared += max(len(given), len(wanted))
            if places:
                first[index] = places[0]
        return cls(len(others), len(first), compared, different, first)

    def __str__(self) -> str:
        return f"{self.num_unequal:,} of {self.num_requests:,} requests, {self.num_different:,} of {self.num_tokens:,} tokens"


def margin(model: PreTrainedModel, workload: Workload, *, index: int, answer: Sequence[int], place: int) -> float:
    """How far the best logit lies above the second best, where an answer's token at ``place`` was chosen; one plain forward."""
    ids = torch.tensor([[*workload.prompts[index], *answer[:place]]], device=model.device)
    with torch.no_grad():
        best = model(input_ids=ids, use_cache=False).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
