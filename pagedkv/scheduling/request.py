"""What a user asked for, and what has become of it so far.

``Request`` is the frozen wish. ``RequestRecord`` and its ``Branch``es (one for each of ``n`` continuations) are the scheduler's own record
of it; their status moves only along the transition table here. They own no blocks: a running branch names its sequence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import numpy as np

from pagedkv.checks import flag, integer, integers, shown, text
from pagedkv.errors import InvalidRequestError, InvariantError, PagedKVError
from pagedkv.plan import Int32Array
from pagedkv.scheduling.events import Event, EventKind

FinishReason = Literal["stop", "length", "abort", "error"]
_LARGEST = 2**31 - 1  # tokens and counts are kept in int32
MAX_EVENTS = 256  # kept for each request: the first ones explain its start, the last ones its end


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt and how far to continue it.

    Args:
        request_id: names the request; free again when it has ended.
        prompt_token_ids: ``[P]`` int32, at least one, ids from 0; copied and frozen.
        max_tokens: new tokens at most, at least 1.
        min_tokens: new tokens before a stop id may end it.
        eos_token_ids: tokens that end it with no stop reason.
        stop_token_ids: tokens that end it and are its stop reason.
        n: continuations, forked after one prefill.
        priority: for policies that look at it; lower goes first.
        namespace: who may share cached prefixes with it.
        wants_prompt_logits: the logits of every prompt token are wanted, so no cached prefix is used.

    Raises:
        InvalidRequestError: an empty prompt, a token id or a number out of range; what is taken here cannot fail in a later step.
    """

    request_id: str
    prompt_token_ids: Int32Array
    max_tokens: int
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    priority: int = 0
    namespace: str = ""
    wants_prompt_logits: bool = False

    def __post_init__(self) -> None:
        text("request id", self.request_id, error=InvalidRequestError)
        object.__setattr__(self, "prompt_token_ids", _frozen_tokens(self.request_id, self.prompt_token_ids))
        name = f"request {self.request_id!r}"
        for ids, given in (("eos_token_ids", self.eos_token_ids), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(given, tuple):
                raise InvalidRequestError(f"{name}: {ids} is {shown(given)}: it must be a tuple of token ids")
        for field_name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("min_tokens", self.min_tokens, 0),
            ("n", self.n, 1),
            *(("stop id", token, 0) for token in self.eos_token_ids + self.stop_token_ids),
        ):
            integer(f"{name}: {field_name}", value, least=least, most=_LARGEST, error=InvalidRequestError)
        integer(f"{name}: priority", self.priority, least=-(2**63), most=2**63 - 1, error=InvalidRequestError)
        text(f"{name}: namespace", self.namespace, error=InvalidRequestError)
        flag(f"{name}: wants_prompt_logits", self.wants_prompt_logits, error=InvalidRequestError)


class Status(StrEnum):
    """Where a branch is."""

    WAITING = "waiting"  # in the queue; holds no blocks
    DEFERRED = "deferred"  # out of the queue until a running branch has computed the prefix they share
    RUNNING = "running"
    FINISHED = "finished"


_MOVES = MappingProxyType(
    {
        Status.WAITING: frozenset({Status.DEFERRED, Status.RUNNING, Status.FINISHED}),
        Status.DEFERRED: frozenset({Status.WAITING, Status.FINISHED}),
        Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),
        Status.FINISHED: frozenset[Status](),
    }
)


@dataclass(slots=True, eq=False)
class Branch:
    """One continuation of a request. Until the fork, branch 0 stands for all ``n``: ``is_trunk``."""

    record: RequestRecord
    index: int
    token_ids: Int32Array  # known tokens; while running, the manager's table knows better
    is_trunk: bool = False
    status: Status = Status.WAITING
    seq: int = 0
    row: int = -1
    num_preemptions: int = 0
    num_passed_over: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def move(self, status: Status) -> None:
        """Change the status; raises ``InvariantError`` on a move that the table does not know."""
        if status not in _MOVES[self.status]:
            raise InvariantError(f"request {self.record.request.request_id!r} cannot go from {self.status} to {status}")
        self.status = status

    @property
    def request(self) -> Request:
        """What the user asked for."""
        return self.record.request

    @property
    def width(self) -> int:
        """Sequences that this branch stands for."""
        return self.request.n if self.is_trunk else 1

    @property
    def output_token_ids(self) -> Int32Array:
        """Tokens behind the prompt; for a branch that is not running."""
        return self.token_ids[len(self.request.prompt_token_ids) :]


@dataclass(slots=True, eq=False)
class RequestRecord:
    """A request in the scheduler's books: its branches, times and events."""

    request: Request
    arrival: int
    arrival_time: float
    branches: list[Branch] = field(default_factory=list)
    num_cached_tokens: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    error: PagedKVError | None = None
    _first_events: list[Event] = field(default_factory=list)
    _last_events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS // 2))

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened, in order; of very many, the first and last ``MAX_EVENTS / 2``."""
        return (*self._first_events, *self._last_events)

    @property
    def num_preemptions(self) -> int:
        """Preemptions of all branches."""
        return sum(branch.num_preemptions for branch in self.branches)

    @property
    def finished(self) -> bool:
        """Whether every branch has ended."""
        return all(branch.status is Status.FINISHED for branch in self.branches)

    def note(self, kind: EventKind, step: int, **detail: object) -> None:
        """Remember what happened; a wait for the same reason as before is not repeated."""
        noted = self._last_events or self._first_events
        last = noted[-1] if noted else None
        if last is not None and kind is EventKind.WAITING and last.kind is kind and last.detail.get("reason") == detail.get("reason"):
            return
        event = Event(kind, step, MappingProxyType(detail))
        if len(self._first_events) < MAX_EVENTS // 2:
            self._first_events.append(event)
        else:
            self._last_events.append(event)


def _frozen_tokens(request_id: str, token_ids: Int32Array) -> Int32Array:
    wide = integers(f"request {request_id!r}: the prompt", token_ids)
    if not len(wide):
        raise InvalidRequestError(f"request {request_id!r}: the prompt is empty: it needs at least one token")
    if int(wide.min()) < 0 or int(wide.max()) > _LARGEST:
        raise InvalidRequestError(f"request {request_id!r}: token ids must be from 0 to 2**31 - 1, got {wide.min()} to {wide.max()}")
    tokens = np.array(wide, dtype=np.int32)
    tokens.flags.writeable = False
    return tokens
