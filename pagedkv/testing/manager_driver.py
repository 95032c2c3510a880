"""Runs programs on a ``KVCacheManager``, beside its reference, over storage whose every slot says what was written into it.

Four oracles, each of which can be switched off to measure the others: ``audit`` (the manager's own ``check``), ``reference`` (the same
answers and the same shape as the dictionaries), ``tokens`` (what every sequence reads through its table) and ``ownership`` (no block in the
hands of two namespaces). Refusals are compared in any case, answers where ``reference`` is on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError, InvariantError, PagedKVError, StaleHandleError
from pagedkv.testing.judge import ORACLES, Judge
from pagedkv.testing.misuse import misuse
from pagedkv.testing.programs import (
    NAMES,
    NAMESPACES,
    Append,
    Cancel,
    Complete,
    Decode,
    Distrust,
    Extend,
    Fork,
    ManagerConfig,
    MatchPrefix,
    Misuse,
    Open,
    Operation,
    Pin,
    Program,
    Prompt,
    Purge,
    Release,
    Truncate,
    Unpin,
)
from pagedkv.testing.reference_manager import ReferenceManager
from pagedkv.testing.steps import Steps
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError


class ManagerDriver:
    """One manager under test, and all that is needed to judge it.

    Args:
        config: sizes of the manager.
        manager_factory: makes it, called with ``KVCacheManager``'s keyword arguments.
        check: ``"audit"`` consults the oracles after every operation; ``"step"`` reads the tokens and adds up the blocks after every
            completed step; ``"off"`` compares what commands return and refuse, and nothing else.
        oracles: which of ``ORACLES`` an audit consults.
        storage_factory: makes what the steps write into, called with the blocks of each group and the block size; a ``StorageOracle``
            lets a real ``KVStorage`` take part.

    Attributes:
        manager: the subject.
        reference: what it should be like; its sequences are the live ones, in the order in which operations count them.
        num_operations: operations performed.

    Raises:
        InvalidRequestError: an unknown level or oracle.
    """

    def __init__(
        self,
        config: ManagerConfig,
        *,
        manager_factory: Callable[..., KVCacheManager] = KVCacheManager,
        check: str = "audit",
        oracles: Sequence[str] = ORACLES,
        storage_factory: Callable[[Sequence[int], int], TokenOracle] = TokenOracle,
    ) -> None:
        self.config = config
        windows = [config.window(group) for group in range(len(config.num_blocks))]
        self.manager = manager_factory(
            num_blocks=list(config.num_blocks),
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_seq_len=config.max_seq_len,
            enable_prefix_caching=config.prefix_caching,
            **({"windows": windows} if any(windows) else {}),  # one that has no windows can still be tested without
        )
        self.reference = ReferenceManager(config.num_blocks, config.block_size, windows, prefix_caching=config.prefix_caching)
        self.tokens = storage_factory(config.num_blocks, config.block_size)
        self.num_operations = 0
        self._judge = Judge(self.manager, self.reference, self.tokens, check=check, oracles=oracles)
        self._steps = Steps(self.manager, self.reference, self.tokens, self._judge)
        self._released: list[int] = []

    @property
    def num_checks(self) -> int:
        """Rounds of the oracles."""
        return self._judge.num_checks

    @property
    def num_refusals(self) -> int:
        """Calls that were refused as they should be."""
        return self._judge.num_refusals

    @property
    def num_decodes_on(self) -> int:
        """Decode steps right behind one of the same sequences, which the manager takes its short way for."""
        return self._steps.num_decodes_on

    @property
    def has_step(self) -> bool:
        """Whether a step waits for its forward pass."""
        return self._steps.waiting is not None

    @property
    def num_live(self) -> int:
        """Live sequences."""
        return len(self.reference.seqs)

    def run(self, operation: Operation) -> bool:
        """Perform one operation and consult the oracles; False where it means nothing now and was passed over.

        Raises:
            ViolationError: a promise was broken: an oracle's name, ``"refusal"`` for a refusal that is missing, unfounded or left traces,
                or ``"crash"`` for any other exception.
        """
        num_completed = self._steps.num_completed
        try:
            if not self._perform(operation):
                return False
            self.num_operations += 1
            self._judge.judge(waiting=self._steps.waiting, has_stepped=self._steps.num_completed > num_completed)
        except InvariantError as error:
            raise ViolationError("audit", str(error)) from error
        except PagedKVError as error:
            raise ViolationError("refusal", f"{type(error).__name__} without a reason: {error}") from error
        except ViolationError:
            raise
        except Exception as error:
            raise ViolationError("crash", f"{type(error).__name__}: {error}") from error
        return True

    def close(self) -> None:
        """Let go of everything: no block may stay held. Raises ``ViolationError``."""
        self.run(Cancel(copies_made=False))
        self.run(Release(tuple(range(self.num_live))))
        for _ in range(len(self.reference.pins)):
            self.run(Unpin(0))
        held = [group.num_in_use for group in self.manager.statistics().groups]
        if any(held):
            raise ViolationError("accounting", f"{held} blocks of each group are held and nobody is left")

    def _perform(self, operation: Operation) -> bool:
        match operation:
            case Decode():
                return self._steps.decode(operation.tokens, joining=operation.joining)
            case Open():
                return self._open([self._prompt(prompt) for prompt in operation.prompts])
            case Extend():
                return self._extend(operation)
            case Complete():
                return self._steps.complete(operation.tokens, operation.only)
            case MatchPrefix():
                return self._match(*self._prompt(operation.prompt))
            case Misuse():
                return self._misuse(operation.kind, operation.pick)
            case Cancel():
                return self._steps.cancel(copies_made=operation.copies_made)
            case Unpin():
                return self._unpin(operation.pin)
            case Purge():
                return self._purge(NAMESPACES[operation.namespace % len(NAMESPACES)])
        if not self.reference.seqs:
            return False
        match operation:
            case Append():
                return self._append(self._seq(operation.seq), operation.token)
            case Fork():
                return self._fork(self._seq(operation.seq), max(operation.count, 1))
            case Truncate():
                return self._truncate(self._seq(operation.seq), operation.length)
            case Release():
                return self._release(self._distinct(operation.seqs))
            case Distrust():
                return self._distrust(self._distinct(operation.seqs))
            case Pin():
                return self._pin(self._seq(operation.seq), NAMESPACES[operation.namespace % len(NAMESPACES)])

    # Operations: each performs the command on both sides and compares the answers.

    def _open(self, prompts: list[tuple[list[int], str]]) -> bool:
        tokens, names = [each for each, _ in prompts], [name for _, name in prompts]
        if len(prompts) > self.config.max_num_seqs - self.num_live or max(map(len, tokens)) > self.manager.max_seq_len:
            self._judge.expect(InvalidRequestError, lambda: self.manager.open(tokens, names))
            return True
        opened = self.manager.open(tokens, names)
        found = self.reference.open(tokens, names, opened.seqs.tolist())
        self._judge.agree("tokens found", opened.num_cached_tokens.tolist(), found)
        return True

    def _extend(self, operation: Extend) -> bool:
        if self.has_step:
            return False
        handles, counts = [], []
        for handle, count in zip(self._distinct(operation.seqs), cycle(operation.counts), strict=False):
            left = self._unreserved(handle)
            if left:
                handles.append(handle)
                counts.append(1 + count % left)
        if handles:
            self._steps.begin(handles, counts)
        return bool(handles)

    def _append(self, handle: int, token: int) -> bool:
        if len(self.reference.seqs[handle].tokens) >= self.manager.max_seq_len:
            self._judge.expect(InvalidRequestError, lambda: self.manager.append([handle], [token]))
            return True
        self.manager.append([handle], [token])
        self.reference.seqs[handle].tokens += [token] if token >= 0 else []
        return True

    def _fork(self, handle: int, count: int) -> bool:
        twin = self.reference.seqs[handle]
        if twin.reserved != twin.computed or count > self.config.max_num_seqs - self.num_live:
            self._judge.expect(InvalidRequestError, lambda: self.manager.fork(handle, count))
            return True
        self.reference.fork(handle, self.manager.fork(handle, count).tolist())
        return True

    def _truncate(self, handle: int, length: int) -> bool:
        length = 1 + length % len(self.reference.seqs[handle].tokens)
        if not self.reference.can_truncate(handle, length):
            self._judge.expect(InvalidRequestError, lambda: self.manager.truncate([handle], [length]))
            return True
        self._steps.leave(handle)
        self.manager.truncate([handle], [length])
        self.reference.truncate(handle, length)
        return True

    def _release(self, handles: list[int]) -> bool:
        for handle in handles:
            self._steps.leave(handle)
        self.manager.release(handles)
        self.reference.release(handles)
        self._released += handles
        return True

    def _pin(self, handle: int, name: str) -> bool:
        tokens = self.reference.seqs[handle].tokens
        pin, found = self.manager.pin(tokens, name)
        self._judge.agree("tokens pinned", found, self.reference.pin(pin, tokens, name))
        return True

    def _unpin(self, place: int) -> bool:
        pins = list(self.reference.pins)
        if not pins:
            return False
        pin = pins[place % len(pins)]
        self.manager.unpin(pin)
        self.reference.unpin(pin)
        self._judge.look()
        self._judge.expect(StaleHandleError, lambda: self.manager.unpin(pin))
        return True

    def _purge(self, name: str) -> bool:
        self._judge.agree("blocks purged", self.manager.purge(name), self.reference.purge(name))
        return True

    def _distrust(self, handles: list[int]) -> bool:
        self._judge.agree("blocks distrusted", self.manager.distrust(handles), self.reference.distrust(handles))
        return True

    def _match(self, tokens: list[int], name: str) -> bool:
        expected = self.reference.match(tokens, name)
        self._judge.agree("tokens matched", self.manager.match(tokens, name).num_tokens, len(expected[0]) * self.config.block_size)
        return True

    def _misuse(self, kind: int, pick: int) -> bool:
        self._judge.expect(*misuse(self.manager, kind, pick, live=list(self.reference.seqs), released=self._released))
        return True

    # How it is done.

    def _seq(self, place: int) -> int:
        live = self.reference.seqs
        return next(islice(live, place % len(live), None))

    def _distinct(self, places: Sequence[int]) -> list[int]:
        live = list(self.reference.seqs)
        return list(dict.fromkeys(live[place % len(live)] for place in places)) if live else []

    def _prompt(self, prompt: Prompt) -> tuple[list[int], str]:
        start: list[int] = self.reference.seqs[self._seq(prompt.like)].tokens if self.reference.seqs else []
        kept = start[: prompt.keep % (len(start) + 1)]
        return [*kept, *prompt.tokens], NAMESPACES[prompt.namespace % len(NAMESPACES)]

    def _unreserved(self, handle: int) -> int:
        twin = self.reference.seqs[handle]
        return len(twin.tokens) - twin.reserved


def run_program(
    program: Program,
    *,
    manager_factory: Callable[..., KVCacheManager] = KVCacheManager,
    check: str = "audit",
    oracles: Sequence[str] = ORACLES,
) -> ManagerDriver:
    """Run a program to its end and let go of everything; arguments as for ``ManagerDriver``.

    Raises:
        ViolationError: as ``ManagerDriver.run``; a note names the operation.
    """
    driver = ManagerDriver(program.config, manager_factory=manager_factory, check=check, oracles=oracles)
    for number, operation in enumerate(program.operations):
        try:
            driver.run(operation)
        except ViolationError as error:
            error.add_note(f"operation {number} of {len(program.operations)}, {NAMES[type(operation)]}: {operation}")
            raise
    driver.close()
    return driver
