"""An exception at every line of scheduler and manager while requests are served: the work goes on to the same tokens, or is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from faults_support import is_broken

import pagedkv.core
import pagedkv.scheduling
from pagedkv.core import KVCacheManager
from pagedkv.core.reservations import Reservations
from pagedkv.core.transaction import Transaction
from pagedkv.errors import InvalidRequestError, InvariantError, OutOfBlocksError
from pagedkv.plan import StepPlan
from pagedkv.scheduling import LongestCachedPrefix, Request, Scheduler, SchedulerConfig
from pagedkv.testing.faults import Fault, InjectedFaultError, Site, failing_calls, failing_lines
from pagedkv.testing.hash_model import HashModel, continuation

BOTH = (pagedkv.core, pagedkv.scheduling)
VOCABULARY = 61
PREFIX = [1, 2, 3, 4]
REQUESTS = {
    "fork": Request("fork", np.array([*PREFIX, 5]), max_tokens=4, n=2),
    "long": Request("long", np.array([*PREFIX, 6, 7]), max_tokens=8),
    "hit": Request("hit", np.array([*PREFIX, 6, 7, 8]), max_tokens=3),
    "aborted": Request("aborted", np.array([9, 9, 9]), max_tokens=9),
}


class BrokenError(Exception):
    """The scheduler has said that it was stopped in the middle."""


class Service:
    """Serves the requests with a model of hashes; one of its commands meets a fault.

    Attributes:
        sites: per command the lines that it executed, where the fault only counts.
    """

    def __init__(self, packages: tuple[ModuleType, ...] = (), command: int | None = None, fault: Fault | None = None) -> None:
        self.model = HashModel(block_size=2, vocab_size=VOCABULARY)
        self.storage = self.model.new_storage(12)
        self.manager = KVCacheManager(num_blocks=12, block_size=2, max_num_seqs=4, max_seq_len=16)
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=7, watermark=0.0)
        self.scheduler = Scheduler(self.manager, config, policy=LongestCachedPrefix(lookahead=2), clock=lambda: 0.0)
        self.sites: list[list[Site]] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self._packages, self._struck, self._fault = packages, command, fault
        self._number = 0

    def serve(self) -> None:
        for request_id, request in REQUESTS.items():
            self._do(partial(self.scheduler.submit, request), is_done=lambda name=request_id: self.scheduler.record(name) is not None)
        for step in range(200):
            plan = self._do(self.scheduler.plan)
            if plan is None:
                break
            self._do(self.scheduler.take_assignments)
            self.settle(plan, undo=step == 2)
            if step == 4:
                self._do(lambda: self.scheduler.preempt("long"))
            if step == 6:
                self._do(lambda: self.scheduler.abort("aborted"))
            for branch in self._do(self.scheduler.take_ended):
                self.tokens[branch.request.request_id, branch.index] = branch.output_token_ids.tolist()
        assert not self.scheduler.has_unfinished

    def verify(self) -> None:
        """The same tokens as without any fault, and nothing left behind."""
        self.scheduler.check()
        self.manager.check()
        assert self.manager.statistics().groups[0].num_in_use == 0
        for (request_id, index), tokens in self.tokens.items():
            request = REQUESTS[request_id]
            want = continuation(request.prompt_token_ids.tolist(), request.max_tokens, vocab_size=VOCABULARY)
            assert tokens == (want[: len(tokens)] if request_id == "aborted" else want), f"{request_id}, continuation {index}"
        assert {name for name, _ in self.tokens} == set(REQUESTS)
        assert len(self.tokens) == len(REQUESTS) + 1

    def settle(self, plan: StepPlan, *, undo: bool = False) -> None:
        """Compute a step and end it."""
        self.storage.copy_blocks(plan.copies)
        self.model.write(plan, self.storage)
        candidates = self.model.candidates(plan, self.storage)
        tokens = np.array([candidates[index][0] for index in plan.sampling_logits.tolist()], dtype=np.int32)
        end = (lambda: self.scheduler.undo(plan)) if undo else (lambda: self.scheduler.complete(plan, tokens))
        self._do(end, is_done=lambda: not self._waits())

    def _do(self, command: Callable[[], Any], is_done: Callable[[], bool] = lambda: False) -> Any:
        """Run a command; where the fault has struck it, try again, unless it is done."""
        number, self._number = self._number, self._number + 1
        fault = self._fault
        if fault is None or self._struck not in (None, number):
            return command()
        first = len(fault.sites)
        for _ in range(2 if fault.persistent else 1):
            fault.count = 0
            try:
                with failing_lines(self._packages, fault):
                    result = command()
            except InjectedFaultError:
                if is_broken(self._waits):
                    raise BrokenError from None
                if is_done():
                    return None
            else:
                self.sites.append(fault.sites[first:])
                return result
        return command()

    def _waits(self) -> bool:
        """Whether a plan is outstanding; all invariants that hold then are verified."""
        self.manager.check()
        try:
            self.scheduler.check()
        except InvariantError as error:
            if "a plan is outstanding" not in str(error):
                raise
            return True
        return False


def points(packages: tuple[ModuleType, ...], *, every: bool) -> Iterator[tuple[int, int]]:
    service = Service(packages, None, Fault())
    service.serve()
    service.verify()
    assert service.scheduler.num_preemptions > 0
    seen: set[Site] = set()
    for number, sites in enumerate(service.sites):
        for index, site in enumerate(sites):
            if every or site not in seen:
                seen.add(site)
                yield number, index


def assert_refuses(scheduler: Scheduler) -> None:
    for command in (scheduler.plan, scheduler.check, lambda: scheduler.abort("long"), lambda: scheduler.submit(REQUESTS["long"])):
        with pytest.raises(InvariantError, match="was stopped in the middle of a command"):
            command()


def try_all(packages: tuple[ModuleType, ...], *, every: bool, persistent: bool = False, stride: int = 1) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for number, index in islice(points(packages, every=every), 0, None, stride):
        service = Service(packages, number, Fault(index, persistent=persistent))
        try:
            service.serve()
            service.verify()
            outcomes["served on"] += 1
        except BrokenError:
            outcomes["declared broken"] += 1
            assert_refuses(service.scheduler)
        except Exception as error:
            error.add_note(f"exception at line {index} of command {number}")
            raise
    return outcomes


def test_exception_at_every_third_line_of_the_scheduler_is_survived_with_the_same_tokens_or_refused_from_then_on() -> None:
    outcomes = try_all((pagedkv.scheduling,), every=False, stride=3)
    assert outcomes["served on"] > 30
    assert outcomes["declared broken"] > 30


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_exception_at_every_executed_line_of_the_scheduler(persistent: bool) -> None:
    outcomes = try_all((pagedkv.scheduling,), every=True, persistent=persistent)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_exception_at_each_line_of_core_and_scheduling_while_requests_are_served(persistent: bool) -> None:
    outcomes = try_all(BOTH, every=False, persistent=persistent)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")


def test_loop_finds_out_when_nobody_remembers_that_a_command_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transaction, "check", lambda self: None)
    with pytest.raises((AssertionError, InvariantError, InvalidRequestError, LookupError, IndexError)):
        try_all((pagedkv.scheduling,), every=False)


def test_each_refused_allocation_is_made_up_for_and_every_request_ends_with_the_same_tokens() -> None:
    tried = 0
    for at in range(1000):
        service = Service()
        fault = Fault(at, error=lambda: OutOfBlocksError(needed=1, available=0))
        plan = service.scheduler.plan

        def plan_patiently(service: Service = service, plan: Callable[[], StepPlan | None] = plan) -> StepPlan | None:
            """A prefill that was found to fit, or a request that runs alone, cannot be out of blocks: that is raised, and taken back."""
            try:
                return plan()
            except (OutOfBlocksError, InvariantError):
                service.scheduler.check()
                return plan()

        service.scheduler.plan = plan_patiently  # type: ignore[method-assign]
        with failing_calls(Reservations, "check_available", fault):
            service.serve()
        service.verify()
        if not fault.num_struck:
            break
        tried += 1
    assert tried > 10
