"""Judges a manager after every operation: which oracles are consulted, and what a refusal may not do.

Owns what was seen of the manager last. Gives no commands but those that must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from pagedkv.core import CheckLevel, KVCacheManager, Snapshot
from pagedkv.errors import InvalidRequestError, PagedKVError
from pagedkv.testing.agreement import compare_manager, conserve_blocks, disjoint_namespaces, pair, read_back
from pagedkv.testing.reference_manager import ReferenceManager
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError

ORACLES = ("audit", "reference", "tokens", "ownership")
LEVELS = get_args(CheckLevel)


class Judge:
    """The oracles for one manager.

    Nothing is judged by what has changed alone: an audit looks at every row, block and slot each time. It is quick because the manager is
    read once for all oracles, and because what was seen after an operation is what a refused command must leave behind in the next.

    Args:
        manager: the subject.
        reference: what it should be like.
        tokens: what was written into its blocks.
        check: a level; see ``ManagerDriver``.
        oracles: which of ``ORACLES`` an audit consults.

    Attributes:
        num_checks: rounds of the oracles.
        num_refusals: commands that were refused as they should be.

    Raises:
        InvalidRequestError: an unknown level or oracle.
    """

    def __init__(
        self, manager: KVCacheManager, reference: ReferenceManager, tokens: TokenOracle, *, check: str, oracles: Sequence[str]
    ) -> None:
        if check not in LEVELS or not set(oracles) <= set(ORACLES):
            raise InvalidRequestError(f"check is {check!r} and oracles are {list(oracles)}: choose from {LEVELS} and {ORACLES}")
        self.num_checks = self.num_refusals = 0
        self._manager, self._reference, self._tokens = manager, reference, tokens
        self._check, self._oracles = check, frozenset(oracles)
        self._seen: Snapshot | None = None  # how the last operation left the manager, if it was looked at

    def look(self) -> Snapshot:
        """Read the manager, because a command may have changed it."""
        self._seen = self._manager.snapshot()
        return self._seen

    def expect(self, error: type[PagedKVError], command: Callable[[], object]) -> PagedKVError:
        """Give a command that must be refused without a trace; returns the refusal.

        Raises:
            ViolationError: ``"refusal"``: it was not refused, or something is different from what was seen before.
        """
        before = self.look() if self._seen is None else self._seen
        try:
            command()
        except error as refusal:
            if self.look() != before:
                raise ViolationError("refusal", f"{type(refusal).__name__} was raised after a change: {refusal}") from refusal
            self.num_refusals += 1
            return refusal
        raise ViolationError("refusal", f"{error.__name__} was not raised")

    def agree(self, what: str, got: object, expected: object) -> None:
        """Compare answers, where the reference is consulted; raises ``ViolationError`` of kind ``"reference"``."""
        if got != expected and "reference" in self._oracles:
            raise ViolationError("reference", f"{what}: {got}, expected {expected}")

    def judge(self, *, waiting: Sequence[int] | None, has_stepped: bool) -> None:
        """Consult what the level asks for, after an operation.

        Args:
            waiting: sequences whose block copies may not have been made yet; None where no step waits for its forward pass.
            has_stepped: whether the operation has completed a step.

        Raises:
            ViolationError: an oracle objects.
            InvariantError: the manager's own check does.
        """
        if self._check == "audit":
            self.audit(waiting)
            return
        self._seen = None  # it will not be looked at after every operation
        if self._check == "step" and has_stepped:
            self.num_checks += 1
            snapshot = self._manager.snapshot()
            conserve_blocks(snapshot.statistics)
            read_back(pair(snapshot, self._reference), self._tokens, waiting or ())

    def audit(self, waiting: Sequence[int] | None) -> None:
        """Consult every oracle that is switched on; arguments and errors as for ``judge``."""
        self.num_checks += 1
        oracles, manager, reference = self._oracles, self._manager, self._reference
        if "audit" in oracles:
            manager.check()
        snapshot = self.look()
        pairs = pair(snapshot, reference)
        if "tokens" in oracles:
            if waiting is None:  # else a block of an aborted sequence is still to be written by the step
                for group, ids in enumerate(manager.free_block_ids()):
                    self._tokens.poison(group, ids.tolist())
            read_back(pairs, self._tokens, waiting or ())
        if "ownership" in oracles:
            disjoint_namespaces(pairs)
        if "reference" in oracles:
            compare_manager(snapshot, pairs, reference)
            self._look_up()

    def _look_up(self) -> None:
        """One sequence's prefix must be found as far as the reference finds it; the sequences take turns."""
        manager, seqs = self._manager, list(self._reference.seqs.values())
        if seqs:
            twin = seqs[self.num_checks % len(seqs)]
            expected = len(self._reference.match(twin.tokens, twin.name)[0]) * manager.block_size
            self.agree("tokens found of a live sequence", manager.match(twin.tokens, twin.name).num_tokens, expected)
