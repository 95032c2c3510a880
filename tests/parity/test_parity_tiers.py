"""Models that do not ask plain attention of transformers' interface: greedy tokens equal transformers', whatever the engine does."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
from parity_cases import LARGE, Case
from parity_support import Oracle, assert_tokens, generate, greedy, make_oracle
from parity_workload import can_preempt, run_case
from tier_models import ADAPTED, DENSE, EQUAL, GATHERED, tier_model

from pagedkv.engine import Engine, EngineConfig
from pagedkv.models import ModelRunner
from pagedkv.testing.models import TINY_MODELS, tiny_model

MODELS = (*ADAPTED, *DENSE, *EQUAL, *GATHERED)
OFTEN = ("bloom", "big_bird")  # in the grid
LIKE_OTHERS = ("falcon_rotary", "codegen", "gpt_neox_japanese", "xglm", "rembert", "megatron-bert", "deepseek_v2")
KINDS = {**dict.fromkeys(ADAPTED, "in place"), **dict.fromkeys(GATHERED, "gathered")}
NEW = 12


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in MODELS])
def test_one_small_pool_with_chunks_hits_forks_and_preemptions_gives_the_tokens_of_generate(name: str) -> None:
    model, rng = tier_model(name), random.Random(f"tiers {name}")
    shared = [rng.randrange(3, 97) for _ in range(10)]
    prompts = [(*shared, *(rng.randrange(3, 97) for _ in range(own))) for own in (1, 5, 9)]
    prompts += [tuple(rng.randrange(3, 97) for _ in range(length)) for length in (3, 17, 26)]
    config = EngineConfig(num_blocks=20, max_num_seqs=5, max_num_batched_tokens=13, max_model_len=64, check="audit")
    engine = Engine(ModelRunner(model, block_size=4), config)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, greedy(n=1 + (number == 1), max_tokens=NEW))
    ended = {}
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in engine.step() if output.finished)
    for number, prompt in enumerate(prompts):
        want = generate(model, prompt, max_new=NEW)
        assert len(ended[str(number)].outputs) == 1 + (number == 1)
        for completion in ended[str(number)].outputs:
            assert_tokens(completion.token_ids, want.token_ids, where=f"{name}, margin {want.margin:.1e}", prompt=prompt)
    statistics = engine.statistics()
    assert statistics.num_preemptions
    assert statistics.cache.num_hit_tokens
    assert statistics.cache.num_copies
    engine.close()


def _cases() -> list[object]:
    every = [Case(*setting) for setting in product(MODELS, (1, 4, 16), (1, 7, LARGE), ("tight", "smallest"))]
    often = [Case(model, 4, 7, "tight") for model in OFTEN]
    return [pytest.param(case, id=str(case), marks=() if case in often else pytest.mark.slow) for case in every]


@pytest.fixture(scope="module")
def tier_oracle_of() -> Callable[[str], Oracle]:
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(name, tier_model(name))
        return made[name]

    return get


@pytest.mark.parametrize("case", _cases())
def test_workload_of_the_grid_gives_the_tokens_of_generate(case: Case, tier_oracle_of: Callable[[str], Oracle]) -> None:
    oracle = tier_oracle_of(case.model)
    tally = run_case(case, oracle)
    assert oracle.runner(case.block_size).tier.layers[0] == KINDS.get(case.model, "dense")
    assert tally.compared >= 6
    if can_preempt(case):
        assert tally.preempted, f"{case} (seed {case.seed}): nothing was preempted, the case has lost its power"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY_MODELS, *ADAPTED])
def test_workload_of_the_grid_over_a_model_forced_dense_gives_the_tokens_of_generate(name: str) -> None:
    oracle = make_oracle(name, tiny_model(name) if name in TINY_MODELS else tier_model(name))
    oracle.runners[4] = ModelRunner(oracle.model, block_size=4, tier="dense")
    tally = run_case(Case(name, 4, 7, "tight"), oracle)
    assert tally.compared >= 6
    assert tally.preempted
