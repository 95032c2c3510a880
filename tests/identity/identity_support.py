"""A small fixed set of requests, run once in peace and once with a disturbance at a given step."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from pagedkv.engine import Engine, EngineConfig
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams
from pagedkv.testing.hash_model import HashModel

PROMPTS = {
    "long": (11, 23, 5, 42, 7, 8, 30, 12, 9, 33, 14),
    "twin": (11, 23, 5, 42, 7, 8, 30, 12, 9, 51),
    "forked": (3, 3, 3, 40, 41),
    "neighbour": (11, 23, 5, 42, 60, 2, 2),
}
INTRUDER = tuple(range(20, 50))
Disturb = Callable[[Engine, str], object]


def hash_runner() -> ModelRunner:
    """The hash model, as an engine takes it."""
    return cast("ModelRunner", HashModel(block_size=4))


def params(max_tokens: int = 6, n: int = 1) -> SamplingParams:
    drawn = {"temperature": 0.9, "seed": 3} if n > 1 else {"temperature": 0.0}
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n, logprobs=1, **drawn)  # type: ignore[arg-type]


def new_engine(runner: ModelRunner, num_blocks: int = 30) -> Engine:
    """An engine with the set submitted, that computes few tokens a step."""
    engine = Engine(runner, EngineConfig(num_blocks=num_blocks, max_num_batched_tokens=7, max_model_len=64), clock=lambda: 0.0)
    for name, prompt in PROMPTS.items():
        engine.add_request(name, list(prompt), params(n=2 if name == "forked" else 1))
    return engine


def run(
    engine: Engine, *, at: int = -1, disturb: Disturb | None = None, who: str = "", poison: float = float("nan")
) -> dict[str, RequestOutput]:
    """Step to the end with all free blocks poisoned, disturbed once, before step ``at``; the last output of each request."""
    ended: dict[str, RequestOutput] = {}
    step = 0
    engine.fill_free_blocks(poison)
    while engine.has_unfinished:
        if step == at and disturb is not None:
            disturb(engine, who)
            engine.fill_free_blocks(poison)
        ended.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.check()
        engine.fill_free_blocks(poison)
        step += 1
    return ended


def tokens(ended: dict[str, RequestOutput]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [each.token_ids for each in output.outputs] for name, output in ended.items() if name in PROMPTS}
