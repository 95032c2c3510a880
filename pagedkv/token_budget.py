"""How many tokens a step may compute, so that no step takes longer than running sequences are meant to wait: measured, not guessed.

Owns the measuring. Does not own the budget itself (``SchedulerConfig``), and decides nothing once an engine runs: its plans stay a
function of what is submitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pagedkv.checks import integer, number
from pagedkv.core import KVCacheManager
from pagedkv.errors import ConfigError, InvariantError
from pagedkv.lengths import Lengths
from pagedkv.models import ModelRunner
from pagedkv.plan import StepPlan
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig
from pagedkv.storage import BatchBuilder

_LEAST = 16  # tokens; below, a step costs hardly less
_LONGEST = 4096  # tokens of the prompt whose last step is timed
_TRIES = 3  # of a step that takes too long, before that is believed: other processes only ever make it longer


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What was measured.

    Attributes:
        max_num_batched_tokens: the largest number tried whose step took no longer than ``max_step_s``.
        max_step_s: as asked.
        prompt_len: tokens of the prompts whose last step was timed.
        steps: each number of tokens tried, ascending, with the seconds that its step took.
    """

    max_num_batched_tokens: int
    max_step_s: float
    prompt_len: int
    steps: tuple[tuple[int, float], ...]


def parse_max_step_s(value: object) -> float:
    """Seconds above 0; raises ``ConfigError``."""
    seconds = number("max_step_s", value, limit="a number of seconds above 0")
    if seconds <= 0:
        raise ConfigError(f"max_step_s is {seconds}: it must be a number of seconds above 0")
    return seconds


def measure_token_budget(
    runner: ModelRunner,
    *,
    max_step_s: float,
    max_num_batched_tokens: int = 2048,
    max_model_len: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TokenBudget:
    """Find how many tokens a step may compute here without taking longer than ``max_step_s``.

    Timed is the last step of a prompt of 4,096 tokens, or of the longest there may be, which reads all K/V before it; where more tokens are
    tried than that, several whole prompts. Tried are 16 and its doubles, up to the first that takes too long in each of three tries: far
    apart, so that the answer is mostly the same in the next process. Where it has to be, pass the number on instead.

    Args:
        runner: the model.
        max_step_s: seconds that a step may take. Running sequences get a token from each, so that they wait no longer for a prompt; what
            they take themselves comes on top, and steps of prompts beyond 4,096 tokens take longer.
        max_num_batched_tokens: the most.
        max_model_len: as in ``EngineConfig``.
        clock: seconds.

    Returns:
        the largest that is fast enough, for ``EngineConfig(max_num_batched_tokens=...)``, and what was measured.

    Raises:
        ConfigError: names the setting; even the smallest step takes longer, or no budget bounds the steps of this model: its prompts, or
            what its encoder reads, are computed in one piece.
        PoolAllocationError: no memory for the K/V of one such prompt, which are given back at the end.

    Cost: at most about ten times ``max_step_s``.
    """
    limit = parse_max_step_s(max_step_s)
    most = integer("max_num_batched_tokens", max_num_batched_tokens, least=1)
    if runner.encoder is not None or runner.recurrent_state == "whole":
        what = "prompts" if runner.encoder is None else "inputs of the encoder"
        raise ConfigError(f"max_step_s is {limit}, but {what} of {type(runner.model).__name__} are computed in one piece, however long")
    prompt_len = min(Lengths(runner, max_model_len).longest(is_far=False) - 1, _LONGEST)  # a token is wanted behind it
    steps: list[tuple[int, float]] = []
    found = 0
    for num_tokens in _candidates(most):
        seconds = _step_s(runner, num_tokens, prompt_len=prompt_len, enough=limit, clock=clock)
        steps.append((num_tokens, seconds))
        if seconds > limit:
            break
        found = num_tokens
    if not found:
        tokens, seconds = steps[0]
        raise ConfigError(f"max_step_s is {limit}: a step of {tokens} tokens behind {prompt_len} takes {seconds:.2g} seconds here")
    return TokenBudget(found, limit, prompt_len, tuple(steps))


def _candidates(most: int) -> Iterator[int]:
    num_tokens = _LEAST
    while num_tokens < most:
        yield num_tokens
        num_tokens *= 2
    yield most


def _step_s(runner: ModelRunner, num_tokens: int, *, prompt_len: int, enough: float, clock: Callable[[], float]) -> float:
    """Seconds of a step of so many tokens: of the first try that takes no more than ``enough``, else of the shortest."""
    plan = _last_full_step(runner, num_tokens, prompt_len)
    storage = runner.new_storage(int(plan.block_tables.max()) + 1, num_rows=int(plan.rows.max()) + 1)
    try:
        batch = BatchBuilder(runner.device, runner.block_size).build(plan)
        shortest = float("inf")
        for _ in range(_TRIES):
            began = clock()
            runner.forward(batch, storage).cpu()  # which waits for a device that works on its own
            shortest = min(shortest, clock() - began)
            if shortest <= enough:
                break
        return shortest
    finally:
        storage.close()


def _last_full_step(runner: ModelRunner, num_tokens: int, prompt_len: int) -> StepPlan:
    """The last step of a prompt, or the only one of several, as the scheduler plans it under a budget of ``num_tokens``; no step is run."""
    if num_tokens < prompt_len:
        lens = [prompt_len - prompt_len % num_tokens]
    else:
        lens = [prompt_len] * (num_tokens // prompt_len) + [num_tokens % prompt_len] * (num_tokens % prompt_len > 0)
    config = SchedulerConfig(max_num_seqs=len(lens), max_num_batched_tokens=num_tokens, watermark=0, recurrent_state=runner.recurrent_state)
    manager = KVCacheManager(
        num_blocks=1 + sum(-(-length // runner.block_size) + 1 for length in lens),
        block_size=runner.block_size,
        max_num_seqs=len(lens),
        max_seq_len=prompt_len + 1,
        enable_prefix_caching=False,
    )
    scheduler = Scheduler(manager, config)
    rng = np.random.default_rng(0)
    for index, length in enumerate(lens):
        scheduler.submit(Request(str(index), rng.integers(0, runner.num_token_ids, length, dtype=np.int32), max_tokens=1))
    plan = scheduler.plan()
    while plan is not None and not len(plan.sampling_seqs):
        scheduler.complete(plan, np.zeros(0, dtype=np.int32))
        plan = scheduler.plan()
    if plan is None or plan.num_tokens != num_tokens:
        raise InvariantError(f"prompts of {lens} tokens end with a step of {num_tokens}")
    return plan
