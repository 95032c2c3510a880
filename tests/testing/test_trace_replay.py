"""Traces run through the real scheduler and manager: hit rates as counted by hand, checks that fail when something is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_simulation import lru_hit_rate

from pagedkv.core import KVCacheManager, LeastRecentlyUsed
from pagedkv.errors import ConfigError, InvalidRequestError
from pagedkv.plan import Int32Array
from pagedkv.scheduling import Scheduler
from pagedkv.testing.trace_replay import StepCost, TraceReport, replay_one_by_one, replay_trace
from pagedkv.testing.traces import Trace, TraceRequest, make_trace
from pagedkv.testing.violations import ViolationError


def random_trace(seed: int, num_requests: int = 60) -> Trace:
    """Prompts that branch off earlier ones."""
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    fresh = iter(range(10**6))
    for _ in range(num_requests):
        base = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.6 else []
        kept = base[: rng.integers(len(base) + 1)]
        prompts.append(kept + [next(fresh) for _ in range(rng.integers(1, 5))])
    arrivals = np.cumsum(rng.exponential(0.05, num_requests)).tolist()
    lens = rng.integers(1, 9, num_requests).tolist()
    requests = [TraceRequest(at, 4 * len(ids) - 1, out, tuple(ids)) for at, ids, out in zip(arrivals, prompts, lens, strict=True)]
    return make_trace("random", 4, requests)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_blocks", [14, 30, 60, None])
def test_one_by_one_hit_rate_equals_a_cache_simulation(seed: int, num_blocks: int | None) -> None:
    trace = random_trace(seed)
    longest = max(len(each.hash_ids) for each in trace.requests)
    size = None if num_blocks is None else max(num_blocks, longest)
    report = replay_one_by_one(trace.as_whole_blocks(), num_blocks=size, check="audit")
    expected = trace.statistics().reuse if size is None else lru_hit_rate(trace, size)
    assert report.block_hit_rate == pytest.approx(expected), f"seed {seed}, {size} blocks"
    assert (report.num_finished, report.peak_running) == (60, 1)


def test_one_by_one_at_true_lengths_misses_half_full_last_blocks() -> None:
    trace = make_trace("mine", 4, [TraceRequest(0, 8, 1, (0, 1)), TraceRequest(1, 8, 1, (0, 1)), TraceRequest(2, 9, 1, (0, 1, 2))])
    report = replay_one_by_one(trace)
    # The second prompt's last token is computed anew, and with it its whole last block; the third finds both.
    assert report.block_hit_rate == pytest.approx(3 / 7)
    assert replay_one_by_one(trace.as_whole_blocks()).block_hit_rate == pytest.approx(4 / 7)


@pytest.mark.parametrize("seed", range(3))
def test_replay_under_pressure_finishes_all_with_every_check(seed: int) -> None:
    trace = random_trace(seed)
    cost = StepCost(step_s=0.05, token_s=0.001)
    report = replay_trace(trace, num_blocks=30, block_size=2, max_num_batched_tokens=16, max_num_seqs=8, cost=cost, check="audit")
    assert (report.num_finished, report.num_refused) == (60, 0), f"seed {seed}"
    assert report.num_checks == report.num_steps > 0
    assert report.num_preemptions > 0
    assert report.num_evicted_blocks > 0
    assert 0 < report.hit_rate < 1
    assert report.num_output_tokens == sum(each.num_output_tokens for each in trace.requests)
    assert report.peak_blocks <= 29
    again = replay_trace(trace, num_blocks=30, block_size=2, max_num_batched_tokens=16, max_num_seqs=8, cost=cost)
    assert replace(again, num_checks=report.num_checks) == report, "checks change nothing"


def test_replay_clock_waits_for_arrivals_and_counts_steps() -> None:
    trace = make_trace("mine", 0, [TraceRequest(0, 10, 2), TraceRequest(100, 10, 1)])
    report = replay_trace(trace, num_blocks=20, block_size=4, cost=StepCost(step_s=1, token_s=0.1))
    # 10 tokens, 1 token; then nothing until 100 s, and 10 tokens.
    assert report.duration_s == pytest.approx(102)
    assert report.first_token_s == pytest.approx((2, 2, 2))
    assert (report.num_steps, report.num_computed_tokens, report.num_checks) == (3, 21, 0)
    assert "num steps            3" in str(report)


def test_replay_refuses_what_can_never_fit_and_serves_the_rest() -> None:
    trace = make_trace("mine", 0, [TraceRequest(0, 100, 1), TraceRequest(0, 5, 1)])
    report = replay_trace(trace, num_blocks=4, block_size=4, check="step")
    assert (report.num_refused, report.num_finished) == (1, 1)


def test_replay_of_an_oversized_trace_reports_no_time() -> None:
    report = replay_trace(make_trace("mine", 0, [TraceRequest(0, 100, 1)]), num_blocks=4, block_size=4)
    assert (report.num_refused, report.first_token_s, report.hit_rate) == (1, (), 0.0)


def test_replay_bad_arguments_are_refused() -> None:
    trace = make_trace("mine", 0, [TraceRequest(0, 5, 1)])
    with pytest.raises(ConfigError, match="check is 'all'"):
        replay_trace(trace, num_blocks=4, check="all")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="no hash ids"):
        replay_one_by_one(trace)
    with pytest.raises(ConfigError, match="num_blocks"):
        replay_trace(trace, num_blocks=1)


class NewestFirst(LeastRecentlyUsed):
    """Breaks the promise of eviction: what continues a block goes after it."""

    def insert(self, block_ids: Int32Array) -> None:
        super().insert(block_ids[::-1].copy())


def broken_replay() -> TraceReport:
    return replay_trace(random_trace(0), num_blocks=30, block_size=2, max_num_seqs=4, check="audit")


def test_replay_names_the_step_of_a_broken_invariant() -> None:
    with pytest.raises(ViolationError) as caught:
        replay_trace(random_trace(0), num_blocks=30, block_size=2, max_num_seqs=4, check="audit", eviction=NewestFirst)
    assert caught.value.kind == "audit"
    assert "random trace, step" in caught.value.__notes__[-1]


def test_replay_finds_held_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCacheManager, "release", lambda self, seqs: None)
    with pytest.raises(ViolationError) as caught:
        broken_replay()
    assert caught.value.kind == "audit"
    with pytest.raises(ViolationError, match="blocks stay held at the end") as caught:
        replay_trace(make_trace("mine", 0, [TraceRequest(0, 5, 1)]), num_blocks=4, block_size=4)
    assert caught.value.kind == "liveness"


def test_replay_finds_a_request_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Scheduler.submit
    monkeypatch.setattr(Scheduler, "submit", lambda self, request: None if request.request_id == "3" else submit(self, request))
    with pytest.raises(ViolationError, match="requests are alive and") as caught:
        broken_replay()
    assert caught.value.kind == "accounting"
    with pytest.raises(ViolationError, match="59 of 60 requests finished") as caught:
        replay_trace(random_trace(0), num_blocks=30, block_size=2, max_num_seqs=4)
    assert caught.value.kind == "liveness"


def test_replay_finds_a_request_that_was_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Scheduler.complete

    def complete_and_abort(self: Scheduler, plan: object, token_ids: object) -> None:
        complete(self, plan, token_ids)  # type: ignore[arg-type]
        self.abort("3")

    monkeypatch.setattr(Scheduler, "complete", complete_and_abort)
    with pytest.raises(ViolationError, match="request 3 ended for the reason 'abort'") as caught:
        broken_replay()
    assert caught.value.kind == "liveness"
