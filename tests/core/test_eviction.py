"""The order of ``LeastRecentlyUsed`` against a plain list."""

from __future__ import annotations

import random

import pytest
from core_helpers import ids

from pagedkv.core import BlockPool, EvictionPolicy, LeastRecentlyUsed
from pagedkv.errors import InvariantError


def test_pop_gives_the_oldest_first() -> None:
    policy = LeastRecentlyUsed(8)
    policy.insert(ids(3, 1))
    policy.insert(ids(5))
    assert len(policy) == 3
    assert policy.pop(2).tolist() == [3, 1]
    assert policy.pop(1).tolist() == [5]
    assert len(policy) == 0


def test_pop_after_removal_skips_what_is_gone() -> None:
    policy = LeastRecentlyUsed(8)
    policy.insert(ids(1, 2, 3, 4))
    policy.remove(ids(1, 3))
    assert len(policy) == 2
    assert policy.pop(2).tolist() == [2, 4]


def test_insert_again_makes_it_the_youngest() -> None:
    policy = LeastRecentlyUsed(8)
    policy.insert(ids(1, 2))
    policy.remove(ids(1))
    policy.insert(ids(1))
    assert policy.pop(2).tolist() == [2, 1]


@pytest.mark.parametrize("held", [0, 2])
def test_pop_more_than_there_are_is_refused(held: int) -> None:
    policy = LeastRecentlyUsed(8)
    policy.insert(ids(*range(1, held + 1)))
    with pytest.raises(InvariantError, match=f"{held + 1} blocks are to be evicted and {held} can be"):
        policy.pop(held + 1)
    assert len(policy) == held


def test_pop_nothing_gives_nothing() -> None:
    assert LeastRecentlyUsed(4).pop(0).tolist() == []


def test_order_under_random_use_is_that_of_a_list() -> None:
    for seed in range(12):
        rng = random.Random(seed)
        size = rng.choice([2, 5, 300])
        policy, model = LeastRecentlyUsed(size), list[int]()
        for _ in range(300):
            free = [block for block in range(1, size) if block not in model]
            kind = rng.random()
            if kind < 0.5 and free:
                chosen = rng.sample(free, rng.randint(1, len(free)))
                policy.insert(ids(*chosen))
                model += chosen
            elif kind < 0.8 and model:
                chosen = rng.sample(model, rng.randint(1, len(model)))
                policy.remove(ids(*chosen))
                model = [block for block in model if block not in chosen]
            else:
                count = rng.randint(0, len(model))
                assert policy.pop(count).tolist() == model[:count], f"seed {seed}"
                del model[:count]
            assert len(policy) == len(model), f"seed {seed}"


class MostRecentlyUsed(LeastRecentlyUsed):
    """Evicts what was let go of last: no leaf first, so the prefix cache has to object."""

    def pop(self, count: int) -> object:  # type: ignore[override]
        everything = super().pop(len(self))
        self.insert(everything[: len(everything) - count])
        return everything[len(everything) - count :][::-1]


def test_pool_takes_victims_from_the_policy_it_was_given() -> None:
    policy: EvictionPolicy = MostRecentlyUsed(4)
    pool = BlockPool(4, policy=policy)
    blocks = pool.take(3).block_ids
    pool.mark_cached(blocks)
    pool.release(blocks)
    assert pool.take(2).evicted.tolist() == [3, 2]
    pool.check()
