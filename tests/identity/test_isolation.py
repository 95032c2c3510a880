"""Two salts never meet, in blocks or in hits; the same test inside one salt finds both, so it would notice."""

from __future__ import annotations

import pytest
from identity_support import PROMPTS, hash_runner, params

from pagedkv.engine import Engine, EngineConfig
from pagedkv.outputs import RequestOutput

PROMPT = PROMPTS["long"]


def _blocks(engine: Engine, name: str) -> set[int]:
    handle = engine.sequence_of(name)
    return {block for each in engine.snapshot().sequences if each.seq == handle for table in each.block_tables for block in table}


@pytest.mark.parametrize("num_blocks", [40, 9], ids=["wide", "tight"])
@pytest.mark.parametrize("salts", [("a", "b"), ("a", ""), ("a", "a")])
def test_salts_share_no_block_and_no_hit_and_one_salt_shares_both(salts: tuple[str, str], num_blocks: int) -> None:
    engine = Engine(hash_runner(), EngineConfig(num_blocks=num_blocks, max_num_batched_tokens=5, max_model_len=32, watermark=0.0))
    names = ("first", "second")
    shared: set[int] = set()
    ended: dict[str, RequestOutput] = {}
    for name, salt in zip(names, salts, strict=True):
        engine.add_request(name, {"prompt_token_ids": PROMPT, "cache_salt": salt}, params())
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.check()
        if engine.statistics().num_running == 2:
            shared |= _blocks(engine, "first") & _blocks(engine, "second")
    one_salt = len(set(salts)) == 1
    assert bool(ended["second"].num_cached_tokens) == one_salt
    assert bool(engine.statistics().cache.num_hit_tokens) == one_salt or num_blocks == 9  # preempted, one may find its own again
    assert bool(shared) == one_salt
    assert ended["first"].outputs[0].token_ids == ended["second"].outputs[0].token_ids


@pytest.mark.parametrize(("again", "found"), [("a", True), ("b", False), ("", False)])
def test_ended_request_is_found_by_its_own_salt_only(again: str, found: bool) -> None:
    engine = Engine(hash_runner(), EngineConfig(num_blocks=40, max_model_len=32))
    for salt in ("a", again):
        engine.add_request("it", {"prompt_token_ids": PROMPT, "cache_salt": salt}, params())
        while engine.has_unfinished:
            outputs = engine.step()
    assert bool(outputs[-1].num_cached_tokens) == found
