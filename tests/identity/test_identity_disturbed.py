"""Tokens never change, whatever happens to a request or its neighbours, at whichever step it happens."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from identity_support import INTRUDER, PROMPTS, Disturb, hash_runner, new_engine, params, run, tokens

from pagedkv.engine import Engine
from pagedkv.models import ModelRunner
from pagedkv.testing.models import tiny_model


def _steps(runner: ModelRunner) -> int:
    engine = new_engine(runner)
    run(engine)
    return engine.statistics().num_steps


def preempt(engine: Engine, name: str) -> None:
    engine.preempt(name)


def evict(engine: Engine, name: str) -> None:
    """Take its blocks away, and let a stranger have what they held before it comes back."""
    engine.preempt(name)
    engine.add_request("intruder", {"prompt_token_ids": INTRUDER, "cache_salt": "stranger"}, params(20), priority=-1)


def abort_neighbour(engine: Engine, name: str) -> None:
    engine.abort("neighbour" if name != "neighbour" else "long")


def purge(engine: Engine, name: str) -> None:
    engine.purge_cache("")


def preempt_and_purge(engine: Engine, name: str) -> None:
    engine.preempt(name)
    engine.purge_cache("")


DISTURBANCES: Mapping[str, Disturb] = {
    "preempted": preempt,
    "evicted": evict,
    "neighbour aborted": abort_neighbour,
    "purged": purge,
    "preempted and purged": preempt_and_purge,
}


@pytest.fixture(scope="module")
def tiny() -> ModelRunner:
    return ModelRunner(tiny_model("llama", num_hidden_layers=1), block_size=4)


def _disturbed_everywhere(runner: ModelRunner, disturbance: str, *, stride: int, num_blocks: int = 30) -> None:
    undisturbed = tokens(run(new_engine(runner)))
    for name in PROMPTS:
        for at in range(0, _steps(runner), stride):
            got = tokens(run(new_engine(runner, num_blocks), at=at, disturb=DISTURBANCES[disturbance], who=name))
            for other, expected in undisturbed.items():
                aborted = disturbance == "neighbour aborted" and other == ("neighbour" if name != "neighbour" else "long")
                if aborted:
                    expected = [full[: len(short)] for full, short in zip(expected, got[other], strict=False)]
                assert got[other] == expected, f"{other}, with {name} {disturbance} before step {at}"


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_hash_tokens_are_the_same_whatever_happens_at_any_step(disturbance: str) -> None:
    _disturbed_everywhere(hash_runner(), disturbance, stride=3, num_blocks=14)


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [14, 30])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_hash_tokens_are_the_same_whatever_happens_at_every_step(disturbance: str, num_blocks: int) -> None:
    _disturbed_everywhere(hash_runner(), disturbance, stride=1, num_blocks=num_blocks)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_model_tokens_are_the_same_whatever_happens_at_any_step(tiny: ModelRunner, disturbance: str, stride: int) -> None:
    _disturbed_everywhere(tiny, disturbance, stride=stride, num_blocks=14)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_model_outputs_are_bit_equal_whatever_lies_in_free_blocks(tiny: ModelRunner, poison: float) -> None:
    clean, poisoned = (run(new_engine(tiny, 14), poison=value) for value in (0.0, poison))
    for name, output in clean.items():
        assert poisoned[name].outputs == output.outputs, f"{name}: tokens or log-probabilities differ"
    assert set(clean) == set(PROMPTS)


def test_disturbances_do_what_they_say() -> None:
    for disturbance in ("preempted", "evicted", "preempted and purged"):
        engine = new_engine(hash_runner(), 14)
        run(engine, at=4, disturb=DISTURBANCES[disturbance], who="long")
        assert engine.statistics().num_preemptions > 0
    assert engine.statistics().cache.num_hit_tokens > 0
