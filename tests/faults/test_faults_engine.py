"""Each call of a kernel or of another part of a step fails, once and until it is mended: the work ends with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pagedkv.attention.reference import ReferenceBackend
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import PoolAllocationError, StepError
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import Sampler, SamplingParams
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec
from pagedkv.testing.faults import Fault, InjectedFaultError, failing_calls, fault_loop
from pagedkv.testing.models import tiny_model

PROMPTS = {"fork": ((5, 6, 7, 8, 9, 10), 2), "long": ((5, 6, 7, 8, 11), 1), "hit": ((5, 6, 7, 8, 11, 12, 13, 14, 15), 1)}
PARTS: dict[str, tuple[object, str]] = {
    "attention reads": (ReferenceBackend, "attend"),
    "attention writes": (ReferenceBackend, "write"),
    "blocks are copied": (KVStorage, "copy_blocks"),
    "a batch is built": (BatchBuilder, "build"),
    "the model runs": (ModelRunner, "forward"),
    "tokens are drawn": (Sampler, "sample"),
    "rows are given": (Sampler, "add"),
}
_MOST_FAILURES = 3


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(tiny_model("llama", num_hidden_layers=1), backend=ReferenceBackend(), block_size=4)


def serve(runner: ModelRunner, fault: Fault | None = None) -> dict[str, Any]:
    """Run everything to its end, trying again when a step fails; a fault that persists is mended after a few failures."""
    engine = Engine(runner, EngineConfig(num_blocks=8, max_num_batched_tokens=8))
    tokens: dict[str, Any] = {}
    for requests in (PROMPTS, {"next": ((1, 2, 3), 1)}):
        for request_id, (prompt, n) in requests.items():
            engine.add_request(request_id, list(prompt), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, n=n))
        while engine.has_unfinished:
            for output in step(engine, fault):
                if output.finished:
                    tokens[output.request_id] = [each.token_ids for each in output.outputs]
        assert engine.num_blocks_in_use == 0
    assert engine.statistics().num_preemptions > 0
    assert engine.statistics().cache.num_copies > 0
    engine.close()
    return tokens


def step(engine: Engine, fault: Fault | None) -> list[RequestOutput]:
    """A step, which may fail; all blocks that hold nothing are NaN afterwards."""
    try:
        outputs = engine.step()
    except StepError as error:
        if fault is None or not isinstance(error.__cause__, InjectedFaultError):
            raise
        if fault.num_struck == _MOST_FAILURES:
            fault.at = None
        outputs = []
    engine.check()
    engine.fill_free_blocks(float("nan"))
    return outputs


def cases() -> Iterator[Any]:
    """All parts, once and persistently; a few of them in the short suite."""
    short = {("attention reads", False), ("rows are given", False), ("blocks are copied", True)}
    for part in PARTS:
        for persistent in (False, True):
            marks = () if (part, persistent) in short else (pytest.mark.slow,)
            yield pytest.param(part, persistent, id=f"{part} {'persistently' if persistent else 'once'}", marks=marks)


@pytest.mark.parametrize(("part", "persistent"), list(cases()))
def test_step_whose_part_fails_is_undone_and_its_retry_gives_the_same_tokens(part: str, persistent: bool, runner: ModelRunner) -> None:
    want, (owner, name) = serve(runner), PARTS[part]

    def work(fault: Fault) -> dict[str, Any]:
        with failing_calls(owner, name, fault):
            return serve(runner, fault)

    tried = 0
    for outcome in fault_loop(work, persistent=persistent):
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome == want, f"call {tried} of {name} failed"
        tried += 1
    print(f"\n{tried - 1} points")
    assert tried > 5


def test_each_refused_allocation_of_a_pool_is_told_and_nothing_is_kept() -> None:
    layers = [LayerSpec(1, 4, 4)] * 3

    def work(fault: Fault) -> KVStorage:
        with failing_calls(torch, "empty", fault):
            return KVStorage(layers, num_blocks=4, block_size=2, dtype=torch.float32, device="cpu")

    def refusing(fault: Fault) -> KVStorage:
        refusal = Fault(fault.at, error=lambda: RuntimeError("out of memory"))
        try:
            return work(refusal)
        finally:
            fault.num_struck = refusal.num_struck

    *refused, storage = fault_loop(refusing)
    assert len(refused) == len(layers)
    for at, error in enumerate(refused):
        assert isinstance(error, PoolAllocationError)
        assert f"refused after {at * storage.nbytes // 3:,} bytes (out of memory)" in str(error)
