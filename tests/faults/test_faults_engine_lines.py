"""An exception at every line of the engine while it serves: it serves on to the same outputs, ends one request, or refuses from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, cast

import pytest
import torch
from engine_parts import ENGINE_PARTS
from faults_support import is_broken
from transformers import PreTrainedTokenizerBase

import pagedkv.sampling
from pagedkv.core.transaction import Transaction
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import InvalidRequestError, InvariantError, StepError
from pagedkv.models import ModelRunner
from pagedkv.outputs import CompletionOutput, RequestOutput
from pagedkv.plan import StepPlan
from pagedkv.sampling import Sampler, SamplingParams
from pagedkv.scheduling import Scheduler
from pagedkv.testing.faults import Fault, InjectedFaultError, Site, failing_calls, failing_lines
from pagedkv.testing.hash_model import HashModel

PARTS = (*ENGINE_PARTS, pagedkv.sampling)
STEP_TO_PREEMPT, STEP_TO_ABORT = 6, 9


class Letters:
    """A tokenizer: a letter for each token."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(65 + token) for token in token_ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) - 65 for letter in text.strip()]


class SpoiltModel(HashModel):
    """Cannot compute what comes behind one token; the engine asks no more of a runner than what the hash model has."""

    SPOILT = 40

    def forward(self, batch: Any, storage: Any) -> torch.Tensor:
        plan: StepPlan = batch.plan
        logits = super().forward(batch, storage)
        logits[torch.from_numpy(plan.token_ids[plan.logits_indices] == self.SPOILT)] = float("nan")
        return logits


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


PROMPTS: dict[str, tuple[list[int], SamplingParams, bool]] = {
    "fork": ([1, 2, 3, 4, 5, 6], SamplingParams(seed=3, max_tokens=4, ignore_eos=True, n=2, logprobs=1), True),
    "long": ([1, 2, 3, 4, 6, 7], greedy(8, prompt_logprobs=1), True),
    "silent": ([1, 2, 3, 4, 6, 7, 8], greedy(3, bad_words=["K"]), False),
    "aborted": ([9, 9, 9], greedy(20), True),
    "spoilt": ([7, SpoiltModel.SPOILT], greedy(3), True),
}


class BrokenError(Exception):
    """The engine has said that it was stopped in the middle."""


class Service:
    """An engine that serves the prompts; one of its commands meets a fault.

    Attributes:
        sites: per command the lines that it executed, where the fault only counts.
    """

    def __init__(self, command: int | None = None, fault: Fault | None = None) -> None:
        runner = cast("ModelRunner", SpoiltModel(block_size=2))
        tokenizer = cast("PreTrainedTokenizerBase", Letters())
        config = EngineConfig(num_blocks=14, max_num_seqs=5, max_num_batched_tokens=7, max_model_len=40, watermark=0.0)
        self.engine = Engine(runner, config, tokenizer=tokenizer, clock=lambda: 0.0)
        self.sites: list[list[Site]] = []
        self.outputs: dict[str, RequestOutput] = {}
        self._struck, self._fault, self._number = command, fault, 0

    def serve(self, stop: str) -> dict[str, tuple[object, ...]]:
        """Everything to its end; returns what the requests got. ``stop`` is a text that one more request ends at."""
        requests = {**PROMPTS, "stop": ([1, 2, 9], greedy(12, stop=[stop]), True)}
        for name, (prompt, params, stream) in requests.items():
            self._do(partial(self.engine.add_request, name, prompt, params, stream=stream))
        for step in count():
            if not self.engine.has_unfinished:
                break
            if step == STEP_TO_PREEMPT:
                self._do(lambda: self.engine.preempt("long"))
            if step == STEP_TO_ABORT:
                self._do(lambda: self.engine.abort("aborted"))
            for output in self._do(self.engine.step):
                self.outputs[output.request_id] = output
            self.engine.fill_free_blocks(float("nan"))
        self.engine.check()
        assert self.engine.num_blocks_in_use == 0
        assert all(output.finished for output in self.outputs.values())
        return {name: (self.outputs[name].prompt_logprobs, *map(facts, self.outputs[name].outputs)) for name in requests}

    def _do(self, command: Callable[[], Any]) -> Any:
        """Run a command; where the fault has struck it, try again: nothing of it may have happened."""
        number, self._number = self._number, self._number + 1
        fault = self._fault
        if fault is None or self._struck not in (None, number):
            return command()
        first = len(fault.sites)
        for _ in range(2 if fault.persistent else 1):
            fault.count = 0
            try:
                with failing_lines(PARTS, fault):
                    result = command()
            except (InjectedFaultError, StepError, InvariantError) as error:
                if not is_injected(error):
                    raise
                if is_broken(self.engine.check):
                    raise BrokenError from None
            else:
                self.sites.append(fault.sites[first:])
                return result
        return command()


def facts(completion: CompletionOutput) -> tuple[object, ...]:
    """All that a user reads of a continuation; how far somebody got who was aborted depends on the steps that failed."""
    if completion.finish_reason == "abort":
        return (completion.finish_reason,)
    return completion.text, completion.token_ids, completion.logprobs, completion.finish_reason, completion.stop_reason


def is_injected(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, InjectedFaultError) or is_injected(error.__cause__ or error.__context__))


@pytest.fixture(scope="module")
def stop() -> str:
    """The middle of what a request says: two letters."""
    engine = Service().engine
    engine.add_request("alone", [1, 2, 9], greedy(12))
    while engine.has_unfinished:
        (output,) = engine.step()
    return output.outputs[0].text[3:5]


@pytest.fixture(scope="module")
def want(stop: str) -> dict[str, tuple[object, ...]]:
    service = Service()
    want = service.serve(stop)
    assert service.engine.statistics().num_preemptions > 1
    assert service.engine.statistics().cache.num_copies > 0
    reasons = [completion.finish_reason for output in service.outputs.values() for completion in output.outputs]
    assert sorted(map(str, reasons)) == ["abort", "error", "length", "length", "length", "length", "stop"]
    return want


def points(stop: str, *, every: bool) -> Iterator[tuple[int, int]]:
    """A command and which of its lines; every one, or each line of the code once in the command that reaches it first."""
    service = Service(None, Fault())
    service.serve(stop)
    seen: set[Site] = set()
    for number, sites in enumerate(service.sites):
        for index, site in enumerate(sites):
            if every or site not in seen:
                seen.add(site)
                yield number, index


def assert_refuses(engine: Engine) -> None:
    """Every command says no, what there is can be looked at, and its memory comes back."""
    for command in (
        engine.step,
        engine.check,
        lambda: engine.abort("long"),
        lambda: engine.preempt("long"),
        lambda: engine.add_request("new", [1, 2]),
    ):
        with pytest.raises(InvariantError, match="was stopped in the middle of a command"):
            command()
    engine.statistics()
    engine.snapshot()
    engine.close()


def try_all(stop: str, want: dict[str, tuple[object, ...]], *, every: bool, persistent: bool = False, stride: int = 1) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for number, index in islice(points(stop, every=every), 0, None, stride):
        service = Service(number, Fault(index, persistent=persistent))
        try:
            got = service.serve(stop)
            ended = [name for name, output in service.outputs.items() if is_injected(output.error)]
            assert {name: got[name] for name in got if name not in ended} == {name: want[name] for name in want if name not in ended}
            assert len(ended) <= 1
            outcomes["ended one request" if ended else "served on"] += 1
        except BrokenError:
            outcomes["declared broken"] += 1
            assert_refuses(service.engine)
        except Exception as error:
            error.add_note(f"exception at line {index} of command {number}")
            raise
    return outcomes


def test_exception_at_every_seventh_line_of_the_engine_is_survived_with_the_same_outputs_or_refused_from_then_on(
    stop: str, want: dict[str, tuple[object, ...]]
) -> None:
    outcomes = try_all(stop, want, every=False, stride=7)
    assert outcomes["served on"] > 40
    assert outcomes["declared broken"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_exception_at_each_line_of_the_engine(persistent: bool, stop: str, want: dict[str, tuple[object, ...]]) -> None:
    outcomes = try_all(stop, want, every=False, persistent=persistent)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")


@pytest.mark.slow
def test_exception_at_every_executed_line_of_the_engine(stop: str, want: dict[str, tuple[object, ...]]) -> None:
    outcomes = try_all(stop, want, every=True)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        pytest.param(Transaction, "check", lambda self: None, id="nobody remembers that a command was stopped"),
        pytest.param(Scheduler, "outstanding", None, id="no plan is undone"),
    ],
)
def test_loop_finds_out_when(
    owner: type, name: str, wrong: object, stop: str, want: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, InvariantError, InvalidRequestError, LookupError)):
        try_all(stop, want, every=False)


def test_step_whose_plan_is_outstanding_is_undone_wherever_it_is_stopped(stop: str) -> None:
    engine = Service().engine
    engine.add_request("stop", [1, 2, 9], greedy(12, stop=[stop]))
    engine.add_request("other", [1, 2, 9, 4], greedy(2))
    for owner, name in ((Sampler, "sample"), (Scheduler, "complete")):
        with pytest.raises(KeyboardInterrupt), failing_calls(owner, name, Fault(0, error=KeyboardInterrupt)):
            engine.step()
        engine.check()
        assert not engine.is_broken
    with pytest.raises(KeyboardInterrupt), failing_calls(Scheduler, "take_ended", Fault(0, error=KeyboardInterrupt)):
        engine.step()
    assert engine.is_broken
    assert_refuses(engine)
