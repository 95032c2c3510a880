"""The load that every scheduler is measured under, and the loop that times it. Standard library only: rivals run it elsewhere.

``num_running`` requests of 32 to 48 prompt tokens are prefilled in one untimed step. Then every step decodes one token of each of them.
Every process is treated alike: one thread, the heap frozen once the scheduler stands (as a server does after start-up), the collector left
on, as many untimed steps as a block has tokens, a pool that is never short, no request that ends. The tokens that a model would return are
made outside the timed part, in the form that the scheduler under test wants.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
SHORTEST_PROMPT, LONGEST_PROMPT = 32, 48
WARMUP_STEPS = BLOCK_SIZE  # every sequence has then crossed a block boundary once


@dataclass(frozen=True, slots=True)
class Workload:
    """One point of the curve: how many sequences run, and for how many timed steps."""

    num_running: int
    steps: int
    seed: int

    @property
    def max_new_tokens(self) -> int:
        """More tokens than a request gets while it is measured, so that none ends."""
        return self.steps + WARMUP_STEPS + BLOCK_SIZE

    @property
    def max_model_len(self) -> int:
        """Longest sequence there can be, in tokens."""
        return LONGEST_PROMPT + self.max_new_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks for all sequences at their longest, and the null block."""
        return self.num_running * (self.max_model_len // BLOCK_SIZE + 1) + 1

    @property
    def num_prompt_tokens(self) -> int:
        """A token budget that takes all prompts in one step."""
        return self.num_running * LONGEST_PROMPT

    def prompts(self) -> list[list[int]]:
        """The prompts' token ids; equal for every scheduler."""
        rng = random.Random(self.seed)
        lengths = [rng.randint(SHORTEST_PROMPT, LONGEST_PROMPT) for _ in range(self.num_running)]
        return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]

    def sampled(self) -> random.Random:
        """A generator for the tokens that the absent model answers with."""
        return random.Random(self.seed + 1)


class DecodeHarness(Protocol):
    """A scheduler with its requests, about to decode. ``plan`` and ``complete`` are the timed part."""

    def prefill(self) -> None:
        """Submit all prompts and run the steps that compute them."""

    def plan(self) -> object:
        """Plan one decode step of every running request."""

    def answer(self, plan: object) -> object:
        """Make what a model would return for this plan; not timed."""

    def complete(self, plan: object, answer: object) -> None:
        """Take the sampled tokens in."""

    def num_running(self, plan: object) -> int:
        """Sequences that the plan decodes."""


def measure(workload: Workload, build: Callable[[Workload], DecodeHarness]) -> list[float]:
    """Seconds to plan and complete each decode step.

    Raises:
        RuntimeError: a step decoded other than ``num_running`` sequences; the figure would mean nothing.
    """
    harness = build(workload)
    gc.collect()
    gc.freeze()
    try:
        harness.prefill()
        seconds = [_step(harness, workload) for _ in range(WARMUP_STEPS + workload.steps)]
    finally:
        gc.unfreeze()
    return seconds[WARMUP_STEPS:]


def _step(harness: DecodeHarness, workload: Workload) -> float:
    began = perf_counter()
    plan = harness.plan()
    planned = perf_counter()
    if harness.num_running(plan) != workload.num_running:
        raise RuntimeError(f"the step decodes {harness.num_running(plan)} of {workload.num_running} sequences")
    answer = harness.answer(plan)
    resumed = perf_counter()
    harness.complete(plan, answer)
    return (planned - began) + (perf_counter() - resumed)


def report_main(
    description: str, *, available: Callable[[], str | None], version: Callable[[], str], times: Callable[[int, int, int], list[float]]
) -> None:
    """The command line of a rival's script: one JSON object on the last line of standard output."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--num-running", type=int, required=True, help="running sequences while timing")
    parser.add_argument("--steps", type=int, default=200, help="timed decode steps")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampled tokens")
    parser.add_argument("--path", help="folder to import the rival from, where it is not installed")
    args = parser.parse_args()
    if args.path is not None:
        sys.path.insert(1, args.path)
    missing = available()
    seconds = [] if missing is not None else times(args.num_running, args.steps, args.seed)
    print(json.dumps({"missing": missing, "version": "" if missing is not None else version(), "seconds": seconds}))
