"""The simulation over a real transformer, with transformers' own ``generate`` for an oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from pagedkv.models import ModelRunner
from pagedkv.testing.models import tiny_model
from pagedkv.testing.simulated_load import Job
from pagedkv.testing.simulation import simulate_engine

MODEL = tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(MODEL, block_size=4)


@cache
def _generate(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    loop: Callable[..., Any] = MODEL.generate
    result = loop(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0)
    tokens: list[int] = result[0, len(prompt) :].tolist()
    return tokens


def alone(job: Job) -> list[list[int]]:
    return [_generate(job.prompt, job.max_tokens)] * job.n


def test_simulated_lives_over_a_transformer_give_the_tokens_of_generate(runner: ModelRunner) -> None:
    ended = sum(simulate_engine(seed, runner, alone).num_ended for seed in range(5))
    assert ended >= 10


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_simulated_lives_over_a_transformer_give_the_tokens_of_generate(runner: ModelRunner, block: int) -> None:
    for seed in range(100 + 10 * block, 110 + 10 * block):
        simulate_engine(seed, runner, alone)
