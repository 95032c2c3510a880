"""Recorded requests: when each came, how long it was, and which blocks of its prompt it shares with others. No text, no torch.

A trace holds no token ids. ``Trace.prompt`` makes them up so that equal hash ids give equal blocks, which is all that a cache sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int32Array

_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One recorded request.

    Attributes:
        arrival_s: seconds since the first request of the trace.
        num_prompt_tokens: at least 1.
        num_output_tokens: at least 1.
        hash_ids: one id from 0 for each ``Trace.hash_block_size`` tokens of the prompt, in order; equal ids mean equal tokens up to there.
            The last one may stand for a part of a block; empty where the trace knows of no sharing.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """What a trace looks like.

    Attributes:
        num_requests: requests.
        duration_s: from the first arrival to the last.
        requests_per_s: over that time.
        prompt_lens: tokens at the 10th, 50th, 90th and 99th percentile.
        mean_prompt_len: tokens.
        output_lens: as ``prompt_lens``.
        mean_output_len: tokens.
        num_hash_ids: blocks of all prompts.
        reuse: share of these that stand in an earlier prompt, from 0 to 1: the hit rate of an endless cache.
    """

    num_requests: int
    duration_s: float
    requests_per_s: float
    prompt_lens: tuple[int, ...]
    mean_prompt_len: float
    output_lens: tuple[int, ...]
    mean_output_len: float
    num_hash_ids: int
    reuse: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        kind: the format or generator that it comes from.
        hash_block_size: tokens that one hash id stands for; 0 where there are none.
        requests: at least one; their hash ids are numbered from 0 in order of first appearance.
        num_distinct_ids: different hash ids.
        num_skipped: recorded requests without a prompt or without an output, which are left out.
    """

    kind: str
    hash_block_size: int
    requests: tuple[TraceRequest, ...]
    num_distinct_ids: int
    num_skipped: int = 0

    def shrink(self, factor: int) -> Trace:
        """The same trace with every length divided by ``factor``, rounded up, so that a replay is cheap and block counts stay.

        Raises:
            InvalidRequestError: a factor below 1, or one that does not divide ``hash_block_size``.
        """
        if factor < 1 or self.hash_block_size % factor:
            raise InvalidRequestError(
                f"factor is {factor}: it must be at least 1 and divide the {self.hash_block_size} tokens of a hash id"
            )
        requests = (
            replace(each, num_prompt_tokens=-(-each.num_prompt_tokens // factor), num_output_tokens=-(-each.num_output_tokens // factor))
            for each in self.requests
        )
        return replace(self, hash_block_size=self.hash_block_size // factor, requests=tuple(requests))

    def as_whole_blocks(self, block_size: int = 2) -> Trace:
        """Only the blocks: every hash id stands for ``block_size`` tokens, one more token follows them, and one is generated.

        The token behind leaves all the blocks before it to be found: of a prompt the last token is always computed anew. Alone in its
        block, it does not fill it (hence at least 2 tokens a block), so that nothing is cached but what the hash ids name.

        Raises:
            InvalidRequestError: a size below 2, or a trace without hash ids.
        """
        if block_size < 2 or not self.hash_block_size:
            raise InvalidRequestError(f"block_size is {block_size}: it must be at least 2, and the {self.kind} trace must have hash ids")
        requests = (
            replace(each, num_prompt_tokens=len(each.hash_ids) * block_size + 1, num_output_tokens=1)
            for each in self.requests
            if each.hash_ids
        )
        return replace(self, hash_block_size=block_size, requests=tuple(requests))

    def prompt(self, index: int) -> Int32Array:
        """``[P]`` token ids of a request: its hash ids, each as often as it has tokens, and ``own_token`` for the rest."""
        request = self.requests[index]
        tokens = np.full(request.num_prompt_tokens, self.own_token(index), dtype=np.int32)
        known = np.repeat(np.array(request.hash_ids, dtype=np.int32), self.hash_block_size)[: len(tokens)]
        tokens[: len(known)] = known
        return tokens

    def own_token(self, index: int) -> int:
        """A token id that no other request has: what a request generates, and what it shares with none."""
        return self.num_distinct_ids + index

    def statistics(self) -> TraceStatistics:
        """Count; O(hash ids)."""
        prompts = np.array([each.num_prompt_tokens for each in self.requests])
        outputs = np.array([each.num_output_tokens for each in self.requests])
        duration = self.requests[-1].arrival_s - self.requests[0].arrival_s
        touched = sum(len(each.hash_ids) for each in self.requests)
        return TraceStatistics(
            num_requests=len(self.requests),
            duration_s=duration,
            requests_per_s=(len(self.requests) - 1) / duration if duration else 0.0,
            prompt_lens=_quantiles(prompts),
            mean_prompt_len=float(prompts.mean()),
            output_lens=_quantiles(outputs),
            mean_output_len=float(outputs.mean()),
            num_hash_ids=touched,
            reuse=1 - self.num_distinct_ids / touched if touched else 0.0,
        )


def make_trace(kind: str, hash_block_size: int, requests: Iterable[TraceRequest], num_skipped: int = 0) -> Trace:
    """Put requests into a trace: in order of arrival, the first at 0 seconds, hash ids numbered anew.

    Raises:
        InvalidRequestError: no request at all.
    """
    ordered = sorted(requests, key=lambda each: each.arrival_s)  # stable: equal arrivals keep their order
    if not ordered:
        raise InvalidRequestError("a trace needs at least one request with a prompt and an output")
    start, numbers = ordered[0].arrival_s, dict[int, int]()
    renumbered = tuple(
        replace(
            each,
            arrival_s=each.arrival_s - start,
            hash_ids=tuple(numbers.setdefault(number, len(numbers)) for number in each.hash_ids),
        )
        for each in ordered
    )
    return Trace(kind, hash_block_size, renumbered, len(numbers), num_skipped)


def _quantiles(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[int, ...]:
    return tuple(round(float(value)) for value in np.quantile(values, _QUANTILES))
