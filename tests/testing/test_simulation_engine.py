"""The simulation over a real transformer, with transformers' own ``generate`` for an oracle."""

from __future__ import annotations

import pytest

from pagedkv.models import ModelRunner
from pagedkv.testing.alone import GenerateAlone
from pagedkv.testing.models import tiny_model
from pagedkv.testing.simulation import simulate_engine

MODEL = tiny_model("llama", num_hidden_layers=1)
ALONE = GenerateAlone(MODEL)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(MODEL, block_size=4)


def test_simulated_lives_over_a_transformer_give_the_tokens_of_generate(runner: ModelRunner) -> None:
    ended = sum(simulate_engine(seed, runner, ALONE).num_ended for seed in range(5))
    assert ended >= 10


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_simulated_lives_over_a_transformer_give_the_tokens_of_generate(runner: ModelRunner, block: int) -> None:
    for seed in range(100 + 10 * block, 110 + 10 * block):
        simulate_engine(seed, runner, ALONE)
