"""A cache of blocks in a few lines, to compare the replay of a trace with."""

from __future__ import annotations

from collections import OrderedDict

from pagedkv.testing.traces import Trace


def lru_hit_rate(trace: Trace, num_blocks: int) -> float:
    """The few lines of a cache simulation: prefixes found, then all of the prompt used, its tail the longest ago."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in trace.requests:
        for number in request.hash_ids:
            if number not in cache:
                break
            hits += 1
        for number in reversed(request.hash_ids):
            cache[number] = None
            cache.move_to_end(number)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits / sum(len(request.hash_ids) for request in trace.requests)
