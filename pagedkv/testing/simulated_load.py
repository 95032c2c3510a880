"""What a simulation draws: the engine's sizes, and the requests that come. Frozen values; the generator is passed in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pagedkv.core import Window
from pagedkv.engine_config import EngineConfig
from pagedkv.prompts import PromptDict
from pagedkv.sampling import SamplingParams
from pagedkv.scheduling import FirstComeFirstServed, LongestCachedPrefix, Priority, SchedulingPolicy

_SMALL_VOCABULARY = 3  # prompts repeat each other's tokens often
_FIRST_TOKEN = 5

POLICIES: MappingProxyType[str, SchedulingPolicy] = MappingProxyType(
    {
        "fcfs": FirstComeFirstServed(),
        "priority": Priority(),
        "prefix": LongestCachedPrefix(),
        "impatient prefix": LongestCachedPrefix(lookahead=3, patience=2),
    }
)


@dataclass(slots=True)
class SimulationReport:
    """What happened in one life: counts over the whole of it, and the hash of all plans in hexadecimal."""

    num_steps: int = 0
    num_ended: int = 0
    num_refused: int = 0
    num_aborted: int = 0
    num_errors: int = 0
    num_failed_steps: int = 0
    num_spoilt: int = 0
    num_purges: int = 0
    num_preemptions: int = 0
    num_hit_tokens: int = 0
    num_copies: int = 0
    num_evicted: int = 0
    peak_blocks: int = 0
    digest: str = field(default="")


@dataclass(frozen=True, slots=True)
class SimulationSetting:
    """An engine's sizes and the shape of its load; ``span`` is the virtual time in which requests arrive, a step takes 1."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark: float
    caching: bool
    policy: str
    span: float
    with_preemptions: bool
    greedy: bool
    windows: tuple[Window, ...]  # of layer groups beside the one that keeps everything
    window_blocks: tuple[int, ...]  # of their pools, the null block included

    @staticmethod
    def draw(
        rng: random.Random, *, num_blocks: int | None = None, block_size: int | None = None, greedy: bool = False
    ) -> SimulationSetting:
        """Sizes at the edge of what can run; what is given is kept. ``greedy`` is for real models, which have windows of their own."""
        size = rng.choice([1, 2, 4]) if block_size is None else block_size
        usual = 1 + -(-rng.choice([rng.randint(4, 24), rng.randint(24, 60), rng.randint(40, 120)]) // size)
        setting = SimulationSetting(
            num_blocks=usual if num_blocks is None else num_blocks,
            block_size=size,
            max_num_seqs=rng.randint(1, 6),
            max_num_batched_tokens=rng.choice([1, 2, 3, 5, 8, 64]),
            max_model_len=64,
            watermark=rng.choice([0.0, 0.01, 0.2]),
            caching=rng.random() < 0.8,
            policy=rng.choice(list(POLICIES)),
            span=rng.choice([1.0, 10.0, 60.0]),
            with_preemptions=rng.random() < 0.4,
            greedy=greedy,
            windows=(),
            window_blocks=(),
        )
        if greedy or rng.random() < 0.7:
            return setting
        windows = tuple(rng.choice([Window.sliding, Window.chunked])(rng.randint(1, 12)) for _ in range(rng.randint(1, 2)))
        # The null block, and what one sequence reads and writes, at least.
        blocks = tuple(1 + window.most_blocks(size) + rng.choice([0, 1, 4, 20]) for window in windows)
        return replace(setting, windows=windows, window_blocks=blocks)

    @property
    def capacity(self) -> int:
        """Tokens that the pool can hold."""
        return (self.num_blocks - 1) * self.block_size

    def engine_config(self) -> EngineConfig:
        """The same as the engine takes it."""
        return EngineConfig(
            num_blocks=[self.num_blocks, *self.window_blocks] if self.windows else self.num_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            enable_prefix_caching=self.caching,
            watermark=self.watermark,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a simulation; ``salt`` 0 is the common namespace."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[int, ...]
    n: int
    priority: int
    salt: int
    drawn: bool  # at random from the request's own seed, so that its continuations part; greedy otherwise
    prompt_logits: bool
    min_tokens: int

    def as_prompt(self) -> PromptDict:
        """As the engine takes it."""
        salt = str(self.salt) if self.salt else ""
        return {"prompt_token_ids": self.prompt, "cache_salt": salt, "priority": self.priority}

    def params(self, *, stops: bool = True) -> SamplingParams:
        """How its tokens are chosen; without stops for the tokens that could come."""
        return SamplingParams(
            temperature=1.0 if self.drawn else 0.0,
            seed=len(self.prompt),
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=list(self.stops) if stops else [],
            ignore_eos=True,
            n=self.n,
            prompt_logprobs=0 if self.prompt_logits else None,
        )

    def until_stop(self, tokens: Sequence[int]) -> list[int]:
        """Those of its tokens that come before it stops, the stop included."""
        for count, token in enumerate(tokens, start=1):
            if token in self.stops and count >= self.min_tokens:
                return list(tokens[:count])
        return list(tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of one continuation at its longest."""
        return len(self.prompt) + self.max_tokens


def draw_job(rng: random.Random, setting: SimulationSetting, name: str, known: Sequence[Sequence[int]], vocab_size: int) -> Job:
    """A request whose prompt begins, more often than not, as one that is known."""
    size = min(setting.block_size, 4)
    start = rng.choice(known) if known and rng.random() < 0.6 else ()
    fresh = [_FIRST_TOKEN + rng.randrange(_SMALL_VOCABULARY) for _ in range(rng.randint(1, 4 * size))]
    prompt = (*start[: rng.randint(0, min(len(start), 40))], *fresh)
    job = Job(
        name=name,
        prompt=prompt,
        max_tokens=rng.randint(1, 5 * size + 2),
        stops=tuple(rng.randrange(vocab_size) for _ in range(rng.choice([0, 0, 4]))),
        n=rng.choice([1, 1, 1, 2, 3]),
        priority=rng.randint(0, 3),
        salt=rng.choice([0, 0, 1]),
        drawn=not setting.greedy and rng.random() < 0.5,
        prompt_logits=rng.random() < 0.1,
        min_tokens=0,
    )
    if setting.greedy or not job.stops or rng.random() < 0.7:
        return job
    return replace(job, min_tokens=rng.randint(1, job.max_tokens))
