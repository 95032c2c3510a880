"""What is run in one cell of the grid: ragged prompts, forks, stop ids, random neighbours, latecomers and aborts, all at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from parity_cases import LARGE, Case
from parity_support import (
    MAX_NEW,
    TRUNK,
    Oracle,
    Prompt,
    assert_tokens,
    blocks_to_fit,
    expected,
    greedy,
    new_engine,
    poisoned_step,
)

from pagedkv.engine import Engine
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams
from pagedkv.scheduling import FirstComeFirstServed, LongestCachedPrefix, Priority, SchedulingPolicy

MAX_RUNNING = 6


@dataclass(frozen=True)
class Wanted:
    """One request: when it comes, and when it is aborted, in steps."""

    prompt: Prompt
    params: SamplingParams
    arrives: int = 0
    aborted: int | None = None
    priority: int = 0
    stream: bool = False


@dataclass(frozen=True)
class Tally:
    """What happened in one cell or in many."""

    cases: int = 0
    compared: int = 0
    preempted: int = 0
    hits: int = 0
    copies: int = 0
    steps: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass
class Sum:
    """What the cells of a run came to."""

    tally: Tally = field(default_factory=Tally)


def run_case(case: Case, oracle: Oracle) -> Tally:
    """Run a cell's workload and compare every greedy token with its reference."""
    rng = random.Random(case.seed)
    requests = _requests(case, oracle, rng)
    policy: SchedulingPolicy = rng.choice([FirstComeFirstServed(), Priority(), LongestCachedPrefix()])
    engine = new_engine(
        oracle,
        case.block_size,
        _num_blocks(case, requests),
        max_num_seqs=MAX_RUNNING,
        max_num_batched_tokens=case.budget,
        enable_prefix_caching=rng.random() < 0.75,
        watermark=rng.choice([0.0, 0.01]),
        policy=policy,
    )
    where = f"{case} (seed {case.seed}, {type(policy).__name__}, caching {engine.config.enable_prefix_caching})"
    ended = _drive(engine, requests)
    compared = sum(_compare(oracle, wanted, ended[str(index)], where) for index, wanted in enumerate(requests))
    statistics = engine.statistics()
    assert statistics.num_running == statistics.num_waiting == 0
    assert statistics.cache.groups[0].num_in_use == 0, f"{where}: blocks are held after the end"
    engine.close()
    cache = statistics.cache
    return Tally(1, compared, statistics.num_preemptions, cache.num_hit_tokens, cache.num_copies, statistics.num_steps)


def can_preempt(case: Case) -> bool:
    """Whether two requests can be in each other's way: alone, one always fits."""
    return case.pressure != "roomy" and min(case.budget, MAX_RUNNING) > 1


def _requests(case: Case, oracle: Oracle, rng: random.Random) -> list[Wanted]:
    """A pair that outgrows a small pool together, and around it some of every kind, in random order and at random times."""
    longest = max(oracle.lengths) if case.block_size == 64 else 40  # with large blocks only long prompts ever need a second one
    pair = [Wanted(oracle.prompt_of(length), greedy()) for length in ((61, 63) if case.block_size == 64 else (40, 3))]
    # The pair's prompts are nobody else's: a policy that prefers cached prompts would let others come between the two.
    plain = [prompt for prompt in oracle.prompts if len(prompt) <= longest and prompt not in (one.prompt for one in pair)]
    family = [prompt for prompt in oracle.family if len(prompt) <= longest + 1]
    rng.shuffle(plain)
    rng.shuffle(family)
    stop = rng.choice(oracle.reference(plain[0]).token_ids)
    noise = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=MAX_NEW, seed=rng.randrange(99))
    start = rng.randrange(20)
    others = [
        _fork(case, plain[1], rng),
        Wanted(family[0], greedy(max_tokens=rng.randint(2, MAX_NEW)), arrives=rng.randrange(40)),
        Wanted(plain[0], greedy(stop_token_ids=[stop]), arrives=rng.randrange(8)),
        Wanted(family[1], greedy(), arrives=start, aborted=start + rng.randrange(1, 15)),
        Wanted(plain[2], noise),
        Wanted(family[2], greedy(max_tokens=rng.randint(1, MAX_NEW)), arrives=rng.randrange(40)),
        *(Wanted(prompt, greedy(max_tokens=rng.randint(1, MAX_NEW)), stream=True) for prompt in plain[3:5]),
        Wanted(family[0], greedy(), arrives=rng.randrange(80)),
    ]
    others = others[:5] if case.budget == 1 else others  # one token a step takes long
    rng.shuffle(others)
    return pair + [replace(wanted, priority=rng.randrange(3)) for wanted in others]


def _fork(case: Case, prompt: Prompt, rng: random.Random) -> Wanted:
    """As many samples as run at once and fit the pool, as long as they fit."""
    arrives = rng.randrange(8)
    for n in range(min(3, case.budget), 1, -1):
        for new in range(MAX_NEW, 3, -1):
            wanted = Wanted(prompt, greedy(n=n, max_tokens=new), arrives)
            if case.pressure == "roomy" or _blocks_of(wanted, case.block_size) < _smallest(case):
                return wanted
    return Wanted(prompt, greedy(), arrives)


def _smallest(case: Case) -> int:
    """The least pool that takes the largest request of a cell."""
    return blocks_to_fit(case.block_size, TRUNK + MAX_NEW if case.block_size == 64 else 41 + MAX_NEW)


def _num_blocks(case: Case, requests: list[Wanted]) -> int:
    """Roomy: everything at once and more. Smallest: the largest request alone. Tight: a sixth more, at least a block."""
    if case.pressure == "roomy":
        return sum(_blocks_of(wanted, case.block_size) for wanted in requests) + len(requests) + 2
    least = _smallest(case)
    return least + max(1, least // 6) if case.pressure == "tight" else least


def _blocks_of(wanted: Wanted, size: int) -> int:
    prompt, new = len(wanted.prompt), wanted.params.max_tokens or 0
    alone = blocks_to_fit(size, prompt + new) - 1
    shared = (prompt - 1) // size if wanted.params.n > 1 else 0
    return max(alone, shared + wanted.params.n * (blocks_to_fit(size, prompt + new - 1) - 1 - shared))


def _drive(engine: Engine, requests: list[Wanted]) -> dict[str, RequestOutput]:
    ended: dict[str, RequestOutput] = {}
    step = 0
    last_arrival = max(wanted.arrives for wanted in requests)
    while step <= last_arrival or engine.has_unfinished:
        for index, wanted in enumerate(requests):
            if wanted.arrives == step:
                engine.add_request(str(index), wanted.prompt, wanted.params, stream=wanted.stream, priority=wanted.priority)
            if wanted.aborted == step:
                engine.abort(str(index))
        ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
        step += 1
        assert step < 100 * LARGE, "the requests do not come to an end"
    return ended


def _compare(oracle: Oracle, wanted: Wanted, output: RequestOutput, where: str) -> int:
    if not wanted.params.is_greedy:
        return 0
    assert wanted.aborted is not None or len(output.outputs) == wanted.params.n
    want = expected(oracle, wanted.prompt, wanted.params)
    for completion in output.outputs:
        what = f"{where}, {'aborted' if completion.finish_reason == 'abort' else 'finished'} sample {completion.index} of {wanted.params.n}"
        if completion.finish_reason == "abort":
            want = want[: len(completion.token_ids)]
        else:
            by_stop = want[-1] in (wanted.params.stop_token_ids or ())
            assert completion.finish_reason == ("stop" if by_stop else "length"), f"{what} for {completion.finish_reason}"
        assert_tokens(completion.token_ids, want, where=what, prompt=wanted.prompt)
    return len(output.outputs)
