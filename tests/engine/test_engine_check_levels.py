"""Check levels of an engine: the same tokens at each, nothing to find in healthy runs, and what each finds in broken ones."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import torch
from engine_support import PROMPTS, FailingBackend, Prompt, greedy, tokens_of

from pagedkv import LLM
from pagedkv.core import CheckLevel
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import ConfigError, InvariantError, StepError
from pagedkv.models import ModelRunner
from pagedkv.testing.models import tiny_model

LEVELS: tuple[CheckLevel, ...] = ("off", "step", "audit")
Texts = dict[str, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def plain_runner() -> ModelRunner:
    """With a backend that poisons nothing by itself."""
    return ModelRunner(tiny_model("llama"), block_size=4)


def work(engine: Engine) -> Texts:
    """Forks, shared prefixes and too few blocks, an abort, a preemption and a purge."""
    for index, prompt in enumerate((*PROMPTS, PROMPTS[2])):
        engine.add_request(str(index), prompt, greedy(8, n=2 if index == 1 else 1))
    texts: Texts = {}
    for number in range(200):
        if not engine.has_unfinished:
            return texts
        texts.update((output.request_id, tokens_of(output)) for output in engine.step() if output.finished)
        engine.check()
        if number == 3:
            engine.abort("3")
            engine.preempt("0")
            engine.purge_cache()
    raise AssertionError("no end in sight")


def test_check_level_is_the_configs_and_unknown_ones_are_refused(plain_runner: ModelRunner) -> None:
    for make in (lambda: EngineConfig(num_blocks=8, check="all"), lambda: LLM(plain_runner.model, check="all", num_blocks=8)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="check is 'all': it must be one of off, step, audit"):
            make()


def test_check_level_healthy_work_gives_the_same_tokens(plain_runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    texts = {}
    for level in LEVELS:
        engine = Engine(plain_runner, EngineConfig(num_blocks=11, max_num_batched_tokens=9, check=level))
        texts[level] = work(engine)
        now = engine.statistics()
        assert min(now.num_preemptions, now.cache.num_copies, now.cache.groups[0].num_evicted) > 0
    assert texts["off"] == texts["step"] == texts["audit"]
    assert texts["off"]["2"] == [references[PROMPTS[2]][:8]]


def test_check_level_reaches_the_llm(plain_runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    with LLM(plain_runner.model, block_size=4, check="audit") as llm:
        (output,) = llm.generate([list(PROMPTS[0])], greedy(8), use_tqdm=False)
        assert output.outputs[0].token_ids == references[PROMPTS[0]][:8]
        assert llm.engine.storage.layers[0].key[-1].isnan().all()


def finite_blocks(engine: Engine) -> list[int]:
    """Blocks of the first layer without any NaN, the null block left out."""
    key = engine.storage.layers[0].key
    return [block for block in range(1, len(key)) if not key[block].isnan().any()]


def test_audit_level_only_what_is_held_or_findable_is_readable_in_the_next_pass(plain_runner: ModelRunner) -> None:
    engine = Engine(plain_runner, EngineConfig(num_blocks=20, check="audit"))
    engine.add_request("it", tuple(range(20, 30)), greedy(7))
    engine.step()
    assert finite_blocks(engine) == [1, 2], "the third is not full, and the others are free"
    engine.abort("it")
    engine.add_request("next", (50,), greedy(8))
    engine.step()
    assert finite_blocks(engine) == [1, 2], "both can still be found"
    assert engine.storage.layers[0].key[3, :, 1:].isnan().all()
    engine.purge_cache()
    engine.step()
    assert finite_blocks(engine) == []
    assert (engine.storage.layers[0].key[0] == 0).all(), "the null block holds zeros for ever"


def test_audit_level_block_handed_out_after_eviction_holds_nothing_of_before(plain_runner: ModelRunner) -> None:
    for level, stale in (("step", True), ("audit", False)):
        engine = Engine(plain_runner, EngineConfig(num_blocks=4, max_model_len=12, check=level))  # type: ignore[arg-type]
        engine.add_request("before", tuple(range(8)), greedy(4))
        while engine.has_unfinished:
            engine.step()
        engine.add_request("after", tuple(range(50, 59)), greedy(3))
        engine.step()
        (table,) = engine.snapshot().sequences[0].block_tables
        rest = engine.storage.layers[0].key[table[-1], :, 1:]
        assert bool(rest.isfinite().all()) is stale, level
        assert bool(rest.isnan().all()) is not stale, level


def test_audit_level_failed_step_is_undone_and_tried_again(references: dict[Prompt, tuple[int, ...]]) -> None:
    backend = FailingBackend(MemoryError("full"))
    engine = Engine(ModelRunner(tiny_model("llama"), backend=backend, block_size=4), EngineConfig(num_blocks=11, check="audit"))
    engine.add_request("fork", PROMPTS[2], greedy(6, n=2))
    texts: Texts = {}
    failures = 0
    while engine.has_unfinished:
        if failures < 6:
            backend.arm(failures)
        try:
            texts.update((output.request_id, tokens_of(output)) for output in engine.step() if output.finished)
        except StepError:
            failures += 1
    assert failures == 4, "each of two layers writes and attends"
    assert texts == {"fork": [references[PROMPTS[2]][:6]] * 2}


@pytest.mark.parametrize("level", LEVELS)
def test_check_level_broken_invariant_comes_from_the_step_that_meets_it(plain_runner: ModelRunner, level: CheckLevel) -> None:
    engine = Engine(plain_runner, EngineConfig(num_blocks=20, check=level))
    engine.add_request("it", PROMPTS[2], greedy(6))
    engine.step()
    table = engine._manager.table
    table.num_published[0] += 3  # no query of the step path looks at it before the next block is full
    if level == "off":
        engine.step()
        return
    with pytest.raises(InvariantError, match=r"row 0: \d blocks (of 4 are )?published"):
        engine.step()
    assert engine.snapshot().sequences[0].num_published_blocks == 8, "it is left as it was found"
    assert "admitted" in engine.explain("it")
    engine.close()


def test_audit_level_stale_table_entry_reads_poison_and_names_both_places(plain_runner: ModelRunner) -> None:
    engine = Engine(plain_runner, EngineConfig(num_blocks=20, check="audit"))
    for name, prompt in (("gone", PROMPTS[0]), ("stays", PROMPTS[4])):
        engine.add_request(name, prompt, greedy(6))
    engine.step()
    rows = {name: engine._scheduler.record(name).branches[0].row for name in ("gone", "stays")}  # type: ignore[union-attr]
    block = int(engine._manager.table.block_tables[0, rows["gone"], 1])
    aborted = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    engine.abort("gone")  # lets go of its half-full block
    engine.step()
    key, _ = engine.storage.gather(0, [block], 1)
    assert torch.isnan(key).all()
    engine._manager.table.block_tables[0, rows["stays"], 1] = block
    with pytest.raises(InvariantError) as caught:
        engine.step()
    used, freed = caught.value.__notes__
    inside = rf"at pagedkv{re.escape(os.sep)}scheduling{re.escape(os.sep)}\w+\.py:\d+, called at {re.escape(__file__)}:"
    assert re.fullmatch(rf"found after \w+ {inside}{caught.traceback[0].lineno + 1}", used)
    assert re.fullmatch(rf"group 0: block {block}, which rows \[{rows['stays']}\] list, was let go of by release {inside}{aborted}", freed)
