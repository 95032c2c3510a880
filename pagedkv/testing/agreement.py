"""What a manager must have in common with its reference, with the storage, and with itself. Questions only; owns nothing.

A manager is read once, into a ``Snapshot`` that all questions share: reading it costs more than any of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import chain, combinations

from pagedkv.core import CacheStatistics, GroupStatistics, SequenceSnapshot, Snapshot
from pagedkv.testing.reference_manager import ReferenceManager
from pagedkv.testing.reference_pool import GONE, ReferencePool
from pagedkv.testing.reference_sequence import Twin
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError

Pairs = list[tuple[SequenceSnapshot, Twin]]


def pair(snapshot: Snapshot, reference: ReferenceManager) -> Pairs:
    """Each live sequence and what it should be like, in the order of the reference.

    Raises:
        ViolationError: ``"reference"``: other sequences are alive than should be.
    """
    found = {seq.seq: seq for seq in snapshot.sequences}
    if not found.keys() == reference.seqs.keys() or len(snapshot.sequences) != len(found):
        raise ViolationError("reference", f"live sequences: {sorted(found)}, expected {sorted(reference.seqs)}")
    return [(found[handle], twin) for handle, twin in reference.seqs.items()]


def compare_manager(snapshot: Snapshot, pairs: Pairs, reference: ReferenceManager) -> None:
    """Compare tables, counts and accounts.

    Args:
        snapshot: the subject.
        pairs: its sequences, as ``pair`` gives them.
        reference: what it should be like.

    Raises:
        ViolationError: ``"reference"``; says which group and what differs.
    """
    for seq, twin in pairs:
        if (seq.num_tokens, seq.num_reserved_tokens, seq.num_computed_tokens) != (len(twin.tokens), twin.reserved, twin.computed):
            raise ViolationError("reference", f"{seq} and {twin.reserved} reserved; expected {twin}")
        if list(seq.token_ids) != twin.tokens:
            raise ViolationError("reference", f"sequence {seq.seq}: tokens {seq.token_ids}, expected {twin.tokens}")
    account = snapshot.statistics
    for index, (group, expected) in enumerate(zip(account.groups, reference.groups, strict=True)):
        _compare_group(index, group, expected)
        _compare_tables(index, pairs)
    _compare_account(account, reference)


def _compare_group(index: int, group: GroupStatistics, reference: ReferencePool) -> None:
    held = list(reference.held.values())
    got = (group.num_free, group.num_evictable, group.num_in_use, group.num_shared, group.num_cached, group.num_evicted)
    num_shared = len(held) - held.count(1)
    expected = (reference.free, len(reference.idle), len(held), num_shared, len(reference.cache), reference.num_evicted)
    if got != expected:
        raise ViolationError("reference", f"group {index}: free, evictable, in use, shared, cached, evicted: {got}, expected {expected}")


def _compare_tables(index: int, pairs: Pairs) -> None:
    """Blocks have other names in the reference: the pairs of names must be one to one, and held by as many."""
    real: list[int] = []
    said: list[int] = []
    for seq, twin in pairs:
        real += seq.block_tables[index]
        said += twin.tables[index]
        if len(real) != len(said):
            raise ViolationError(
                "reference", f"group {index}: sequence {seq.seq} holds {seq.block_tables[index]}, not {twin.tables[index]}"
            )
    if not len(set(zip(real, said, strict=True))) == len(set(real)) == len(set(said)):
        raise ViolationError("reference", f"group {index}: blocks {real} are shared in another way than {said}")


def _compare_account(account: CacheStatistics, reference: ReferenceManager) -> None:
    got = (account.num_seqs, account.num_hit_tokens, account.num_deduplicated, account.num_copies, account.num_pins)
    counts = (reference.num_hit_tokens, reference.num_deduplicated, reference.num_copies)
    expected = (len(reference.seqs), *counts, len(reference.pins))
    if got != expected:
        raise ViolationError("reference", f"sequences, tokens found, duplicates, copies, pins: {got}, expected {expected}")


def read_back(pairs: Iterable[tuple[SequenceSnapshot, Twin]], oracle: TokenOracle, waiting: Container[int]) -> None:
    """Let every sequence read its computed tokens through its tables, but for those that wait for their copies.

    Raises:
        ViolationError: ``"tokens"`` or ``"ownership"``, from ``TokenOracle.verify``, with a note that names the sequence.
    """
    for seq, twin in pairs:
        if seq.seq in waiting:
            continue
        stamps = oracle.stamps(twin.name, twin.tokens[: seq.num_computed_tokens])
        for group, table in enumerate(seq.block_tables):
            try:
                oracle.verify(group, table, stamps, num_gone=twin.tables[group].count(GONE))
            except ViolationError as error:
                error.add_note(f"read by sequence {seq.seq}")
                raise


def disjoint_namespaces(pairs: Iterable[tuple[SequenceSnapshot, Twin]]) -> None:
    """No block is in the tables of two namespaces; raises ``ViolationError`` of kind ``"ownership"``."""
    owned: dict[str, list[SequenceSnapshot]] = {}
    for seq, twin in pairs:
        owned.setdefault(twin.name, []).append(seq)
    for (one, seqs), (other, rivals) in combinations(owned.items(), 2):
        for group in range(len(seqs[0].block_tables)):
            blocks = set(chain.from_iterable([seq.block_tables[group] for seq in seqs]))
            shared = blocks.intersection(chain.from_iterable([seq.block_tables[group] for seq in rivals]))
            if shared - {GONE}:
                raise ViolationError("ownership", f"group {group}: {one!r} and {other!r} both hold block {min(shared - {GONE})}")


def conserve_blocks(account: CacheStatistics) -> None:
    """The classes of blocks sum to the pool, and slots hold no more tokens than fit; raises ``ViolationError`` of kind ``"accounting"``."""
    for index, group in enumerate(account.groups):
        if group.num_free + group.num_evictable + group.num_in_use != group.num_blocks or group.num_shared > group.num_in_use:
            raise ViolationError("accounting", f"group {index}: the classes of blocks do not sum to the pool: {group}")
    if not 0 <= account.num_reserved_tokens <= account.num_reserved_slots:
        raise ViolationError("accounting", f"{account.num_reserved_tokens} tokens in {account.num_reserved_slots} slots")
