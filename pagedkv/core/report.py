"""What a manager says about itself: frozen statistics and a plain snapshot. Owns no state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Blocks of one layer group by class: ``num_free + num_evictable + num_in_use == num_blocks``, always.

    Attributes:
        num_blocks: blocks that can be handed out (without the null block).
        num_free: hold nothing.
        num_evictable: cached, held by nobody.
        num_in_use: held by a sequence or a pin.
        num_shared: of those in use, held more than once.
        num_cached: findable by content, held or not.
        num_evicted: cached blocks given away since the start.
    """

    num_blocks: int
    num_free: int
    num_evictable: int
    num_in_use: int
    num_shared: int
    num_cached: int
    num_evicted: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A frozen account of a manager.

    Attributes:
        block_size: tokens in a block.
        groups: one account for each layer group.
        num_seqs: live sequences.
        num_pins: live pins.
        num_namespaces: namespaces remembered.
        num_reserved_tokens: slots that sequences use or are about to use, counted once for each sequence.
        num_reserved_slots: slots in the sequences' blocks of the first group, counted once for each sequence; the difference is waste.
        num_query_tokens: prompt tokens looked up since the start.
        num_hit_tokens: of those, found; never more than ``num_query_tokens``.
        num_deduplicated: computed blocks that turned out to be cached already.
        num_copies: blocks copied before a write.
    """

    block_size: int
    groups: tuple[GroupStatistics, ...]
    num_seqs: int
    num_pins: int
    num_namespaces: int
    num_reserved_tokens: int
    num_reserved_slots: int
    num_query_tokens: int
    num_hit_tokens: int
    num_deduplicated: int
    num_copies: int

    @property
    def waste(self) -> float:
        """Share of reserved slots that hold no token, from 0 to 1."""
        return 1 - self.num_reserved_tokens / self.num_reserved_slots if self.num_reserved_slots else 0.0


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """One live sequence, copied out."""

    seq: int
    num_tokens: int
    num_reserved_tokens: int
    num_computed_tokens: int
    num_published_blocks: int
    token_ids: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    block_size: int

    def slots(self, group: int = 0) -> tuple[int, ...]:
        """The physical slot of every position that has one; in the null block where its block was given back behind a window."""
        table, size = self.block_tables[group], self.block_size
        return tuple(table[position // size] * size + position % size for position in range(self.num_reserved_tokens))

    def __str__(self) -> str:
        rows = [
            f"sequence {self.seq}: {self.num_tokens} tokens, {self.num_computed_tokens} computed, {self.num_published_blocks} blocks public"
        ]
        for group, table in enumerate(self.block_tables):
            rows.append(f"  group {group}, {len(table)} blocks of {self.block_size}: {' '.join(map(str, table))}")
        return "\n".join(rows)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a manager's tables at one moment, copied out: for reading, printing and comparing.

    Attributes:
        statistics: the account at the same moment.
        sequences: live sequences, by row.
        references: per group, ``(block_id, references)`` of every held block.
    """

    statistics: CacheStatistics
    sequences: tuple[SequenceSnapshot, ...]
    references: tuple[tuple[tuple[int, int], ...], ...]
