"""``check_manager`` passes a right manager, and tells what is wrong with a wrong one in a few operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pagedkv.errors import InvalidRequestError
from pagedkv.testing.adapter_driver import AdapterFactory, run_on_adapter
from pagedkv.testing.adapters import ForkingAdapter, ManagerAdapter, PagedKVAdapter
from pagedkv.testing.manager_check import check_manager
from pagedkv.testing.programs import ManagerConfig, MatchPrefix, Open, Prompt
from pagedkv.testing.violations import ViolationError


class Plain:
    """Ours without forks: what has no ``fork`` is never asked for one."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        ours = PagedKVAdapter(num_blocks, block_size)
        self.allocate, self.computed, self.append, self.free = ours.allocate, ours.computed, ours.append, ours.free
        self.num_free_blocks = ours.num_free_blocks
        self.block_ids: Callable[[int], Sequence[int]] = lambda seq_id: np.array(ours.block_ids(seq_id))


@pytest.mark.parametrize("factory", [PagedKVAdapter, Plain])
def test_right_manager_passes_and_everything_was_tried(factory: Callable[[int, int], ManagerAdapter]) -> None:
    report = check_manager(factory, seed=3, num_operations=800, namespaces=True)
    assert report.operations >= 800
    assert report.refusals > 50
    assert report.found_tokens > 50
    assert report.seeds == (3, 2 + report.sessions)
    assert isinstance(factory(4, 4), ForkingAdapter) == (factory is PagedKVAdapter)


def test_same_seed_gives_the_same_report() -> None:
    assert check_manager(PagedKVAdapter, seed=9, num_operations=300) == check_manager(PagedKVAdapter, seed=9, num_operations=300)


class FindsOneMore(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        found = super().allocate(seq_id, token_ids, namespace)
        return found + 1 if found else found


class FindsMoreThanThereIs(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        return None if super().allocate(seq_id, token_ids, namespace) is None else len(token_ids) + 1


class MixesNamespaces(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        return super().allocate(seq_id, token_ids, "")


class PublishesEarly(PagedKVAdapter):
    early = 0

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        found = super().allocate(seq_id, token_ids, namespace)
        if found is not None:
            super().computed(seq_id)
            self.early = seq_id
        return found

    def computed(self, seq_id: int) -> None:
        if seq_id != self.early:
            super().computed(seq_id)
        self.early = 0


class WritesIntoSharedBlocks(PagedKVAdapter):
    def take_copies(self) -> Sequence[tuple[int, int]]:
        return []


class KeepsBlocks(PagedKVAdapter):
    def free(self, seq_id: int) -> None:
        del self._handles[seq_id]


class KeepsBlocksWhenRefusing(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        opened = self._manager.open([token_ids], [namespace])
        if self._manager.num_available_blocks < self._manager.num_blocks_needed(
            opened.seqs, [len(token_ids) - opened.num_cached_tokens[0]]
        ):
            return None
        self._manager.release(opened.seqs)
        return super().allocate(seq_id, token_ids, namespace)


class FreesTwice(PagedKVAdapter):
    """An ended sequence's second end takes the blocks of one that lives."""

    def free(self, seq_id: int) -> None:
        if seq_id not in self._handles and self._handles:
            self._manager.truncate([next(iter(self._handles.values()))], [1])
        else:
            super().free(seq_id)


class RefusesTooMuch(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        return super().allocate(seq_id, token_ids, namespace) if self.num_free_blocks() > 3 else None


class RefusesToGrow(PagedKVAdapter):
    def append(self, seq_id: int, token_id: int) -> bool:
        return self._lengths[seq_id] < 7 and super().append(seq_id, token_id)


class FailsWhenFull(PagedKVAdapter):
    def append(self, seq_id: int, token_id: int) -> bool:
        if not super().append(seq_id, token_id):
            raise RuntimeError("no block")
        return True


class AcceptsTheImpossible(PagedKVAdapter):
    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        most = self._manager.num_usable_blocks * self._manager.block_size
        return super().allocate(seq_id, token_ids, namespace) if len(token_ids) <= most else 0


class ShortTables(PagedKVAdapter):
    def block_ids(self, seq_id: int) -> Sequence[int]:
        table = super().block_ids(seq_id)
        return table[:3]


class RepeatsBlocks(PagedKVAdapter):
    def block_ids(self, seq_id: int) -> Sequence[int]:
        table = super().block_ids(seq_id)
        return [*table[:2], table[0]] if len(table) == 3 else table


class NamesStrangeBlocks(PagedKVAdapter):
    def block_ids(self, seq_id: int) -> Sequence[int]:
        return [block + 20 for block in super().block_ids(seq_id)]


class AnswersInText(PagedKVAdapter):
    def num_free_blocks(self) -> int:
        return str(super().num_free_blocks())  # type: ignore[return-value]


class CountsTooFewFree(PagedKVAdapter):
    def num_free_blocks(self) -> int:
        return 0


PLANTED: dict[type[PagedKVAdapter], str] = {
    FindsOneMore: "tokens",
    FindsMoreThanThereIs: "tokens",
    MixesNamespaces: "ownership",
    PublishesEarly: "tokens",
    WritesIntoSharedBlocks: "tokens",
    KeepsBlocks: "accounting",
    KeepsBlocksWhenRefusing: "atomicity",
    FreesTwice: "atomicity",
    RefusesTooMuch: "liveness",
    RefusesToGrow: "liveness",
    FailsWhenFull: "crash",
    AcceptsTheImpossible: "accounting",
    ShortTables: "accounting",
    RepeatsBlocks: "accounting",
    NamesStrangeBlocks: "accounting",
    AnswersInText: "crash",
    CountsTooFewFree: "accounting",
}


@pytest.mark.parametrize("factory", PLANTED, ids=lambda factory: factory.__name__)
def test_wrong_manager_is_found_out_in_few_operations(factory: type[PagedKVAdapter]) -> None:
    with pytest.raises(ViolationError) as caught:
        check_manager(factory, num_operations=2_000, namespaces=factory is MixesNamespaces)
    violation, program = caught.value, caught.value.program
    assert violation.kind == PLANTED[factory], f"{violation}\n" + "\n".join(violation.__notes__)
    assert program is not None
    assert len(program.operations) <= 12, violation.__notes__
    again = run_on_adapter(program.config, program.operations, factory)[1]
    assert again is not None
    assert str(again) == str(violation)
    assert violation.__notes__[-1].startswith("seed "), "the last note names the seed"


def test_violation_tells_the_operations_in_words() -> None:
    with pytest.raises(ViolationError) as caught:
        check_manager(KeepsBlocks, num_operations=200, block_sizes=(2,))
    first, *operations = caught.value.__notes__[0].split("\n")
    assert first.startswith("a manager of ")
    assert any(line.startswith("allocate 1: [") and line.endswith("0 tokens found") for line in operations)
    assert operations[-1].startswith("free 1")


def test_violation_that_does_not_come_again_says_so() -> None:
    made: list[PagedKVAdapter] = []

    def factory(num_blocks: int, block_size: int) -> ManagerAdapter:
        made.append((PagedKVAdapter if made else KeepsBlocks)(num_blocks, block_size))
        return made[-1]

    with pytest.raises(ViolationError) as caught:
        check_manager(factory, num_operations=50)
    assert caught.value.__notes__[0].startswith("the same operations do not fail on a second manager")


def test_factory_that_raises_is_a_crash() -> None:
    def factory(num_blocks: int, block_size: int) -> ManagerAdapter:
        raise KeyError(block_size)

    with pytest.raises(ViolationError, match="crash: made: KeyError"):
        check_manager(factory, num_operations=1)


def test_operation_that_means_nothing_here_is_passed_over() -> None:
    prompt = Prompt((0, 1))
    words, violation = run_on_adapter(ManagerConfig((6,), 2, 2), (MatchPrefix(prompt), Open((prompt,)), MatchPrefix(prompt)), Plain)
    assert violation is None
    assert [line.split()[0] for line in words] == ["a", "allocate", "free"]


@pytest.mark.parametrize("limits", [{"num_operations": 0}, {"max_num_blocks": 3}, {"block_sizes": ()}, {"block_sizes": (2, 0)}])
def test_limits_that_cannot_work_are_refused(limits: dict[str, int]) -> None:
    factory: AdapterFactory = PagedKVAdapter
    with pytest.raises(InvalidRequestError, match="at least 1, 4 and"):
        check_manager(factory, **limits)  # type: ignore[arg-type]
