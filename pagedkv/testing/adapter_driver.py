"""Performs operations on somebody's block manager through its adapter, and holds every answer against what must be true of any manager.

Knows no rule of eviction or of hits: a manager may find less than it could. What it may not: hand out a block twice, lose one, find a token
that was never stored, serve another's, refuse what fits, or change anything while refusing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TypeVar, cast

import numpy as np

from pagedkv.testing.adapters import ForkingAdapter, ManagerAdapter
from pagedkv.testing.programs import NAMESPACES, Append, Complete, Fork, ManagerConfig, Misuse, Open, Operation, Prompt, Release
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError

AdapterFactory = Callable[[int, int], ManagerAdapter]  # num_blocks, block_size
MISUSES = ("free a sequence a second time", "free a sequence that never began", "ask for more than the pool holds")
_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class _Sequence:
    """A live sequence as it should be: its tokens, and how many of them are stored."""

    namespace: str
    tokens: list[int]
    num_stored: int

    @property
    def pending(self) -> bool:
        return self.num_stored < len(self.tokens)


class AdapterDriver:
    """One manager and what is known of it. ``words`` tells what was done and answered.

    Args:
        config: sizes; the first of ``num_blocks`` counts.
        factory: makes the manager under test.
    """

    def __init__(self, config: ManagerConfig, factory: AdapterFactory) -> None:
        self._size, self._num_blocks = config.block_size, config.num_blocks[0]
        self._max_num_seqs = config.max_num_seqs
        self.words = [f"a manager of {self._num_blocks} blocks of {self._size} tokens"]
        self._adapter = self._call("made", lambda: factory(self._num_blocks, self._size))
        self._forking = self._adapter if isinstance(self._adapter, ForkingAdapter) else None
        self._total = self._free_blocks()
        if not 0 < self._total <= self._num_blocks:
            raise ViolationError("accounting", f"{self._total} of {self._num_blocks} blocks are free in a fresh manager")
        self._oracle = TokenOracle([self._num_blocks], self._size)
        self._seqs: dict[int, _Sequence] = {}
        self._ended: list[int] = []
        self._next_id = 1
        self.num_operations = self.num_refusals = self.num_found_tokens = 0

    @property
    def num_live(self) -> int:
        """Live sequences."""
        return len(self._seqs)

    @property
    def has_pending(self) -> bool:
        """Whether a sequence waits for the forward pass that stores its tokens."""
        return any(seq.pending for seq in self._seqs.values())

    def run(self, operation: Operation) -> bool:
        """Perform one operation and verify everything; False when it means nothing here, and was passed over.

        Raises:
            ViolationError: the manager broke a promise.
        """
        match operation:
            case Open(prompts):
                performed = self.num_live < self._max_num_seqs
                if performed:
                    self._open(prompts[0])
            case Complete():
                performed = self.has_pending
                self._complete()
            case Append(pick, token):
                performed = self._append(pick, token)
            case Fork(pick, _):
                performed = self._fork(pick)
            case Release(picks):
                chosen = list(dict.fromkeys(list(self._seqs)[pick % self.num_live] for pick in picks)) if self._seqs else []
                performed = bool(chosen)
                for seq_id in chosen:
                    self._free(seq_id)
            case Misuse(kind, pick):
                performed = self._misuse(kind % len(MISUSES), pick)
            case _:
                performed = False
        if performed:
            self.num_operations += 1
            self._verify()
        return performed

    def close(self) -> None:
        """End everything: every block must come back; raises ``ViolationError`` otherwise."""
        for seq_id in list(self._seqs):
            self._free(seq_id)
        self._verify()

    # Operations.

    def _open(self, prompt: Prompt) -> None:
        begin: list[int] = []
        if self._seqs:
            base = list(self._seqs.values())[prompt.like % self.num_live].tokens
            begin = base[: prompt.keep % (len(base) + 1)]
        tokens, namespace = [*begin, *prompt.tokens], NAMESPACES[prompt.namespace]
        seq_id = self._take_id()
        words = f"allocate {seq_id}: {tokens}" + (f" in namespace {namespace!r}" if namespace else "")
        self._allocate(seq_id, tokens, namespace, words)

    def _allocate(self, seq_id: int, tokens: list[int], namespace: str, words: str) -> None:
        needed, before = -(-len(tokens) // self._size), self._state()
        possible = needed <= self._total
        answer = self._call(words, lambda: _whole(self._adapter.allocate(seq_id, list(tokens), namespace)), may_raise=not possible)
        if answer is None:
            self._refused(words, before, needs=needed if possible else None)
            return
        self._say(f"{words} -> {answer} tokens found")
        if not possible:
            raise ViolationError("accounting", f"{needed} blocks are needed, the pool has {self._total}, and the request was accepted")
        if not 0 <= answer <= len(tokens):
            raise ViolationError("tokens", f"{answer} tokens are said to be found of a prompt of {len(tokens)}")
        self._seqs[seq_id] = _Sequence(namespace, tokens, answer)
        self.num_found_tokens += answer

    def _complete(self) -> None:
        """The forward pass: every waiting token is written into its slot, then the manager is told."""
        pending = [(seq_id, seq) for seq_id, seq in self._seqs.items() if seq.pending]
        for seq_id, seq in pending:
            self._write(seq_id, seq)
        for seq_id, _ in pending:
            self._computed(seq_id)

    def _append(self, pick: int, token: int) -> bool:
        able = [seq_id for seq_id, seq in self._seqs.items() if not seq.pending and len(seq.tokens) < self._total * self._size]
        if not able:
            return False
        seq_id, before = able[pick % len(able)], self._state()
        words, seq = f"append {token} to {seq_id}", self._seqs[seq_id]
        if not self._call(words, lambda: self._adapter.append(seq_id, token)):
            # Where sequences share half-full blocks, a block may be needed for the copy.
            self._refused(words, before, needs=1 if self._forking or len(seq.tokens) % self._size == 0 else 0)
            return True
        seq.tokens.append(token)
        if self._forking:
            copies = list(self._call("take copies", self._forking.take_copies))
            if copies:
                words += f", copying blocks {copies}"
                self._oracle.copy_blocks([np.array(copies, dtype=np.int32)])
        self._say(f"{words} -> blocks {self._table(seq_id)}")
        self._write(seq_id, seq)
        self._computed(seq_id)
        return True

    def _fork(self, pick: int) -> bool:
        able = [seq_id for seq_id, seq in self._seqs.items() if not seq.pending]
        forking = self._forking
        if not able or self.num_live >= self._max_num_seqs or forking is None:
            return False
        seq_id, new_id = able[pick % len(able)], self._take_id()
        self._call(f"fork {seq_id} into {new_id}", lambda: forking.fork(seq_id, new_id))
        self._say(f"fork {seq_id} into {new_id}")
        seq = self._seqs[seq_id]
        self._seqs[new_id] = _Sequence(seq.namespace, list(seq.tokens), seq.num_stored)
        return True

    def _free(self, seq_id: int) -> None:
        aborted = ", before its tokens are stored" if self._seqs[seq_id].pending else ""
        self._call(f"free {seq_id}{aborted}", lambda: self._adapter.free(seq_id))
        self._say(f"free {seq_id}{aborted}")
        del self._seqs[seq_id]
        self._ended.append(seq_id)

    def _misuse(self, kind: int, pick: int) -> bool:
        before = self._state()
        if kind == 0 and not self._ended:
            return False
        if kind == 2:
            size = (self._total + 1) * self._size
            self._allocate(self._take_id(), [0] * size, "", f"allocate {size} tokens, more than the pool holds")
            return True
        seq_id = self._ended[pick % len(self._ended)] if kind == 0 else self._take_id()
        words = MISUSES[kind].replace("a sequence", f"{seq_id}", 1)
        try:
            self._adapter.free(seq_id)
            self._say(f"{words} -> no exception")
        except Exception as error:
            self._say(f"{words} -> {type(error).__name__}")
            self.num_refusals += 1
        self._unchanged(before)
        return True

    # Oracles.

    def _verify(self) -> None:
        held: dict[int, None] = {}
        for seq_id, seq in self._seqs.items():
            table = self._table(seq_id)
            for block in table:
                if not 0 <= block < self._num_blocks:
                    raise ViolationError("accounting", f"sequence {seq_id} has block {block} of {self._num_blocks}")
            if len(set(table)) < len(table):
                raise ViolationError("accounting", f"sequence {seq_id} has a block twice: {table}")
            if len(table) * self._size < len(seq.tokens):
                raise ViolationError("accounting", f"sequence {seq_id} has {len(table)} blocks for {len(seq.tokens)} tokens")
            held.update(dict.fromkeys(table))
        free = self._free_blocks()
        if free + len(held) != self._total:
            raise ViolationError(
                "accounting",
                f"{free} blocks are free and {len(held)} are held, of {self._total}: {self._total - free - len(held)} are lost",
            )
        for seq_id, seq in self._seqs.items():
            stamps = self._oracle.stamps(seq.namespace, seq.tokens)[: seq.num_stored]
            try:
                self._oracle.verify(0, self._table(seq_id), stamps)
            except ViolationError as violation:
                raise ViolationError(violation.kind, f"sequence {seq_id} reads what is not its own: {violation}") from None

    def _refused(self, words: str, before: object, *, needs: int | None) -> None:
        """A call that was refused: rightly so, and nothing has changed."""
        self._say(f"{words} -> refused")
        self.num_refusals += 1
        self._unchanged(before)
        free = self._free_blocks()
        if needs is not None and needs <= free:
            raise ViolationError("liveness", f"refused, although {needs} blocks are needed and {free} are free")

    def _unchanged(self, before: object) -> None:
        after = self._state()
        if after != before:
            raise ViolationError("atomicity", f"the call had to change nothing, and free blocks and tables went from {before} to {after}")

    # How it is done.

    def _write(self, seq_id: int, seq: _Sequence) -> None:
        size, table = self._size, self._table(seq_id)
        if len(table) * size < len(seq.tokens):
            raise ViolationError("accounting", f"sequence {seq_id} has {len(table)} blocks for {len(seq.tokens)} tokens")
        stamps = self._oracle.stamps(seq.namespace, seq.tokens)
        slots = [table[at // size] * size + at % size for at in range(seq.num_stored, len(seq.tokens))]
        if any(not 0 <= slot < self._num_blocks * size for slot in slots):
            raise ViolationError("accounting", f"sequence {seq_id} has blocks {table} of {self._num_blocks}")
        self._oracle.write([slots], stamps[seq.num_stored :])
        seq.num_stored = len(seq.tokens)

    def _computed(self, seq_id: int) -> None:
        self._call(f"computed {seq_id}", lambda: self._adapter.computed(seq_id))
        self._say(f"computed {seq_id}: its tokens are in blocks {self._table(seq_id)}")

    def _state(self) -> tuple[int, tuple[tuple[int, ...], ...]]:
        return self._free_blocks(), tuple(tuple(self._table(seq_id)) for seq_id in self._seqs)

    def _free_blocks(self) -> int:
        return self._call("asked for its free blocks", lambda: index(self._adapter.num_free_blocks()))

    def _table(self, seq_id: int) -> list[int]:
        return list(self._call(f"asked for the blocks of {seq_id}", lambda: self._adapter.block_ids(seq_id)))

    def _call(self, words: str, call: Callable[[], _Answer], *, may_raise: bool = False) -> _Answer:
        """Ask the manager; an exception is a violation, unless a refusal by exception is allowed here (then the answer is None)."""
        try:
            return call()
        except Exception as error:
            if may_raise:
                return cast(_Answer, None)
            self._say(f"{words} -> {type(error).__name__}")
            raise ViolationError("crash", f"{words}: {type(error).__name__}{f' {error}' if str(error) else ''}") from error

    def _say(self, text: str) -> None:
        self.words.append(text)

    def _take_id(self) -> int:
        taken, self._next_id = self._next_id, self._next_id + 1
        return taken


def _whole(count: int | None) -> int | None:
    return None if count is None else index(count)


def run_on_adapter(
    config: ManagerConfig, operations: Sequence[Operation], factory: AdapterFactory
) -> tuple[list[str], ViolationError | None]:
    """Perform operations on a fresh manager and end all sequences; returns what was done, in words, and the violation, if there was one."""
    try:
        driver = AdapterDriver(config, factory)
    except ViolationError as violation:
        return [], violation
    try:
        for operation in operations:
            driver.run(operation)
        driver.close()
    except ViolationError as violation:
        return driver.words, violation
    return driver.words, None
