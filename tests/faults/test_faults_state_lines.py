"""An exception at every line on the way of recurrent state: tokens stay those of ``generate``, or the engine refuses from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from engine_parts import ENGINE_PARTS
from state_models import state_model

import pagedkv.models.dense
import pagedkv.models.states
import pagedkv.storage.state
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import InvariantError, StepError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.sampling import SamplingParams
from pagedkv.testing.faults import Fault, InjectedFaultError, Site, failing_lines

PARTS = (*ENGINE_PARTS, pagedkv.storage.state, pagedkv.models.dense, pagedkv.models.states)
# A fork that copies its last block, a prompt in chunks, and one that gets the row of the first that ends.
REQUESTS = {"fork": ([5, 9, 31, 60, 7, 8], 5, 2), "chunked": ([8, 44, 3, 90, 12, 71, 15, 6, 33, 2, 19], 4, 1), "late": ([77, 3], 3, 1)}


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(state_model("lfm2"), block_size=4)


@pytest.fixture(scope="module")
def want(runner: ModelRunner) -> dict[str, list[tuple[int, ...]]]:
    model: Any = runner.model
    found = {}
    for name, (prompt, max_tokens, n) in REQUESTS.items():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, eos_token_id=None)
        found[name] = [tuple(text[0, len(prompt) :].tolist())] * n
    return found


class Broken(Exception):  # an outcome, not an error
    """The engine has said that it was stopped in the middle."""


def serve(runner: ModelRunner, struck: int | None, fault: Fault) -> tuple[dict[str, list[tuple[int, ...]]], list[list[Site]]]:
    """Everything to its end, with a fault in one step; the tokens, and the lines that each step executed where the fault only counts."""
    config = EngineConfig(num_blocks=16, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32)
    engine = Engine(runner, config, clock=lambda: 0.0)
    for name, (prompt, max_tokens, n) in REQUESTS.items():
        engine.add_request(name, prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, n=n))
    outputs, sites = {}, []
    number = 0
    while engine.has_unfinished:
        first, ready = len(fault.sites), []
        try:
            if struck in (None, number):
                fault.count = 0
                with failing_lines(PARTS, fault):
                    ready = engine.step()
            else:
                ready = engine.step()
        except (InjectedFaultError, StepError, UnsupportedModelError):
            if engine.is_broken:
                raise Broken from None
        sites.append(fault.sites[first:])
        outputs.update({output.request_id: [each.token_ids for each in output.outputs] for output in ready if output.finished})
        number += 1
        assert number < 100
    engine.check()
    engine.close()
    return outputs, sites


def points(runner: ModelRunner) -> Iterator[tuple[int, int]]:
    """A step and which of its lines: each line of the code once, in the first step, and once in the last, that executes it."""
    _, steps = serve(runner, None, Fault())
    ordered = [(number, index, site) for number, sites in enumerate(steps) for index, site in enumerate(sites)]
    ends: dict[Site, list[tuple[int, int]]] = {}
    for number, index, site in ordered:
        ends.setdefault(site, []).append((number, index))
    for places in ends.values():
        yield from dict.fromkeys((places[0], places[-1]))


def try_all(runner: ModelRunner, want: dict[str, list[tuple[int, ...]]], *, stride: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for number, index in islice(points(runner), 0, None, stride):
        try:
            got, _ = serve(runner, number, Fault(index))
        except Broken:
            outcomes["declared broken"] += 1
            continue
        except Exception as error:
            error.add_note(f"exception at line {index} of step {number}")
            raise
        assert got == want, f"after an exception at line {index} of step {number}"
        outcomes["served on"] += 1
    return outcomes


def test_requests_are_served_without_a_fault(runner: ModelRunner, want: dict[str, list[tuple[int, ...]]]) -> None:
    assert serve(runner, None, Fault())[0] == want


def test_exception_at_some_lines_leaves_every_state_as_it_was(runner: ModelRunner, want: dict[str, list[tuple[int, ...]]]) -> None:
    assert try_all(runner, want, stride=37)["served on"] > 3


@pytest.mark.slow
def test_exception_at_each_line_leaves_every_state_as_it_was(runner: ModelRunner, want: dict[str, list[tuple[int, ...]]]) -> None:
    outcomes = try_all(runner, want, stride=1)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")
    assert outcomes["served on"] > 100


@pytest.mark.slow
def test_loop_finds_out_when_state_counts_before_the_step_is_booked(
    runner: ModelRunner, want: dict[str, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pagedkv.storage.state.StateStorage.commit

    def commit_at_once(state: Any, *arguments: Any) -> None:
        right_stage(state, *arguments)
        right(state)

    right_stage = pagedkv.storage.state.StateStorage.stage
    monkeypatch.setattr(pagedkv.storage.state.StateStorage, "stage", commit_at_once)
    with pytest.raises((AssertionError, InvariantError)):
        try_all(runner, want, stride=7)
