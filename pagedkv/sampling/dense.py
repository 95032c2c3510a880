"""Operations over whole rows of logits, the only ones whose cost is the vocabulary's.

It owns where they run: numpy on the host, because its single-thread loops are several times faster there than torch's for the
same work, torch on any other device. It does not own any rule of sampling; what leaves it is small and on the host.

Every result for a row is a function of that row alone. Elementwise operations and maxima are so by nature. Sums are made so by
adding integers: `weights` rounds the exponentials down to whole numbers whose total fits the 53 bits of a float64, so any order of
summation, any batch and any device gives the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.plan import Int64Array

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

SUM_BLOCK = 256  # tokens per partial sum: a row of 49,152 has 192 of them, searched first
MAX_BLOCK = 64  # tokens per partial maximum at most
LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The tokens of each row that may survive its filters, row after row, ids ascending.

    Attributes:
        offsets: ``[R + 1]`` int64, row ``r`` holds ``offsets[r]:offsets[r + 1]``.
        ids: ``[C]`` int64 token ids.
        scores: ``[C]`` float32 their scores.
    """

    offsets: Int64Array
    ids: Int64Array
    scores: Float32Array


def argmax(x: Tensor) -> tuple[Int64Array, Float32Array]:
    """The best token of each row of ``[R, V]`` and its score; a row with a NaN has NaN as its score."""
    if x.device.type == "cpu":
        host = x.numpy()
        ids = host.argmax(axis=-1)
        return ids.astype(np.int64, copy=False), host[np.arange(len(host)), ids]
    device_ids = x.argmax(dim=-1)
    values = x.gather(1, device_ids[:, None])[:, 0]
    return device_ids.cpu().numpy(), values.cpu().numpy()


def maxima(x: Tensor) -> Float32Array:
    """The best score of each row of ``[R, V]``; NaN where the row has one."""
    result: Float32Array = x.amax(dim=-1).cpu().numpy()
    return result


def best_first(scores: Float32Array) -> Int64Array:
    """Indices of ``[C]`` scores without NaN, highest first, equals in the order given; one sort of 64-bit keys.

    A stable argsort of floats would say the same at several times the cost, because only plain sorts are vectorised.
    """
    bits = (0.0 - scores).view(np.int32).astype(np.int64)  # 0.0 - x: also makes one zero of both
    ascending = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats order like sign-magnitude integers
    keys = (ascending << 32) | np.arange(len(scores), dtype=np.int64)
    keys.sort()
    return keys & 0xFFFFFFFF


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A host array on ``device``; on the host the memory is shared."""
    return torch.from_numpy(array).to(device)


def weight_bits(vocab_size: int) -> int:
    """The exponent ``k`` of `weights`: with ``V * 2**k <= 2**53`` every sum over a row is exact."""
    return min(35, 53 - (vocab_size - 1).bit_length())


def host_weights(scores: Float32Array, best: float | Float32Array, vocab_size: int) -> Float64Array:
    """`weights` for a few scores on the host."""
    shares = np.exp(scores - best, dtype=np.float32) * np.float32(2.0 ** weight_bits(vocab_size))
    result: Float64Array = np.floor(shares).astype(np.float64)
    return result


def weights(x: Tensor, best: Float32Array) -> Tensor:
    """Unnormalised probabilities as whole numbers: ``floor(exp(x - best) * 2**k)``.

    Args:
        x: ``[R, V]`` float32 scores, on any device; not changed.
        best: ``[R]`` each row's maximum, finite.

    Returns:
        ``[R, V]`` float32 that holds integers from 0 to ``2**k``. What is less likely than ``2**-k`` times the best is 0.
    """
    result = x - to_device(best, x.device)[:, None]
    if result.device.type == "cpu":
        host = result.numpy()
        np.exp(host, out=host)
    else:
        result.exp_()
    return result.mul_(2.0 ** weight_bits(x.shape[1])).floor_()


def block_sums(w: Tensor) -> Float64Array:
    """Exact sums over blocks of `SUM_BLOCK` tokens: ``[R, ceil(V / SUM_BLOCK)]`` float64 on the host."""
    vocab_size = w.shape[1]
    whole = vocab_size // SUM_BLOCK * SUM_BLOCK
    wide = w.double()
    parts = [wide[:, :whole].view(len(wide), -1, SUM_BLOCK).sum(dim=-1)] if whole else []
    if whole < vocab_size:
        parts.append(wide[:, whole:].sum(dim=-1, keepdim=True))
    result: Float64Array = torch.cat(parts, dim=1).cpu().numpy()
    return result


def block_of(w: Tensor, blocks: Int64Array) -> Float64Array:
    """One block of each row of ``[R, V]``: ``[R, SUM_BLOCK]`` float64 on the host, 0 behind the vocabulary's end."""
    columns = blocks[:, None] * SUM_BLOCK + np.arange(SUM_BLOCK)
    inside = columns < w.shape[1]
    index = to_device(np.where(inside, columns, 0), w.device)
    values: Float64Array = w.gather(1, index).cpu().numpy().astype(np.float64)
    return np.where(inside, values, 0.0)


def top_floor(x: Tensor, top_k: Int64Array) -> Float32Array:
    """For each row a score that at least ``top_k`` of its tokens reach, close to the best such score.

    The k-th largest of the maxima of disjoint blocks is reached by k tokens in k blocks. Maxima are the cheapest pass over a row
    there is, so this leaves about k candidates without a sort or a partition of the vocabulary.

    Args:
        x: ``[R, V]`` scores.
        top_k: ``[R]`` int64, at least 1; beyond V is V.

    Returns:
        ``[R]`` float32 on the host; lowest float where a row has fewer usable tokens.
    """
    vocab_size = x.shape[1]
    wanted = np.minimum(top_k, vocab_size)
    size = max(1, min(MAX_BLOCK, vocab_size // (8 * int(wanted.max()))))
    num_blocks = vocab_size // size  # a rest behind the last whole block can only raise the true k-th score
    best = x[:, : num_blocks * size].view(len(x), num_blocks, size).amax(dim=-1).cpu().numpy()
    ordered = np.sort(best, axis=-1)
    floors: Float32Array = ordered[np.arange(len(ordered)), num_blocks - wanted]
    return np.maximum(floors, LOWEST)


def at_least(x: Tensor, floors: Float32Array) -> Candidates:
    """The tokens of each row whose score reaches the row's floor.

    Args:
        x: ``[R, V]`` contiguous scores.
        floors: ``[R]`` float32, finite, so that forbidden tokens (minus infinity) never come back.
    """
    num_rows, vocab_size = x.shape
    if x.device.type == "cpu":
        host = x.numpy()
        flat = np.flatnonzero(host >= floors[:, None])
        scores = host.reshape(-1)[flat]
    else:
        index = (x >= to_device(floors, x.device)[:, None]).flatten().nonzero()[:, 0]
        scores = x.flatten()[index].cpu().numpy()
        flat = index.cpu().numpy()
    starts = np.arange(num_rows + 1, dtype=np.int64) * vocab_size
    offsets = np.searchsorted(flat, starts).astype(np.int64)
    ids = flat - np.repeat(starts[:-1], np.diff(offsets))
    return Candidates(offsets=offsets, ids=ids, scores=scores)
