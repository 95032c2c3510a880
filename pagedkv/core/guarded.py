"""A manager that verifies itself after every command: what ``KVCacheManager(check="step")`` and ``(check="audit")`` make.

Owns no rule of the books: every command is the plain manager's, with a guard behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import TypeVar, cast

from pagedkv.core.guard import AuditGuard, LawGuard
from pagedkv.core.manager import KVCacheManager, Opened
from pagedkv.core.reservations import Extension
from pagedkv.errors import InvariantError, PagedKVError, StaleHandleError
from pagedkv.plan import Int32Array, Int64Array

_Manager = TypeVar("_Manager", bound=KVCacheManager)
_SEQUENCE, _PIN = "sequence handle", "pin"


class GuardedKVCacheManager(KVCacheManager):
    """``KVCacheManager`` under a guard; made by ``KVCacheManager(check=...)``.

    After every command, also after one that was refused, the guard verifies the state. When it raises ``InvariantError``, the state stays
    as it was found, for ``snapshot``: nothing is undone.
    """

    _is_guarded = True

    @cached_property
    def _guard(self) -> LawGuard | AuditGuard:
        kind = AuditGuard if self.check_level == "audit" else LawGuard
        return kind(self._table, self._groups, self._pins)

    def take_stale_blocks(self) -> tuple[Int32Array, ...]:
        """Per group ``[n]`` int32 blocks that hold nothing valid any more and were not given by the last call; at level ``"audit"``.

        To be overwritten, so that whoever reads them is found out. Block copies that were planned may still have to read them.
        """
        return self._guard.take_stale_blocks()

    def rows_of(self, seqs: Sequence[int] | Int64Array) -> Int64Array:
        """As the plain manager's; at level ``"audit"`` a stale handle's error names where it was released and where it is used."""
        try:
            return super().rows_of(seqs)
        except StaleHandleError as error:
            self._guard.explain(error, _SEQUENCE, map(int, seqs))
            raise

    def open(
        self, prompts: Sequence[Sequence[int] | Int32Array], namespaces: Sequence[str] | None = None, *, use_cache: bool = True
    ) -> Opened:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "open"):
            return super().open(prompts, namespaces, use_cache=use_cache)

    def extend(self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array) -> Extension:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "extend"):
            return super().extend(seqs, num_new_tokens)

    def complete(self, seqs: Sequence[int] | Int64Array, next_token_ids: Sequence[int] | Int32Array | None = None) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "complete"):
            super().complete(seqs, next_token_ids)

    def append(self, seqs: Sequence[int] | Int64Array, token_ids: Sequence[int] | Int32Array) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "append"):
            super().append(seqs, token_ids)

    def cancel(self, seqs: Sequence[int] | Int64Array) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "cancel"):
            super().cancel(seqs)

    def fork(self, seq: int, count: int) -> Int64Array:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "fork"):
            return super().fork(seq, count)

    def truncate(self, seqs: Sequence[int] | Int64Array, num_tokens: Sequence[int] | Int32Array) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "truncate"):
            super().truncate(seqs, num_tokens)

    def release(self, seqs: Sequence[int] | Int64Array) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "release"):
            super().release(seqs)
            self._guard.note_release(_SEQUENCE, map(int, seqs))

    def pin(self, token_ids: Sequence[int] | Int32Array, namespace: str = "") -> tuple[int, int]:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "pin"):
            return super().pin(token_ids, namespace)

    def unpin(self, pin: int) -> None:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "unpin"):
            try:
                super().unpin(pin)
            except StaleHandleError as error:
                self._guard.explain(error, _PIN, [pin])
                raise
            self._guard.note_release(_PIN, [pin])

    def purge(self, namespace: str = "") -> int:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "purge"):
            return super().purge(namespace)

    def distrust(self, seqs: Sequence[int] | Int64Array) -> int:
        """As the plain manager's, then verified."""
        with _Command(self._guard, "distrust"):
            return super().distrust(seqs)


def guarded(kind: type[_Manager]) -> type[_Manager]:
    """The guarded form of a manager class; of a class derived from ``KVCacheManager``, one that guards what that class makes of it."""
    if issubclass(kind, GuardedKVCacheManager):
        return kind
    if kind is KVCacheManager:
        return cast("type[_Manager]", GuardedKVCacheManager)
    return cast("type[_Manager]", type(f"Guarded{kind.__name__}", (GuardedKVCacheManager, kind), {}))


class _Command:
    """Verifies when a command has ended, or was refused; what broke off for another reason is not judged."""

    __slots__ = ("_guard", "_name")

    def __init__(self, guard: LawGuard | AuditGuard, name: str) -> None:
        self._guard, self._name = guard, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, PagedKVError) and not isinstance(error, InvariantError)):
            self._guard.after(self._name)
