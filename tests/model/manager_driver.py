"""Drives a ``KVCacheManager`` and its reference side by side, over blocks whose every slot says what was written into it.

Three oracles, each of which can be switched off to measure the others: the manager's own ``audit``, the ``data`` that every sequence reads
through its block table, and the ``reference``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from reference_manager import Block, ReferenceManager, RefusedError

from pagedkv.core import Extension, KVCacheManager
from pagedkv.errors import InvalidRequestError, OutOfBlocksError, StaleHandleError, UnknownHandleError
from pagedkv.plan import Int64Array

ORACLES = ("audit", "data", "reference")
NAMES = ("", "tenant")

Stamp = tuple[str, tuple[int, ...]]  # who wrote a slot: its namespace, and all tokens up to its position


@dataclass(frozen=True)
class Shape:
    """Sizes of the manager under test. Tiny: the fewer the blocks and tokens, the more often things meet."""

    num_blocks: tuple[int, ...]
    block_size: int
    max_num_seqs: int
    caching: bool = True
    vocabulary: int = 2

    @staticmethod
    def draw(rng: random.Random) -> Shape:
        num_blocks = rng.randint(3, 20)
        return Shape(
            rng.choice(
                [(num_blocks,), (num_blocks,), (num_blocks, num_blocks), (num_blocks, num_blocks + 3), (num_blocks + 3, num_blocks)]
            ),
            block_size=rng.choice([1, 2, 3, 4]),
            max_num_seqs=rng.randint(2, 6),
            caching=rng.random() < 0.9,
            vocabulary=rng.choice([2, 3]),
        )

    def manager(self, kind: type[KVCacheManager] = KVCacheManager) -> KVCacheManager:
        return kind(
            num_blocks=list(self.num_blocks),
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_seq_len=(min(self.num_blocks) - 1) * self.block_size,
            enable_prefix_caching=self.caching,
        )


@dataclass
class Step:
    """An extension whose forward pass has not happened yet: what it will copy and write."""

    handles: list[int]
    extension: Extension
    stamps: list[Stamp]
    live: set[int] = field(default_factory=set)  # those that the step may still complete


class ManagerDriver:
    """Every method performs one operation on the manager, the reference and the data; ``verify`` compares them."""

    def __init__(self, shape: Shape, kind: type[KVCacheManager] = KVCacheManager, oracles: tuple[str, ...] = ORACLES) -> None:
        self.shape = shape
        self.oracles = oracles
        self.manager = shape.manager(kind)
        self.model = ReferenceManager(list(shape.num_blocks), shape.block_size, shape.max_num_seqs, caching=shape.caching)
        self.data: list[dict[int, Stamp]] = [{} for _ in shape.num_blocks]
        self.step: Step | None = None
        self.released: list[int] = []
        self.num_operations = 0
        # Decode steps pass one frozen array as long as they are of the same sequences, as a scheduler does: the manager recognises it.
        self.decoding = np.zeros(0, dtype=np.int64)
        self.num_steps_on = 0  # decode steps right behind one of the same sequences

    @property
    def live(self) -> list[int]:
        return list(self.model.seqs)

    def tokens(self, handle: int) -> list[int]:
        return self.model.seqs[handle].tokens

    def unreserved(self, handle: int) -> int:
        return len(self.tokens(handle)) - self.model.seqs[handle].reserved

    # Operations.

    def open(self, prompts: list[list[int]], names: list[str]) -> None:
        too_long = any(len(prompt) > self.manager.max_seq_len for prompt in prompts)
        if too_long or len(prompts) > self.shape.max_num_seqs - len(self.live):
            self._expect(InvalidRequestError, lambda: self.manager.open(prompts, names))
            return
        opened = self.manager.open(prompts, names)
        found = self.model.open(prompts, names, opened.seqs.tolist())
        self._agree("tokens found", opened.num_cached_tokens.tolist(), found)

    def begin(self, handles: list[int], counts: list[int]) -> None:
        """Extend; the forward pass is still to come."""
        assert self.step is None
        starts = [self.model.seqs[handle].reserved for handle in handles]
        needed = max(self.model.needed(handles, counts))
        self._agree("blocks needed", self.manager.num_blocks_needed(handles, counts), needed)
        try:
            self.model.extend(handles, counts)
        except RefusedError as refusal:
            error = self._expect(OutOfBlocksError, lambda: self.manager.extend(handles, counts))
            assert isinstance(error, OutOfBlocksError)
            self._agree("needed and available", (error.needed, error.available), (refusal.needed, refusal.available))
            return
        extension = self.manager.extend(self._same_array(handles), 1) if set(counts) == {1} else self.manager.extend(handles, counts)
        stamps = [
            (self.model.seqs[handle].name, tuple(self.tokens(handle)[: position + 1]))
            for handle, start, count in zip(handles, starts, counts, strict=True)
            for position in range(start, start + count)
        ]
        assert extension.positions.tolist() == [len(history) - 1 for _, history in stamps]
        assert extension.seq_lens.tolist() == [start + count for start, count in zip(starts, counts, strict=True)]
        self.step = Step(handles, extension, stamps, set(handles))

    def run(self, next_tokens: list[int], *, completing: int | None = None) -> None:
        """The forward pass happens; the step's first ``completing`` sequences (all when not given) are completed, the others cancelled."""
        assert self.step is not None
        self._copy_blocks(self.step.extension)
        for group, slots in enumerate(self.step.extension.slot_mapping.tolist()):
            self.data[group].update(zip(slots, self.step.stamps, strict=True))
        handles = [handle for handle in self.step.handles if handle in self.step.live]
        self.step = None
        done = handles[:completing]
        nexts = [self._admissible(handle, token) for handle, token in zip(done, next_tokens, strict=False)]
        self.manager.complete(self.decoding if done == self.decoding.tolist() else done, nexts)
        self.model.complete(done, nexts)
        if done != handles:
            self.manager.cancel(handles[len(done) :])
            self.model.cancel(handles[len(done) :])

    def decode(self, next_tokens: list[int]) -> None:
        """A whole step of all sequences that know just one token whose K/V is not stored."""
        assert self.step is None
        handles = [handle for handle in self.live if self.unreserved(handle) == 1 and not self._has_reserved(handle)]
        if handles:
            self.num_steps_on += handles == self.decoding.tolist()
            self.begin(handles, [1] * len(handles))
        if self.step is not None:
            self.run((next_tokens * len(handles))[: len(handles)])

    def fail(self, *, copies_made: bool) -> None:
        """The forward pass fails, before or after the block copies."""
        assert self.step is not None
        if copies_made:
            self._copy_blocks(self.step.extension)
        handles = [handle for handle in self.step.handles if handle in self.step.live]
        self.step = None
        self.manager.cancel(handles)
        self.model.cancel(handles)

    def append(self, handle: int, token: int) -> None:
        if len(self.tokens(handle)) >= self.manager.max_seq_len:
            self._expect(InvalidRequestError, lambda: self.manager.append([handle], [token]))
            return
        self.manager.append([handle], [token])
        self.tokens(handle).append(token)

    def fork(self, handle: int, count: int) -> None:
        seq = self.model.seqs[handle]
        if seq.reserved != seq.computed or count > self.shape.max_num_seqs - len(self.live):
            self._expect(InvalidRequestError, lambda: self.manager.fork(handle, count))
            return
        self.model.fork(handle, self.manager.fork(handle, count).tolist())

    def truncate(self, handle: int, length: int) -> None:
        self._leave_step(handle)
        self.manager.truncate([handle], [length])
        self.model.truncate([handle], [length])

    def release(self, handles: list[int]) -> None:
        for handle in handles:
            self._leave_step(handle)
        self.manager.release(handles)
        self.model.release(handles)
        self.released += handles

    def pin(self, tokens: list[int], name: str) -> None:
        pin, num_tokens = self.manager.pin(tokens, name)
        self._agree("tokens pinned", num_tokens, self.model.pin(pin, tokens, name))

    def unpin(self, pin: int) -> None:
        self.manager.unpin(pin)
        self.model.unpin(pin)
        self._expect(StaleHandleError, lambda: self.manager.unpin(pin))

    def purge(self, name: str) -> None:
        self._agree("blocks purged", self.manager.purge(name), self.model.purge(name))

    def misuse(self, handle: int) -> None:
        """A handle that was released, or never given out, is refused by every command."""
        error = StaleHandleError if handle in self.released else UnknownHandleError
        for command in (
            lambda: self.manager.release([*self.live, handle]),
            lambda: self.manager.extend([handle], 1),
            lambda: self.manager.complete([handle], [0]),
            lambda: self.manager.cancel([handle]),
            lambda: self.manager.fork(handle, 1),
            lambda: self.manager.truncate([handle], [1]),
        ):
            self._expect(error, command)

    # Oracles.

    def verify(self) -> None:
        """Raise when an oracle that is switched on disagrees with the manager."""
        self.num_operations += 1
        if "audit" in self.oracles:
            self.manager.check()
        if "data" in self.oracles:
            self._verify_data()
        if "reference" in self.oracles:
            self._verify_reference()

    def close(self) -> None:
        """Let go of everything; no block may stay held."""
        if self.step is not None:
            self.fail(copies_made=False)
        self.release(self.live)
        for pin in list(self.model.pins):
            self.unpin(pin)
        self.verify()
        assert all(group.num_in_use == 0 for group in self.manager.statistics().groups)

    def _verify_data(self) -> None:
        waiting = self.step.live if self.step is not None else ()  # their block copies may not have been made yet
        for seq in self.manager.snapshot().sequences:
            if seq.seq in waiting:
                continue
            name = self.model.seqs[seq.seq].name
            for group, data in enumerate(self.data):
                for position, slot in enumerate(seq.slots(group)[: seq.num_computed_tokens]):
                    expected = (name, seq.token_ids[: position + 1])
                    assert data.get(slot) == expected, f"sequence {seq.seq} reads {data.get(slot)} at {position}, not {expected}"

    def _verify_reference(self) -> None:
        snapshot = self.manager.snapshot()
        for group, account in enumerate(snapshot.statistics.groups):
            model = self.model.groups[group]
            held = sorted(model.holders.values())
            expected = (model.free, len(model.idle), len(held), sum(count > 1 for count in held), len(model.cache), model.num_evicted)
            got = (account.num_free, account.num_evictable, account.num_in_use, account.num_shared, account.num_cached, account.num_evicted)
            assert got == expected, f"group {group} free, evictable, in use, shared, cached, evicted: {got}, expected {expected}"
            assert sorted(count for _, count in snapshot.references[group]) == held
        account = snapshot.statistics
        got = (account.num_hit_tokens, account.num_deduplicated, account.num_copies)
        assert got == (self.model.num_hit_tokens, self.model.num_deduplicated, self.model.num_copies), got
        assert {seq.seq for seq in snapshot.sequences} == set(self.model.seqs)
        names: list[dict[int, Block]] = [{} for _ in self.model.groups]
        for seq in snapshot.sequences:
            twin = self.model.seqs[seq.seq]
            assert (seq.token_ids, seq.num_reserved_tokens, seq.num_computed_tokens) == (tuple(twin.tokens), twin.reserved, twin.computed)
            for group, table in enumerate(seq.block_tables):
                assert len(table) == len(twin.tables[group])
                for block_id, block in zip(table, twin.tables[group], strict=True):
                    assert names[group].setdefault(block_id, block) is block, f"block {block_id} is shared where it should not be"
        for group in names:
            assert len(set(group.values())) == len(group), "a block that should be shared is not"
        for seq in self.model.seqs.values():
            found = self.manager.match(seq.tokens, seq.name).num_tokens
            assert found == len(self.model.match(seq.tokens, seq.name)[0]) * self.shape.block_size

    # How it is done.

    def _agree(self, what: str, got: object, expected: object) -> None:
        if "reference" in self.oracles:
            assert got == expected, f"{what}: {got}, expected {expected}"

    def _expect(self, error: type[Exception], command: Callable[[], object]) -> Exception:
        before = self.manager.snapshot()
        raised: Exception | None = None
        try:
            command()
        except error as problem:
            raised = problem
        assert raised is not None, f"{error.__name__} was not raised"
        assert self.manager.snapshot() == before, f"{raised!r} was raised after a change"
        return raised

    def _has_reserved(self, handle: int) -> bool:
        seq = self.model.seqs[handle]
        return seq.reserved != seq.computed

    def _same_array(self, handles: list[int]) -> Int64Array:
        if self.decoding.tolist() != handles:
            self.decoding = np.array(handles, dtype=np.int64)
            self.decoding.flags.writeable = False
        return self.decoding

    def _copy_blocks(self, extension: Extension) -> None:
        size = self.shape.block_size
        for data, copies in zip(self.data, extension.copies, strict=True):
            read = [(target, [data.get(source * size + offset) for offset in range(size)]) for source, target in copies.tolist()]
            for target, stamps in read:
                data.update({target * size + offset: stamp for offset, stamp in enumerate(stamps) if stamp is not None})

    def _leave_step(self, handle: int) -> None:
        if self.step is not None:
            self.step.live.discard(handle)

    def _admissible(self, handle: int, token: int) -> int:
        """A next token belongs behind the last known one only when all known ones are computed."""
        seq = self.model.seqs[handle]
        return token if seq.reserved == len(seq.tokens) < self.manager.max_seq_len else -1


class RandomRun:
    """Chooses operations; half of the prompts begin like a live sequence, so that prefixes meet."""

    def __init__(self, seed: int, kind: type[KVCacheManager] = KVCacheManager, oracles: tuple[str, ...] = ORACLES) -> None:
        self.rng = random.Random(seed)
        self.driver = ManagerDriver(Shape.draw(self.rng), kind, oracles)

    def operate(self, count: int) -> None:
        for _ in range(count):
            self._operate()
            self.driver.verify()

    def _operate(self) -> None:
        rng, driver = self.rng, self.driver
        kind = rng.random()
        if driver.step is not None and kind < 0.7:
            self._end_step()
        elif not driver.live or kind < 0.2:
            driver.open(*self._prompts())
        elif driver.step is None and kind < 0.4:
            for _ in range(rng.randint(1, 2 * driver.shape.block_size)):
                driver.decode([self._token() if rng.random() < 0.97 else -1 for _ in driver.live])
                driver.verify()
        elif driver.step is None and kind < 0.65:
            self._begin_step()
        elif kind < 0.75:
            driver.fork(rng.choice(driver.live), rng.randint(1, 2))
        elif kind < 0.82:
            handle = rng.choice(driver.live)
            driver.truncate(handle, rng.randint(1, len(driver.tokens(handle))))
        elif kind < 0.91:
            driver.release(rng.sample(driver.live, rng.randint(1, len(driver.live))))
        elif kind < 0.94:
            driver.pin(driver.tokens(rng.choice(driver.live)), rng.choice(NAMES))
        elif kind < 0.97 and driver.model.pins:
            driver.unpin(rng.choice(list(driver.model.pins)))
        elif kind < 0.98:
            driver.purge(rng.choice(NAMES))
        else:
            driver.misuse(rng.choice([*driver.released[-3:], 0, -1, 99_999 << 32, (1 << 32) + 99]))

    def _token(self) -> int:
        return self.rng.randrange(self.driver.shape.vocabulary)

    def _prompts(self) -> tuple[list[list[int]], list[str]]:
        rng, driver = self.rng, self.driver
        prompts = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            start = list(driver.tokens(rng.choice(driver.live))) if driver.live and rng.random() < 0.6 else []
            fresh = [self._token() for _ in range(rng.randint(1, 3 * driver.shape.block_size))]
            prompts.append(start[: rng.randint(0, len(start))] + fresh)
        return prompts, [rng.choice(NAMES) for _ in prompts]

    def _begin_step(self) -> None:
        rng, driver = self.rng, self.driver
        chosen = rng.sample(driver.live, rng.randint(1, len(driver.live)))
        handles = [handle for handle in chosen if driver.unreserved(handle)]
        if not handles:
            driver.append(chosen[0], self._token())
        elif rng.random() < 0.4:
            driver.begin(handles, [1] * len(handles))
        else:
            driver.begin(handles, [rng.randint(1, driver.unreserved(handle)) for handle in handles])

    def _end_step(self) -> None:
        rng, driver = self.rng, self.driver
        assert driver.step is not None
        kind = rng.random()
        if kind < 0.15:
            driver.fail(copies_made=rng.random() < 0.5)
            return
        nexts = [self._token() if rng.random() < 0.8 else -1 for _ in driver.step.handles]
        driver.run(nexts, completing=None if kind < 0.9 else rng.randint(0, len(driver.step.live)))
