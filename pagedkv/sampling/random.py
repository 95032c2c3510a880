"""Random numbers without state: a number is a function of (seed, sample, position) and of nothing else.

The generator is SplitMix64: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
with the mixing constants of its published variant 13 (D. Stafford). It is a counter that goes through a strong mixer, so the
number at any position is reached at once, in any order, after a preemption as before it, alone or in a batch. Not for secrets.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the counter visits every state
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(z: UInt64Array) -> UInt64Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def stream(seed: int, index: int) -> int:
    """The generator's start for sample ``index`` of a request.

    Args:
        seed: the request's seed, taken modulo 2**64.
        index: which of the request's ``n`` samples, from 0.

    Returns:
        A start state for `uniforms`. Distinct indices of one seed have distinct starts.

    Cost: O(1).
    """
    start = _mix_int((seed + _GAMMA) & _MASK)
    return _mix_int((start + (index + 1) * _GAMMA) & _MASK)


def uniforms(streams: UInt64Array, positions: npt.NDArray[np.integer]) -> Float64Array:
    """One number in [0, 1) for each row, 53 bits each.

    Args:
        streams: ``[Q]`` uint64 from `stream`.
        positions: ``[Q]`` position of the token to draw within its sequence, from 0.

    Returns:
        ``[Q]`` float64: output ``positions[q]`` of the SplitMix64 generator that starts at ``streams[q]``.

    Cost: a fixed number of array operations.
    """
    counter = positions.astype(np.uint64) + np.uint64(1)
    z = _mix(streams + counter * np.uint64(_GAMMA))  # unsigned arrays wrap silently, as the method wants
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
