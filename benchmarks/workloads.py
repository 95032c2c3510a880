"""The workloads that throughput and memory are measured on: lengths and random token ids, drawn from a seed, equal for everybody.

Owns what is asked for. Does not own who answers (``contestants.py``) nor any clock. Standard library only.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

NAMES = ("A", "B", "C", "D")
B_PROMPTS, B_OUTPUTS = (16, 512), (16, 256)
WORDING = 7_919  # prime, so that no small number of rewordings leads back


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once.

    Attributes:
        name: of ``NAMES``.
        title: what it is, for a table.
        prompts: token ids of each request.
        output_lens: new tokens of each request, exactly: the end of sequence is ignored.
        num_shared: leading prompt tokens that all requests have in common.
    """

    name: str
    title: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    num_shared: int = 0

    @property
    def num_requests(self) -> int:
        """How many there are."""
        return len(self.prompts)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests together."""
        return sum(map(len, self.prompts))

    @property
    def num_new_tokens(self) -> int:
        """New tokens of all requests together: what tokens per second count."""
        return sum(self.output_lens)

    @property
    def total_lens(self) -> tuple[int, ...]:
        """Tokens of each request at its end."""
        return tuple(len(prompt) + length for prompt, length in zip(self.prompts, self.output_lens, strict=True))

    def __str__(self) -> str:
        return f"{self.name} ({self.title}: {self.num_prompt_tokens:,} prompt + {self.num_new_tokens:,} new tokens)"


def workload(name: str, *, vocab_size: int, seed: int, quick: bool = False) -> Workload:
    """One of the four, or with ``quick`` a small one of the same shape.

    A: one stream. B: requests of very different lengths. C: a long shared prefix. D: long prompts.

    Args:
        name: of ``NAMES``.
        vocab_size: token ids are drawn below it.
        seed: of lengths and token ids.
        quick: a few short requests instead.

    Raises:
        ValueError: an unknown name.
    """
    rng = random.Random(f"{name}, {seed}")
    if name == "B":
        return _mixed(rng, 6 if quick else 64, vocab_size=vocab_size, shrink=8 if quick else 1)
    sizes = {"A": ((1, 0, 128, 256), (1, 0, 32, 12)), "C": ((32, 1024, 32, 32), (4, 64, 8, 4)), "D": ((8, 0, 4096, 64), (2, 0, 192, 4))}
    if name not in sizes:
        raise ValueError(f"workload {name!r} is unknown: use one of {', '.join(NAMES)}")
    requests, shared, own, new = sizes[name][quick]
    prefix = _tokens(rng, shared, vocab_size)
    prompts = tuple(prefix + _tokens(rng, own, vocab_size) for _ in range(requests))
    lengths = f"{shared:,} shared + {own:,}" if shared else f"{own:,}"
    title = f"{requests} request{'s' if requests > 1 else ''}, {lengths} prompt, {new} new"
    return Workload(name, title, prompts, (new,) * requests, num_shared=shared)


def reworded(work: Workload, number: int, *, vocab_size: int) -> Workload:
    """The same lengths and shared prefix with other tokens, so that nothing that was cached of the original serves it.

    Args:
        work: the original.
        number: each gives other tokens, 0 the original's.
        vocab_size: as the original was made with.
    """
    shift = number * WORDING
    prompts = tuple(tuple((token + shift) % vocab_size for token in prompt) for prompt in work.prompts)
    return replace(work, prompts=prompts)


def _mixed(rng: random.Random, requests: int, *, vocab_size: int, shrink: int) -> Workload:
    (short, long), (few, many) = B_PROMPTS, B_OUTPUTS
    pairs = [(_log_uniform(rng, short, long // shrink), _log_uniform(rng, few // shrink, many // shrink)) for _ in range(requests)]
    prompts = tuple(_tokens(rng, length, vocab_size) for length, _ in pairs)
    title = f"{requests} requests at once, prompts log-uniform {short}..{long // shrink}, outputs {few // shrink}..{many // shrink}"
    return Workload("B", title, prompts, tuple(length for _, length in pairs))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return int(low * math.exp(rng.random() * math.log(high / low)))


def _tokens(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(vocab_size), k=length))
