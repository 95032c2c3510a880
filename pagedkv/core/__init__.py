"""Who holds which block: numpy and the standard library, never torch.

Start with ``KVCacheManager``; the parts below it (``BlockPool``, ``PrefixCache``, ``SequenceTable``) stand alone as well.
"""

from pagedkv.core.block_pool import NULL_BLOCK, Allocation, BlockPool
from pagedkv.core.eviction import EvictionPolicy, LeastRecentlyUsed
from pagedkv.core.guard import CheckLevel
from pagedkv.core.guarded import GuardedKVCacheManager
from pagedkv.core.manager import KVCacheManager, Opened
from pagedkv.core.matching import Match
from pagedkv.core.prefix_cache import PrefixCache
from pagedkv.core.report import CacheStatistics, GroupStatistics, SequenceSnapshot, Snapshot
from pagedkv.core.reservations import Extension
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.core.window import Window

__all__ = [
    "NULL_BLOCK",
    "Allocation",
    "BlockPool",
    "CacheStatistics",
    "CheckLevel",
    "EvictionPolicy",
    "Extension",
    "GroupStatistics",
    "GuardedKVCacheManager",
    "KVCacheManager",
    "LeastRecentlyUsed",
    "Match",
    "Opened",
    "PrefixCache",
    "SequenceSnapshot",
    "SequenceTable",
    "Snapshot",
    "Window",
]
