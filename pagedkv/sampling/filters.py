"""Which tokens top-k, top-p, min-p and typical-p leave, and which of them a random number picks.

It owns the rules and agrees with transformers' warpers on them. It does not own temperature (already divided out) nor the random
numbers. A token is picked by inverse CDF in token-id order over integer weights (see `dense`), so the pick for a row is the same
whichever path found it: alone or in a batch, over all tokens or over candidates.

No path sorts a vocabulary: candidates come from a bound that the filter itself gives, and only they are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagedkv.plan import BoolArray, Int64Array
from pagedkv.sampling import dense
from pagedkv.sampling.dense import Candidates, Float32Array, Float64Array

_SLACK = 1e-2  # in logits; bounds are widened by it so that rounding never loses a token, the rules decide exactly afterwards


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """The filter settings of ``R`` rows.

    Attributes:
        top_k: ``[R]`` int64, 0 is off.
        top_p: ``[R]`` float64 in (0, 1].
        min_p: ``[R]`` float64 in [0, 1].
        typical_p: ``[R]`` float64 in (0, 1].
    """

    top_k: Int64Array
    top_p: Float64Array
    min_p: Float64Array
    typical_p: Float64Array

    def take(self, index: npt.NDArray[np.integer]) -> Filters:
        """The settings of some rows."""
        return Filters(self.top_k[index], self.top_p[index], self.min_p[index], self.typical_p[index])

    def active(self) -> BoolArray:
        """``[R]``: rows that have any filter on."""
        return (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0) | (self.typical_p < 1.0)


def draw(x: Tensor, best: Float32Array, filters: Filters, uniforms: Float64Array) -> Int64Array:
    """One token for each row.

    Args:
        x: ``[R, V]`` float32 scores after temperature, contiguous; minus infinity is never drawn.
        best: ``[R]`` each row's maximum, finite.
        filters: the rows' settings.
        uniforms: ``[R]`` float64 in [0, 1).

    Returns:
        ``[R]`` int64 token ids.

    Cost: a few passes over the rows; candidates of filtered rows are sorted one row at a time.
    """
    result = np.empty(len(best), dtype=np.int64)
    active = filters.active()
    unfiltered = np.flatnonzero(~active)
    if unfiltered.size:
        result[unfiltered] = _draw_from_all(_rows(x, unfiltered), best[unfiltered], uniforms[unfiltered])
    chosen = np.flatnonzero(active)
    if chosen.size:
        survivors = survivors_of(_rows(x, chosen), best[chosen], filters.take(chosen))
        for row, (ids, weights) in zip(chosen, survivors, strict=True):
            result[row] = ids[_pick(weights, float(uniforms[row]))]
    return result


def survivors_of(x: Tensor, best: Float32Array, filters: Filters) -> list[tuple[Int64Array, Float64Array]]:
    """For each row the token ids, ascending, that its filters leave, and their integer weights.

    Args as `draw`. Every row has at least one survivor, its most likely token.
    """
    vocab_size = x.shape[1]
    totals = np.zeros(len(best), dtype=np.float64)
    by_mass = np.flatnonzero((filters.top_p < 1.0) & (filters.top_k == 0))
    if by_mass.size:
        totals[by_mass] = dense.block_sums(dense.weights(_rows(x, by_mass), best[by_mass])).sum(axis=1)
    candidates = dense.at_least(x, _floors(x, best, filters, totals))
    repeats = np.diff(candidates.offsets)
    weights = dense.host_weights(candidates.scores, np.repeat(best, repeats), vocab_size)
    result = []
    for row in range(len(best)):
        part = slice(candidates.offsets[row], candidates.offsets[row + 1])
        keep = _keep(candidates.scores[part], weights[part], filters, row=row, total=float(totals[row]))
        result.append((candidates.ids[part][keep], weights[part][keep]))
    return result


def top_candidates(x: Tensor, top_k: Int64Array) -> Candidates:
    """A superset of the ``top_k`` best tokens of each row of ``[R, V]``, ties with the last of them included."""
    return dense.at_least(x, dense.top_floor(x, top_k))


def _rows(x: Tensor, index: Int64Array) -> Tensor:
    return x if len(index) == len(x) else x[dense.to_device(index, x.device)]


def _floors(x: Tensor, best: Float32Array, filters: Filters, totals: Float64Array) -> Float32Array:
    """Scores below which no token of a row can survive. Top-k's goes first, because top-p's mass is counted after it."""
    floors = np.full(len(best), dense.LOWEST, dtype=np.float32)
    by_count, by_mass = filters.top_k > 0, filters.top_p < 1.0
    by_share = (filters.min_p > 0.0) & ~by_count & ~by_mass & (filters.min_p >= 1e-9)  # integer weights resolve no smaller share
    if by_share.any():
        floors[by_share] = best[by_share] + np.log(filters.min_p[by_share]) - _SLACK
    by_mass &= ~by_count
    if by_mass.any():
        # all tokens that are no likelier than a token of weight w hold at most V * w together: once that is within the mass
        # that top-p cuts off, the token is cut off
        vocab_size = x.shape[1]
        least = (1.0 - filters.top_p[by_mass]) * totals[by_mass] / vocab_size
        floors[by_mass] = best[by_mass] + np.log(least * 2.0 ** -dense.weight_bits(vocab_size)) - _SLACK
    if by_count.any():
        floors[by_count] = dense.top_floor(_rows(x, np.flatnonzero(by_count)), filters.top_k[by_count])
    return floors


def _keep(scores: Float32Array, weights: Float64Array, filters: Filters, *, row: int, total: float) -> BoolArray:
    """The rules for one row's candidates, in transformers' order."""
    keep = np.ones(len(scores), dtype=np.bool_)
    top_k, top_p, min_p = int(filters.top_k[row]), float(filters.top_p[row]), float(filters.min_p[row])
    if 0 < top_k < len(scores):
        keep = scores >= np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
    if top_p < 1.0:
        mass = total if top_k == 0 else float(weights[keep].sum())
        order = dense.best_first(scores)  # best first, equals by ascending id
        ordered = np.where(keep, weights, 0.0)[order]
        before = np.cumsum(ordered) - ordered
        keep[order] &= before < top_p * mass
    if min_p > 0.0:
        keep &= weights >= min_p * weights.max()
    if filters.typical_p[row] < 1.0:
        keep[keep] = _typical(scores[keep], float(filters.typical_p[row]))
    return keep


def _typical(scores: Float32Array, mass: float) -> BoolArray:
    """Locally typical sampling (Meister et al. 2022), as transformers decides it: nearest to the entropy first."""
    shifted = scores.astype(np.float64) - float(scores.max())
    log_p = shifted - np.log(np.exp(shifted).sum())
    p = np.exp(log_p)
    distance = np.abs(-log_p + (log_p * p).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < mass).sum()), len(order) - 1)
    keep: BoolArray = distance <= distance[order[last]]
    return keep


def _draw_from_all(x: Tensor, best: Float32Array, uniforms: Float64Array) -> Int64Array:
    """Inverse CDF over whole rows: first the block, then the token inside it; all sums are exact."""
    weights = dense.weights(x, best)
    sums = np.cumsum(dense.block_sums(weights), axis=1)
    targets = _target(uniforms, sums[:, -1])
    blocks = (sums <= targets[:, None]).sum(axis=1)
    rows = np.arange(len(best))
    before = np.where(blocks > 0, sums[rows, blocks - 1], 0.0)
    inside = np.cumsum(dense.block_of(weights, blocks), axis=1)
    tokens: Int64Array = blocks * dense.SUM_BLOCK + (inside <= (targets - before)[:, None]).sum(axis=1)
    return tokens


def _pick(weights: Float64Array, uniform: float) -> int:
    sums = np.cumsum(weights)
    target = _target(np.float64(uniform), sums[-1])
    return int(np.searchsorted(sums, target, side="right"))


def _target(uniforms: Float64Array | np.float64, totals: Float64Array | np.float64) -> Float64Array:
    """Which unit of the total weight is drawn; below the total even where the product rounds up to it."""
    result: Float64Array = np.minimum(np.floor(uniforms * totals), totals - 1.0)
    return result
