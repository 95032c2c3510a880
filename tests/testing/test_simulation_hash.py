"""The simulation over the hash model: what it reaches, that it repeats itself, and that its model notices a wrong slot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from warm_scripts import run_script

import pagedkv
from pagedkv.engine import Engine
from pagedkv.errors import InvalidRequestError
from pagedkv.testing.hash_model import HashModel, continuation, next_candidates, stamps
from pagedkv.testing.simulated_load import SimulationReport
from pagedkv.testing.simulation import simulate
from pagedkv.testing.violations import ViolationError

COUNTS = [name for name in SimulationReport.__slots__ if name != "digest"]
DIGESTS = "from pagedkv.testing.simulation import simulate; print([simulate(seed).digest for seed in range(8)])"


def test_simulated_lives_keep_every_promise_and_reach_what_they_are_for() -> None:
    totals: Counter[str] = Counter()
    for seed in range(45):
        report = simulate(seed)
        totals.update({name: getattr(report, name) for name in COUNTS})
    assert min(totals[name] for name in COUNTS) >= 10, f"the lives do not reach what they are for: {totals}"


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_many_simulated_lives_keep_every_promise(block: int) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        simulate(seed, num_requests=5 + seed % 20)


def test_same_seed_gives_the_same_plans_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "digests.py"
    script.write_text(f"{DIGESTS}; print(hash('a'))")
    done = run_script(script, folder=tmp_path, environment=os.environ, timeout_s=60)
    assert done.returncode == 0, done.stderr
    digests, hashed = done.stdout.splitlines()
    assert digests == str([simulate(seed).digest for seed in range(8)])
    assert int(hashed) != hash("a") or "PYTHONHASHSEED" in os.environ, "both hash alike, which may be why they plan alike"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "hash_seed"), [([], "random"), ([], "0"), ([], "1"), (["-O"], "random")])
def test_same_seed_gives_the_same_plans_in_every_interpreter(options: list[str], hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(pagedkv.__file__).parents[1])}
    command = [sys.executable, *options, "-c", DIGESTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([simulate(seed).digest for seed in range(8)])


def test_violation_names_seed_step_and_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "check", lambda engine: (_ for _ in ()).throw(RuntimeError("books are wrong")))
    with pytest.raises(ViolationError, match="audit: RuntimeError: books are wrong") as caught:
        simulate(3)
    assert caught.value.__notes__[0].startswith("seed 3, step 1, SimulationSetting(")


def test_hash_changes_with_every_stamp_its_place_and_the_length() -> None:
    history = stamps(np.zeros(9, dtype=np.int64), np.arange(9), np.arange(9) % 3)
    whole = next_candidates(history, 2**16)
    others = [np.delete(history, at) for at in range(9)] + [history[np.r_[:at, at + 1, at, at + 2 : 9]] for at in range(8)]
    others += [np.where(np.arange(9) == at, history ^ np.uint64(1), history) for at in range(9)]
    assert whole not in [next_candidates(other, 2**16) for other in others]
    assert whole != next_candidates(stamps(np.ones(9, dtype=np.int64), np.arange(9), np.arange(9) % 3), 2**16)
    assert len({tuple(continuation([5, token], 4, vocab_size=61)) for token in range(20)}) == 20


@pytest.mark.parametrize("options", [{"vocab_size": 0}, {"vocab_size": 2**17}, {"max_positions": 0}, {"max_positions": 2**24}], ids=str)
def test_hash_model_refuses_what_its_stamps_do_not_cover(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=r"vocab_size .* max_positions"):
        HashModel(**options)  # type: ignore[arg-type]
