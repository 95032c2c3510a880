"""What a manager must have in common with its reference, with the storage, and with itself. Questions only; owns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.core import KVCacheManager
from pagedkv.testing.reference_manager import ReferenceManager
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError


def compare_manager(manager: KVCacheManager, reference: ReferenceManager, *, turn: int = 0) -> None:
    """Compare tables, counts and accounts.

    Args:
        manager: the subject.
        reference: what it should be like.
        turn: one live sequence's prefix is looked up in each call; this number, modulo the sequences, chooses which.

    Raises:
        ViolationError: ``"reference"``; says which group and what differs.
    """
    seqs = reference.seqs
    handles = list(seqs)
    table = manager.table
    rows = manager.rows_of(handles)
    live = len(table.live_rows)
    counts = [column[rows].tolist() for column in (table.num_tokens, table.num_reserved, table.num_computed)]
    _same("live sequences", live, len(handles))
    for place, twin in enumerate(seqs.values()):
        got = (counts[0][place], counts[1][place], counts[2][place])
        _same(f"sequence {handles[place]}: known, reserved, computed", got, (len(twin.tokens), twin.reserved, twin.computed))
        _same(f"sequence {handles[place]}: tokens", table.token_ids[rows[place], : got[0]].tolist(), twin.tokens)
    for index, group in enumerate(manager.statistics().groups):
        twin_group = reference.groups[index]
        held = twin_group.held.values()
        _same(
            f"group {index}: free, evictable, in use, shared, cached, evicted",
            (group.num_free, group.num_evictable, group.num_in_use, group.num_shared, group.num_cached, group.num_evicted),
            (twin_group.free, len(twin_group.idle), len(held), sum(n > 1 for n in held), len(twin_group.cache), twin_group.num_evicted),
        )
        _compare_tables(manager, reference, index, rows.tolist())
    account = manager.statistics()
    _same(
        "tokens found, duplicates, copies, pins",
        (account.num_hit_tokens, account.num_deduplicated, account.num_copies, account.num_pins),
        (reference.num_hit_tokens, reference.num_deduplicated, reference.num_copies, len(reference.pins)),
    )
    if handles:
        twin = seqs[handles[turn % len(handles)]]
        expected = len(reference.match(twin.tokens, twin.name)[0]) * manager.block_size
        _same(f"tokens found of {twin.name!r} {twin.tokens}", manager.match(twin.tokens, twin.name).num_tokens, expected)


def _compare_tables(manager: KVCacheManager, reference: ReferenceManager, index: int, rows: list[int]) -> None:
    """Blocks have other names in the reference: the pairs of names must be one to one, and held by as many."""
    real: list[int] = []
    said: list[int] = []
    for row, twin in zip(manager.table.block_tables[index, rows].tolist(), reference.seqs.values(), strict=True):
        said += twin.tables[index]
        real += row[: len(twin.tables[index])]
    pairs = set(zip(real, said, strict=True))
    if not len(pairs) == len(set(real)) == len(set(said)):
        raise ViolationError("reference", f"group {index}: blocks {real} are shared in another way than {said}")


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise ViolationError("reference", f"{what}: {got}, expected {expected}")


def read_back(manager: KVCacheManager, reference: ReferenceManager, oracle: TokenOracle, waiting: Sequence[int]) -> None:
    """Let every sequence read its computed tokens through its tables, but for those that wait for their copies.

    Raises:
        ViolationError: ``"tokens"`` or ``"ownership"``, from ``TokenOracle.verify``, with a note that names the sequence.
    """
    readers = [(handle, twin) for handle, twin in reference.seqs.items() if handle not in waiting]
    rows = manager.rows_of([handle for handle, _ in readers])
    computed = manager.table.num_computed[rows].tolist()
    held = manager.table.num_blocks[rows].tolist()
    tables = manager.table.block_tables[:, rows].tolist()
    for place, (handle, twin) in enumerate(readers):
        stamps = oracle.stamps(twin.name, twin.tokens[: computed[place]])
        for group, table in enumerate(tables):
            try:
                oracle.verify(group, table[place][: held[place]], stamps)
            except ViolationError as error:
                error.add_note(f"read by sequence {handle}")
                raise


def disjoint_namespaces(manager: KVCacheManager, reference: ReferenceManager) -> None:
    """No block is in the tables of two namespaces; raises ``ViolationError`` of kind ``"ownership"``."""
    rows = manager.rows_of(list(reference.seqs))
    held = manager.table.num_blocks[rows].tolist()
    for group, tables in enumerate(manager.table.block_tables[:, rows].tolist()):
        owners: dict[int, str] = {}
        for table, count, twin in zip(tables, held, reference.seqs.values(), strict=True):
            for block in table[:count]:
                if owners.setdefault(block, twin.name) != twin.name:
                    raise ViolationError("ownership", f"group {group}: {owners[block]!r} and {twin.name!r} both hold block {block}")


def conserve_blocks(manager: KVCacheManager) -> None:
    """The classes of blocks sum to the pool, and slots hold no more tokens than fit; raises ``ViolationError`` of kind ``"accounting"``."""
    account = manager.statistics()
    for index, group in enumerate(account.groups):
        if group.num_free + group.num_evictable + group.num_in_use != group.num_blocks or group.num_shared > group.num_in_use:
            raise ViolationError("accounting", f"group {index}: the classes of blocks do not sum to the pool: {group}")
    if not 0 <= account.num_reserved_tokens <= account.num_reserved_slots:
        raise ViolationError("accounting", f"{account.num_reserved_tokens} tokens in {account.num_reserved_slots} slots")
