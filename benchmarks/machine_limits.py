"""What the machine can do at best: bytes read in order and in scattered chunks, and multiplications, measured with torch.

These bound what attention can reach: decode by reading scattered blocks, prefill by multiplying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import timed

from pagedkv.storage.memory import zeros

CHUNK_NBYTES = (2_048, 4_096, 12_288)  # one head of a block is of such sizes
CHUNKS_A_SUM = 64
ORDER = 1_024  # of the multiplied matrices


@dataclass(frozen=True, slots=True)
class Limits:
    """The best of several repeats.

    Attributes:
        sequential: bytes a second, summed in order.
        scattered: bytes a second by size of chunk, in random order.
        multiply: floating point operations a second of a large product, by dtype.
    """

    sequential: float
    scattered: dict[int, float]
    multiply: dict[str, float]

    @classmethod
    def measure(cls, *, nbytes: int, repeats: int, dtypes: Sequence[str], generator: torch.Generator) -> Limits:
        """With as many threads as torch is set to use now.

        Args:
            nbytes: of the memory that is read; several times what the caches hold.
            repeats: of which the best counts.
            dtypes: of the products, by name.
            generator: of the random order.
        """

        def best(call: Callable[[], object]) -> float:
            return min(timed(call, repeats))

        memory = torch.ones(nbytes // 4)
        matrix = torch.rand(ORDER, ORDER, generator=generator)
        scattered = {size: memory.nbytes / best(_scattered(memory, size // 4, generator)) for size in CHUNK_NBYTES}
        multiply = {}
        for dtype in dtypes:
            factor = matrix.to(getattr(torch, dtype))
            multiply[dtype] = 2 * ORDER**3 / best(partial(torch.matmul, factor, factor))
        return cls(memory.nbytes / best(memory.sum), scattered, multiply)


def _scattered(memory: torch.Tensor, width: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """Reads each chunk once, adding up so many at a time that the sums stay in the cache: next to nothing is written."""
    rows = memory[: memory.numel() // width * width].view(-1, width)
    order = torch.randperm(rows.shape[0], generator=generator)
    starts = torch.arange(0, rows.shape[0], CHUNKS_A_SUM)
    return lambda: F.embedding_bag(order, rows, starts, mode="sum")


def scattered_reads(nbytes: int, count: int, *, chunk_nbytes: int, generator: torch.Generator) -> list[Callable[[], torch.Tensor]]:
    """``count`` calls, each of which reads memory of its own once, in chunks in random order, from the kind of pages that pools have.

    Args:
        nbytes: read by one call.
        count: of calls.
        chunk_nbytes: that lie side by side.
        generator: of the order.
    """
    width = chunk_nbytes // 4
    calls = []
    for _ in range(count):
        memory = zeros(nbytes // chunk_nbytes, width, dtype=torch.float32, device=torch.device("cpu"))
        calls.append(_scattered(memory.view(-1), width, generator))
    return calls
