"""Why things happened to a request: machine-readable reasons, kept with it. Owns no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class EventKind(StrEnum):
    """What happened."""

    SUBMITTED = "submitted"
    WAITING = "waiting"  # detail: reason, a WaitReason, and the numbers behind it
    # detail: num_cached_tokens; miss, a MissReason, where it is 0; computed_one_by_one, tokens that a prompt has more than a step can take,
    # where it may not be split
    ADMITTED = "admitted"
    FORKED = "forked"  # detail: n
    PREEMPTED = "preempted"  # detail: index, freed_blocks
    UNDONE = "undone"  # a step with this request failed and was taken back
    FINISHED = "finished"  # detail: index, finish_reason


class WaitReason(StrEnum):
    """Why a request was not admitted in a step."""

    SEQUENCES = "all sequences are taken: max_num_seqs"
    BLOCKS = "too few blocks are available: num_blocks"
    RESERVED = "waits until all running requests are sure to fit to their end, since it or one of them was preempted often"
    PREFIX = "a running request is computing the same prefix"
    PREEMPTION = "this step had to preempt"
    TOKENS = "its prompt is computed in one step, and this one has too many others: max_num_batched_tokens"


class MissReason(StrEnum):
    """Why no prefix was found in the cache."""

    DISABLED = "prefix caching is off"
    STATE = "the model has recurrent layers, whose state at the end of a prefix is not kept"
    NOT_CACHED = "no full block of the prompt is cached in this namespace"
    PROMPT_LOGITS = "the request asks for the logits of its whole prompt"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: ``kind``, the number of the ``step`` it happened in, and the figures behind it."""

    kind: EventKind
    step: int
    detail: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        figures = ", ".join(f"{name}={value}" for name, value in self.detail.items())
        return f"step {self.step}: {self.kind}" + (f" ({figures})" if figures else "")
