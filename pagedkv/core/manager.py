"""Every transaction over blocks, cached prefixes and sequences; the only writer of all three.

Owns the order of things: plan, then commit; publish last; copy before writing into what is shared. Knows no requests and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from pagedkv import checks
from pagedkv.core import auditing
from pagedkv.core.arguments import NO_TOKEN, as_counts, as_namespace, as_prompts, as_tokens
from pagedkv.core.cohort import Cohort
from pagedkv.core.eviction import EvictionPolicy
from pagedkv.core.geometry import MAX_BLOCKS, make_groups, parse_groups
from pagedkv.core.guard import CheckLevel, parse_check_level
from pagedkv.core.layer_group import LayerGroup
from pagedkv.core.matching import Match, find_prefix
from pagedkv.core.prefix_cache import Namespaces
from pagedkv.core.publication import Publication
from pagedkv.core.report import CacheStatistics, Snapshot
from pagedkv.core.reservations import Extension, Reservations
from pagedkv.core.retirement import Retirement, first_blocks
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.core.window import Window
from pagedkv.errors import ConfigError, InvalidRequestError, StaleHandleError, UnknownHandleError
from pagedkv.plan import Int32Array, Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """New sequences: ``seqs [S]`` int64 handles and ``num_cached_tokens [S]`` int32, their prefixes that need no computing."""

    seqs: Int64Array
    num_cached_tokens: Int32Array


class KVCacheManager:
    """Paged bookkeeping for many sequences: block tables, prefix sharing, copy-on-write.

    A sequence goes through ``open``, then rounds of ``extend`` (reserve slots for known tokens), the caller's forward pass, and
    ``complete`` (they are computed; full blocks become findable), then ``release``. Every command validates first, and happens whole or
    not at all.

    Args:
        num_blocks: blocks in each layer group's pool, the null block included; one number, or one for each group.
        windows: for each layer group how far back its layers look, or None for everything, as of the first group always. What is behind the
            window of all tokens to come is given back while a sequence runs, and its table lists the null block there. One group of
            everything when not given.
        block_size: tokens in a block, at least 1.
        max_num_seqs: sequences alive at once.
        max_seq_len: tokens in one sequence at most; when not given, the capacity of the largest pool of a group without a window.
        enable_prefix_caching: whether full blocks are published and matched.
        policy: makes the eviction policy for a pool of so many blocks; least recently used when not given.
        check: what is verified after every command, see ``CheckLevel``: ``"off"``, ``"step"`` (conservation laws) or ``"audit"``
            (everything). Where anything is, the object is a ``GuardedKVCacheManager``, whose commands raise ``InvariantError`` when they
            leave something broken.

    Raises:
        ConfigError: a size that cannot work, or an unknown level; names it.

    Example:
        >>> manager = KVCacheManager(num_blocks=9, block_size=4, max_num_seqs=2)
        >>> opened = manager.open([[5, 6, 7, 8, 9]])
        >>> manager.extend(opened.seqs, [5]).slot_mapping.tolist()
        [[4, 5, 6, 7, 8]]
        >>> manager.complete(opened.seqs, [1])
        >>> manager.match([5, 6, 7, 8, 2]).num_tokens
        4
    """

    _is_guarded: ClassVar[bool] = False

    def __new__(cls, *args: object, check: CheckLevel = "off", **options: object) -> Self:
        """The guarded form of the class where checks are wanted: where they are not, no command knows of them."""
        if parse_check_level(check) == "off":
            return super().__new__(cls)
        from pagedkv.core.guarded import guarded  # it derives from this class

        return super().__new__(guarded(cls))

    def __init__(
        self,
        *,
        num_blocks: int | Sequence[int],
        windows: Sequence[Window | None] | None = None,
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_seq_len: int | None = None,
        enable_prefix_caching: bool = True,
        policy: Callable[[int], EvictionPolicy] | None = None,
        check: CheckLevel = "off",
    ) -> None:
        sizes, self._windows = parse_groups(num_blocks, windows)
        block_size = checks.integer("block_size", block_size, least=1, most=MAX_BLOCKS)
        max_num_seqs = checks.integer("max_num_seqs", max_num_seqs, least=1, most=MAX_BLOCKS)
        enable_prefix_caching = checks.flag("enable_prefix_caching", enable_prefix_caching)
        if max_seq_len is not None:
            max_seq_len = checks.integer("max_seq_len", max_seq_len, least=1)
        if policy is not None and not callable(policy):
            raise ConfigError(f"policy is {checks.shown(policy)}: it must make an eviction policy for a number of blocks")
        self._groups = make_groups(sizes, self._windows, block_size=block_size, policy=policy)
        capacity = max(group.pool.num_usable for group in self._groups if group.window is None) * block_size
        limit = capacity if max_seq_len is None else min(max_seq_len, capacity)
        self._block_size = block_size
        if (check != "off") is not self._is_guarded:
            raise ConfigError(
                f"check is {check!r} in {type(self).__name__}(), whose caller did not choose it: check is the caller's argument"
            )
        self._check_level = check
        self._caching = enable_prefix_caching
        self._max_seq_len = limit
        self._table = SequenceTable(max_num_seqs, num_groups=len(sizes), block_size=block_size, max_blocks=-(-limit // block_size))
        self._namespaces = Namespaces()
        self._pins: dict[int, tuple[Int32Array, ...]] = {}
        self._next_pin = 1
        self._reservations = Reservations(self._table, self._groups, block_size=block_size)
        self._publication = Publication(self._table, self._groups, block_size=block_size)
        self._retirement = Retirement(self._table, self._groups, block_size=block_size) if any(self._windows) else None
        self._cohort: Cohort | None = None
        self._query_tokens = self._hit_tokens = 0

    # Questions: they change nothing.

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def num_groups(self) -> int:
        """Layer groups."""
        return len(self._groups)

    @property
    def windows(self) -> tuple[Window | None, ...]:
        """How far back the layers of each group look; None for everything."""
        return tuple(self._windows)

    @property
    def check_level(self) -> CheckLevel:
        """How closely the manager watches itself."""
        return self._check_level

    @property
    def prefix_caching(self) -> bool:
        """Whether full blocks are published and matched."""
        return self._caching

    @property
    def max_seq_len(self) -> int:
        """Tokens in one sequence at most."""
        return self._max_seq_len

    @property
    def max_num_seqs(self) -> int:
        """Sequences alive at once at most."""
        return self._table.max_num_seqs

    @property
    def num_free_seqs(self) -> int:
        """Sequences that could still be opened."""
        return self._table.num_free_rows

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out at all, in the smallest group."""
        return min(group.pool.num_usable for group in self._groups)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that could be handed out now, in the scarcest group."""
        return min(group.pool.num_available for group in self._groups)

    @property
    def usable_blocks(self) -> tuple[int, ...]:
        """Blocks that can be handed out at all, in each group."""
        return tuple(group.pool.num_usable for group in self._groups)

    @property
    def available_blocks(self) -> tuple[int, ...]:
        """Blocks that could be handed out now, in each group."""
        return tuple(group.pool.num_available for group in self._groups)

    def free_block_ids(self) -> tuple[Int32Array, ...]:
        """Per group the blocks that hold nothing, ascending: whatever is written there, nobody reads; O(blocks)."""
        return tuple(group.free_blocks() for group in self._groups)

    @property
    def table(self) -> SequenceTable:
        """The rows of all live sequences: to read, never to write."""
        return self._table

    def rows_of(self, seqs: Sequence[int] | Int64Array) -> Int64Array:
        """Rows of live handles, no repeats; raises ``UnknownHandleError`` or ``StaleHandleError``."""
        return self._table.rows_of(seqs)

    def match(self, token_ids: Sequence[int] | Int32Array, namespace: str = "") -> Match:
        """The longest cached prefix, in whole blocks; about 0.3 microseconds a block."""
        return self._match(as_tokens(token_ids), as_namespace(namespace))

    def num_held_blocks(self, match: Match) -> int:
        """Blocks of a match that somebody holds, so that sharing them makes none less available; in the group with the fewest."""
        return min(self.held_blocks(match))

    def held_blocks(self, match: Match) -> tuple[int, ...]:
        """Blocks of a match that somebody holds, in each group."""
        groups = zip(self._groups, match.block_ids, strict=True)
        return tuple(int(np.count_nonzero(group.pool.references[list(ids)])) for group, ids in groups)

    def num_blocks_needed(self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array) -> int:
        """Blocks that ``extend`` with the same arguments would take from each pool; raises what it would raise, but for lack of blocks."""
        rows, _, end = self._reservation(seqs, num_new_tokens)
        return int(self._reservations.missing_blocks(rows, end).sum()) + self._reservations.most_copies(rows)

    def num_exclusive_blocks(self, seqs: Sequence[int] | Int64Array) -> int:
        """Blocks that would become available if these sequences were released together, in the scarcest group; O(blocks they hold)."""
        rows = self.rows_of(seqs)
        freed = []
        for index, group in enumerate(self._groups):
            ids, counts = np.unique(self._table_ids(index, rows), return_counts=True)
            freed.append(int((group.pool.references[ids] == counts).sum()))
        return min(freed)

    # Commands.

    def open(
        self, prompts: Sequence[Sequence[int] | Int32Array], namespaces: Sequence[str] | None = None, *, use_cache: bool = True
    ) -> Opened:
        """Start sequences; cached prefixes are shared at once, nothing else is allocated.

        At least the last token of a prompt is left to compute, since its logits are wanted.

        Args:
            prompts: known tokens of each sequence, at least one; ids from 0.
            namespaces: who may share with whom, one for each prompt; ``""`` for all when not given.
            use_cache: whether cached prefixes are looked for; False when the logits of every prompt token are wanted.

        Raises:
            InvalidRequestError: an empty or too long prompt, a negative id, too few rows left, lists of different lengths.

        Cost: O(prompt tokens).
        """
        self._table.change.check()
        tokens, names = as_prompts(prompts, namespaces)
        use_cache = checks.flag("use_cache", use_cache, error=InvalidRequestError)
        self._check_open(tokens)
        caching = self._caching and use_cache
        matches = [self._match(prompt[:-1], name) if caching else None for prompt, name in zip(tokens, names, strict=True)]
        self._cohort = None  # the table may have to grow
        with self._table.change:
            rows, seqs = self._table.open_rows(len(tokens))
            cached = np.zeros(len(tokens), dtype=np.int32)
            for index, (row, prompt, name, match) in enumerate(zip(rows.tolist(), tokens, names, matches, strict=True)):
                self._table.ensure_columns(len(prompt))
                self._table.token_ids[row, : len(prompt)] = prompt
                self._table.num_tokens[row] = len(prompt)
                self._table.roots[row] = self._namespaces.intern(name) if self._caching else 0
                if match is not None:
                    cached[index] = match.num_tokens
                    self._query_tokens += len(prompt)
                    self._adopt(row, match)
            if self._namespaces.crowded:
                self._sweep_namespaces()
            return Opened(seqs, cached)

    def extend(self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array) -> Extension:
        """Reserve slots for the next known tokens of many sequences at once.

        All or nothing: when this raises, no state has changed.

        Args:
            seqs: ``[S]`` live handles, no repeats.
            num_new_tokens: ``[S]`` int32 tokens (not blocks) to store next, each at least 1 and known already; or one number for all.

        Returns:
            Slots in sequence order, ``T = num_new_tokens.sum()``, and the blocks to copy before anything is written.

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle.
            InvalidRequestError: a count below 1, or more tokens than are known.
            OutOfBlocksError: fewer blocks than needed even after evicting all that is evictable; carries both counts.

        Cost: a fixed number of array operations plus O(blocks added); the fewest where one token is asked for with the same frozen array of
        handles step after step.
        """
        if type(num_new_tokens) is not int or num_new_tokens != 1:
            self._cohort = None
            self._table.change.check()
            return self._reservations.grow(*self._reservation(seqs, num_new_tokens))
        cohort, self._cohort = self._cohort, None  # forgotten, should it not come through: the table alone is sure to be right then
        if cohort is None or not cohort.can_extend(seqs):
            return self._extend_by_one(seqs)
        extension = cohort.extend()
        self._cohort = cohort
        return extension

    def complete(self, seqs: Sequence[int] | Int64Array, next_token_ids: Sequence[int] | Int32Array | None = None) -> None:
        """Note that all reserved tokens are computed and publish the blocks that became full; append each sequence's next token.

        What is behind a group's window from now on is given back.

        Args:
            seqs: ``[S]`` live handles, no repeats.
            next_token_ids: ``[S]`` int32, a token that becomes known, or -1 for none.

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle.
            InvalidRequestError: a token below -1, or a sequence that has reached ``max_seq_len``.

        Cost: a fixed number of array operations plus about 1 microsecond for each block that became full.
        """
        cohort = self._cohort
        if cohort is not None and next_token_ids is not None and cohort.can_complete(seqs):
            tokens = as_counts(next_token_ids, len(seqs), "next_token_ids")
            if tokens.item(tokens.argmin()) > NO_TOKEN:
                self._cohort = None  # as in ``extend``
                cohort.complete(tokens)
                self._cohort = cohort
                return
        rows = self._rows_to_change(seqs)
        nexts = None if next_token_ids is None else self._check_next(rows, next_token_ids)
        table = self._table
        computed = table.num_reserved[rows]
        before = None if self._retirement is None else table.num_computed[rows]
        with self._table.change:
            table.num_computed[rows] = computed
            if table.some_copy_pending:
                table.clear_copies(rows)
            if nexts is not None:
                self._append_tokens(rows, *nexts)
            if self._caching:
                full = computed // self._block_size
                behind = (full > table.num_published[rows]).nonzero()[0]
                if len(behind):
                    self._publication.publish(rows[behind], full[behind])
            if before is not None and self._retirement is not None:
                self._retirement.give_back(rows, before // self._block_size, computed // self._block_size)

    def append(self, seqs: Sequence[int] | Int64Array, token_ids: Sequence[int] | Int32Array) -> None:
        """Make one more token of each sequence known without computing anything; arguments and errors as for ``complete``."""
        rows = self._rows_to_change(seqs)
        nexts = self._check_next(rows, token_ids)
        with self._table.change:
            self._append_tokens(rows, *nexts)

    def cancel(self, seqs: Sequence[int] | Int64Array) -> None:
        """Undo what ``extend`` reserved, because the step did not run to its end.

        A block copy that was planned may not have been made, so its tokens count as not computed any more.
        """
        rows = self._rows_to_change(seqs)
        table = self._table
        kept = table.num_computed[rows]
        kept = np.where(table.copy_pending[rows], kept // self._block_size * self._block_size, kept)
        with table.change:
            self._reservations.cut(rows, kept)

    def fork(self, seq: int, count: int) -> Int64Array:
        """Make ``count`` sequences that share all of a sequence's blocks; whoever writes into a shared block first gets a copy.

        Returns:
            ``[count]`` int64 new handles.

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle.
            InvalidRequestError: ``count`` below 1, too few rows left, or slots reserved that are not computed yet.

        Cost: O(count x blocks of the sequence); no block is copied or allocated.
        """
        count = checks.integer("fork count", count, least=1, error=InvalidRequestError)
        parent = self._rows_to_change([seq])
        (row,) = parent.tolist()
        table = self._table
        if count > table.num_free_rows:
            raise InvalidRequestError(f"{count} forks need {count} sequences and {table.num_free_rows} are left: raise max_num_seqs")
        if table.num_reserved[row] != table.num_computed[row]:
            raise InvalidRequestError(f"sequence handle {seq} has reserved slots: complete or cancel its step before forking it")
        with table.change:
            for index, group in enumerate(self._groups):
                group.pool.acquire(np.tile(self._table_ids(index, parent), count))
            rows, seqs = table.open_rows(count)
            table.block_tables[:, rows] = table.block_tables[:, row : row + 1]
            table.token_ids[rows] = table.token_ids[row]
            for column in (table.num_tokens, table.num_reserved, table.num_computed, table.num_blocks, table.num_published, table.roots):
                column[rows] = column[row]
            table.mark_tails_shared(np.append(rows, row))
            return seqs

    def truncate(self, seqs: Sequence[int] | Int64Array, num_tokens: Sequence[int] | Int32Array) -> None:
        """Forget the tokens behind the first ``num_tokens`` of each sequence, and give back the blocks that only they used.

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle.
            InvalidRequestError: a length below 1 or beyond what is known; or one behind which a window would need blocks that were given
                back, which is never so within the block that is being filled.
        """
        rows = self._rows_to_change(seqs)
        lengths = as_counts(num_tokens, len(rows), "num_tokens")
        known = self._table.num_tokens[rows]
        if len(rows) and (int(lengths.min()) < 1 or (lengths > known).any()):
            raise InvalidRequestError(
                f"cannot truncate to {lengths.tolist()} tokens: each must be from 1 to what is known, {known.tolist()}"
            )
        pending = self._table.copy_pending[rows]
        computed = self._table.num_computed[rows]
        computed = np.where(pending, computed // self._block_size * self._block_size, computed)
        kept = np.minimum(computed, lengths)
        if self._retirement is not None and self._retirement.is_gone(computed // self._block_size, kept // self._block_size):
            raise InvalidRequestError(
                f"cannot truncate to {lengths.tolist()} tokens: blocks behind a window would be needed again, which were given back"
            )
        with self._table.change:
            self._table.num_tokens[rows] = lengths
            self._reservations.cut(rows, kept)

    def release(self, seqs: Sequence[int] | Int64Array) -> None:
        """End sequences and let go of their blocks; published blocks stay findable until they are evicted.

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle; a second release is stale.
        """
        rows = self._rows_to_change(seqs)
        with self._table.change:
            for index, group in enumerate(self._groups):
                group.pool.release(self._table_ids(index, rows, tail_first=True))
            self._table.close_rows(rows)

    def pin(self, token_ids: Sequence[int] | Int32Array, namespace: str = "") -> tuple[int, int]:
        """Hold the cached prefix of these tokens, so that it cannot be evicted.

        Returns:
            a pin for ``unpin``, and how many tokens it holds.
        """
        self._table.change.check()
        match = self.match(token_ids, namespace)
        held = tuple(np.array(ids, dtype=np.int32) for ids in match.block_ids)
        self._cohort = None
        with self._table.change:
            for group, ids in zip(self._groups, held, strict=True):
                group.pool.acquire(ids)
            pin, self._next_pin = self._next_pin, self._next_pin + 1
            self._pins[pin] = held
            return pin, match.num_tokens

    def unpin(self, pin: int) -> None:
        """Let go of a pinned prefix.

        Raises:
            UnknownHandleError: never issued.
            StaleHandleError: let go of already.
        """
        self._table.change.check()
        pin = checks.integer("pin", pin, least=-(2**63), error=InvalidRequestError)
        if not 0 < pin < self._next_pin:
            raise UnknownHandleError(f"pin {pin} was never issued by this manager")
        if pin not in self._pins:
            raise StaleHandleError(f"pin {pin} was released")
        self._cohort = None
        with self._table.change:
            for group, ids in zip(self._groups, self._pins.pop(pin), strict=True):
                group.pool.release(ids[::-1])

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Names under which prefixes may be found."""
        return self._namespaces.names

    def purge(self, namespace: str = "") -> int:
        """Make everything that a namespace has published unfindable, for good; live sequences go on and publish no more.

        Returns:
            how many blocks were forgotten, over all groups. Cost: O(blocks).
        """
        self._table.change.check()
        root = self._namespaces.find(as_namespace(namespace))
        if root is None:
            return 0
        self._cohort = None
        with self._table.change:
            before = self._num_cached()
            for group in self._groups:
                if isinstance(group, LayerGroup):  # windowed groups follow
                    group.forget(group.cache.blocks_of(root))
            table = self._table
            mine = table.live_rows[table.roots[table.live_rows] == root]
            table.roots[mine] = 0
            table.num_published[mine] = 0
            self._namespaces.forget(namespace)
            return before - self._num_cached()

    def distrust(self, seqs: Sequence[int] | Int64Array) -> int:
        """Make the published blocks of these sequences unfindable, and all that continue them: what they hold may be wrong.

        Live sequences that hold any of them go on and publish no more.

        Returns:
            how many blocks were forgotten, over all groups. Cost: O(blocks).

        Raises:
            UnknownHandleError, StaleHandleError: naming the handle.
        """
        rows = self._rows_to_change(seqs)
        table, before = self._table, self._num_cached()
        with table.change:
            for tables, group in zip(table.block_tables, self._groups, strict=True):
                if isinstance(group, LayerGroup):  # windowed groups follow
                    published = [tables[row, : table.num_published[row]] for row in rows.tolist()]
                    group.forget(group.cache.continuations_of(np.concatenate([np.zeros(0, np.int32), *published])))
            public = table.live_rows[table.num_published[table.live_rows] > 0]
            # Chains are forgotten from their first block on, so who has any of them among its published ones has that one.
            doubtful = public[~self._groups[0].pool.is_cached(table.block_tables[0, public, 0])]
            table.roots[doubtful] = 0
            table.num_published[doubtful] = 0
            return before - self._num_cached()

    # Accounts.

    def statistics(self) -> CacheStatistics:
        """A frozen account; O(sequences + blocks)."""
        return CacheStatistics(
            block_size=self._block_size,
            groups=tuple(group.statistics() for group in self._groups),
            num_seqs=self.max_num_seqs - self.num_free_seqs,
            num_pins=len(self._pins),
            num_namespaces=len(self._namespaces),
            num_reserved_tokens=int(np.add.reduce(self._table.num_reserved)),
            num_reserved_slots=int(np.add.reduce(self._table.num_blocks)) * self._block_size,
            num_query_tokens=self._query_tokens,
            num_hit_tokens=self._hit_tokens,
            num_deduplicated=self._publication.num_deduplicated,
            num_copies=self._reservations.num_copies,
        )

    def snapshot(self) -> Snapshot:
        """All tables, copied out; O(everything)."""
        return Snapshot(self.statistics(), self._table.snapshots(), tuple(group.held_blocks() for group in self._groups))

    def check(self) -> None:
        """Verify every invariant of pools, caches and tables; O(everything).

        Raises:
            InvariantError: naming the first that is broken; ``pagedkv.core.auditing`` lists them. Or a command was stopped in the middle.
        """
        self._table.change.check()
        auditing.check(self._table, self._groups, self._pins)

    # How it is done.

    def _rows_to_change(self, seqs: Sequence[int] | Int64Array) -> Int64Array:
        """Rows of live handles, for a command that changes them: what the cohort has worked out ahead does not hold any more."""
        self._cohort = None
        self._table.change.check()
        return self.rows_of(seqs)

    def _extend_by_one(self, seqs: Sequence[int] | Int64Array) -> Extension:
        table, again = self._table, self._table.recognises(seqs)
        rows = self._rows_to_change(seqs)
        start = table.num_reserved[rows]
        if np.count_nonzero(start < table.num_tokens[rows]) != len(rows):
            self._refuse_reservation(rows, 1)
        if again and self._may_decode_together(rows, start):
            handles: Int64Array = seqs  # type: ignore[assignment]  # the table recognises nothing but arrays
            cohort = Cohort(
                handles,
                rows,
                table=table,
                reservations=self._reservations,
                publication=self._publication if self._caching else None,
                retirement=self._retirement,
                max_seq_len=self._max_seq_len,
            )
            if cohort.can_extend(seqs):
                extension = cohort.extend()
                self._cohort = cohort
                return extension
        return self._reservations.grow_by_one(rows, start)

    def _may_decode_together(self, rows: Int64Array, start: Int32Array) -> bool:
        """Whether all that these sequences know is computed, but for one token of each, and none of them has to copy its last block."""
        table = self._table
        ready = (table.num_computed[rows] == start) & (table.num_tokens[rows] == start + 1) & ~table.tail_shared[rows]
        return 0 < len(rows) == np.count_nonzero(ready)

    def _match(self, tokens: Int32Array, namespace: str) -> Match:
        root = self._namespaces.find(namespace)
        if root is None or not self._caching:
            return Match(0, tuple(() for _ in self._groups))
        return find_prefix(self._groups, root, tokens, block_size=self._block_size)

    def _check_open(self, prompts: list[Int32Array]) -> None:
        if len(prompts) > self.num_free_seqs:
            raise InvalidRequestError(f"{len(prompts)} sequences were asked for and {self.num_free_seqs} are left: raise max_num_seqs")
        for prompt in prompts:
            if not len(prompt):
                raise InvalidRequestError("a prompt is empty: it needs at least one token")
            if len(prompt) > self._max_seq_len:
                raise InvalidRequestError(f"a prompt has {len(prompt)} tokens, max_seq_len is {self._max_seq_len}")

    def _adopt(self, row: int, match: Match) -> None:
        """Share a matched chain with a new row."""
        count = match.num_tokens // self._block_size
        if not count:
            return
        self._hit_tokens += match.num_tokens
        for index, (group, ids) in enumerate(zip(self._groups, match.block_ids, strict=True)):
            blocks = np.array(ids, dtype=np.int32)
            group.pool.acquire(blocks)
            self._table.block_tables[index, row, count - len(ids) : count] = blocks
        self._table.num_blocks[row] = self._table.num_published[row] = count
        self._table.num_reserved[row] = self._table.num_computed[row] = match.num_tokens

    def _reservation(
        self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array
    ) -> tuple[Int64Array, Int32Array, Int32Array]:
        rows = self.rows_of(seqs)
        given = num_new_tokens if hasattr(num_new_tokens, "__len__") else [num_new_tokens] * len(rows)  # one number for all
        counts = as_counts(given, len(rows), "num_new_tokens")
        start = self._table.num_reserved[rows]
        if len(rows) and (int(counts.min()) < 1 or (counts > self._table.num_tokens[rows] - start).any()):
            self._refuse_reservation(rows, num_new_tokens)
        return rows, start, start + counts

    def _refuse_reservation(self, rows: Int64Array, asked: object) -> None:
        left = (self._table.num_tokens[rows] - self._table.num_reserved[rows]).tolist()
        raise InvalidRequestError(f"cannot reserve {asked} tokens: each must be from 1 to what is known and unreserved, {left}")

    def _check_next(self, rows: Int64Array, token_ids: Sequence[int] | Int32Array) -> tuple[Int32Array, Int32Array]:
        """The next tokens as an array, and how many each row knows before them."""
        tokens = as_counts(token_ids, len(rows), "next_token_ids")
        known = self._table.num_tokens[rows]
        if len(rows):
            if int(tokens.min()) < NO_TOKEN:
                raise InvalidRequestError(f"token id {int(tokens.min())} is below 0 (-1 stands for no token)")
            longest = int(known.max()) + 1
            if longest > self._max_seq_len and (known[tokens >= 0] >= self._max_seq_len).any():
                raise InvalidRequestError(f"a sequence has reached max_seq_len, {self._max_seq_len} tokens")
            self._table.ensure_columns(min(longest, self._max_seq_len))
        return tokens, known

    def _append_tokens(self, rows: Int64Array, tokens: Int32Array, known: Int32Array) -> None:
        some = tokens >= 0
        if np.count_nonzero(some) < len(some):
            rows, tokens, known = rows[some], tokens[some], known[some]
        self._table.token_ids.reshape(-1)[rows * self._table.token_ids.shape[1] + known] = tokens
        self._table.num_tokens[rows] = known + 1

    def _table_ids(self, index: int, rows: Int64Array, *, tail_first: bool = False) -> Int32Array:
        """The blocks that these rows hold in a group, one row after the other."""
        table = self._table.block_tables[index]
        step = -1 if tail_first else 1
        first = first_blocks(self._groups[index], self._table.num_computed[rows], self._block_size).tolist()
        places = zip(rows.tolist(), first, self._table.num_blocks[rows].tolist(), strict=True)
        return np.concatenate([np.zeros(0, np.int32), *(table[row, begin:end][::step] for row, begin, end in places)])

    def _num_cached(self) -> int:
        return sum(len(group.cache) for group in self._groups)

    def _sweep_namespaces(self) -> None:
        used = set(self._table.roots.tolist())
        used.update(*(group.cache.live_roots().tolist() for group in self._groups if isinstance(group, LayerGroup)))
        self._namespaces.sweep(used)
