"""What no manager, pool, cache or table takes. Afterwards the same object does its work as if nothing had been asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from malformed_support import Case, Unprintable, named, table

from pagedkv.core import BlockPool, KVCacheManager, PrefixCache, SequenceTable, Window
from pagedkv.errors import (
    ConfigError,
    InvalidRequestError,
    InvariantError,
    OutOfBlocksError,
    StaleHandleError,
    UnknownHandleError,
)

PROMPT = [5, 6, 7, 8, 9]


def make(**options: Any) -> KVCacheManager:
    return KVCacheManager(**{"num_blocks": 9, "block_size": 2, "max_num_seqs": 3, **options})


SETTINGS = table(
    ("num_blocks beyond int32", ConfigError, "num_blocks is 2147483648: it must be at most 2147483647", lambda _: make(num_blocks=2**31)),
    ("num_blocks beyond int32 in the second group", ConfigError, "num_blocks is 2147483648", lambda _: make(num_blocks=[4, 2**31])),
    ("num_blocks 1", ConfigError, "num_blocks is 1: it must be at least 2", lambda _: make(num_blocks=1)),
    ("num_blocks negative", ConfigError, "num_blocks is -3", lambda _: make(num_blocks=-3)),
    ("num_blocks None", ConfigError, "num_blocks is None", lambda _: make(num_blocks=None)),
    ("num_blocks float", ConfigError, "num_blocks is 9.0", lambda _: make(num_blocks=9.0)),
    ("num_blocks bool", ConfigError, "num_blocks is True", lambda _: make(num_blocks=True)),
    ("num_blocks text", ConfigError, "num_blocks is '9'", lambda _: make(num_blocks="9")),
    ("num_blocks empty", ConfigError, "num_blocks is empty", lambda _: make(num_blocks=[])),
    ("num_blocks list of text", ConfigError, "num_blocks is 'a'", lambda _: make(num_blocks=["a"])),
    ("num_blocks dict", ConfigError, "num_blocks is {4: 4}", lambda _: make(num_blocks={4: 4})),
    ("num_blocks unprintable", ConfigError, "num_blocks is <Unprintable", lambda _: make(num_blocks=Unprintable())),
    ("block_size 0", ConfigError, "block_size is 0", lambda _: make(block_size=0)),
    ("block_size float", ConfigError, "block_size is 2.5", lambda _: make(block_size=2.5)),
    ("block_size None", ConfigError, "block_size is None", lambda _: make(block_size=None)),
    ("block_size bool", ConfigError, "block_size is True", lambda _: make(block_size=True)),
    ("block_size text", ConfigError, "block_size is '16'", lambda _: make(block_size="16")),
    ("block_size beyond int32", ConfigError, "block_size is 2147483648", lambda _: make(block_size=2**31)),
    ("max_num_seqs 0", ConfigError, "max_num_seqs is 0", lambda _: make(max_num_seqs=0)),
    ("max_num_seqs float", ConfigError, "max_num_seqs is 3.0", lambda _: make(max_num_seqs=3.0)),
    (
        "max_num_seqs beyond int32",
        ConfigError,
        f"max_num_seqs is {2**62}: it must be at most 2147483647",
        lambda _: make(max_num_seqs=2**62),
    ),
    ("max_num_seqs None", ConfigError, "max_num_seqs is None", lambda _: make(max_num_seqs=None)),
    ("max_seq_len 0", ConfigError, "max_seq_len is 0", lambda _: make(max_seq_len=0)),
    ("max_seq_len text", ConfigError, "max_seq_len is 'long'", lambda _: make(max_seq_len="long")),
    ("max_seq_len bool", ConfigError, "max_seq_len is False", lambda _: make(max_seq_len=False)),
    ("enable_prefix_caching 1", ConfigError, "enable_prefix_caching is 1", lambda _: make(enable_prefix_caching=1)),
    ("enable_prefix_caching None", ConfigError, "enable_prefix_caching is None", lambda _: make(enable_prefix_caching=None)),
    ("check level unknown", ConfigError, "check is 'all': it must be one of off, step, audit", lambda _: make(check="all")),
    ("check level None", ConfigError, "check is None", lambda _: make(check=None)),
    ("policy that is not callable", ConfigError, "policy is 'lru'", lambda _: make(policy="lru")),
    ("windows empty", ConfigError, "windows is []: it must hold a Window or None for each", lambda _: make(windows=[])),
    ("windows a number", ConfigError, "windows is 4", lambda _: make(windows=4)),
    ("windows of another number", ConfigError, "windows is ", lambda _: make(num_blocks=[4, 4], windows=[None])),
    ("windows of numbers", ConfigError, "windows holds 4: each must be a Window or None", lambda _: make(windows=[None, 4])),
    ("windows of all groups", ConfigError, "the first layer group has a window", lambda _: make(windows=[Window.sliding(4)])),
    ("window of nothing", ConfigError, "window size is 0", lambda _: Window.sliding(0)),
    ("window beyond int32", ConfigError, "window size is 2147483648: it must be at most 2147483647", lambda _: Window.sliding(2**31)),
    ("window of a text", ConfigError, "window size is '4'", lambda _: Window.chunked("4")),  # type: ignore[arg-type]
    ("window of another kind", ConfigError, "window kind is 'round': it must be one of sliding, chunked", lambda _: Window("round", 4)),  # type: ignore[arg-type]
    ("pool of one block", ConfigError, "num_blocks is 1", lambda _: BlockPool(1)),
    ("pool of text", ConfigError, "num_blocks is '4'", lambda _: BlockPool("4")),  # type: ignore[arg-type]
    ("pool beyond int32", ConfigError, "it must be at most 2147483647", lambda _: BlockPool(2**62)),
    ("cache beyond int32", ConfigError, "it must be at most 2147483647", lambda _: PrefixCache(2**62, block_size=2)),
    (
        "cache of blocks beyond int32",
        ConfigError,
        "block_size is 2147483648: it must be at most 2147483647",
        lambda _: PrefixCache(4, block_size=2**31),
    ),
    ("cache of block_size 0", ConfigError, "block_size is 0", lambda _: PrefixCache(4, block_size=0)),
    ("table of 0 rows", ConfigError, "max_num_seqs is 0", lambda _: SequenceTable(0, num_groups=1, block_size=2, max_blocks=2)),
    ("table of text rows", ConfigError, "max_num_seqs is 'a'", lambda _: SequenceTable("a", num_groups=1, block_size=2, max_blocks=2)),  # type: ignore[arg-type]
    (
        "table of more rows than a handle can name",
        ConfigError,
        f"max_num_seqs is {2**62}: it must be at most {2**32 - 1}",
        lambda _: SequenceTable(2**62, num_groups=1, block_size=2, max_blocks=2),
    ),
    ("table of 0 groups", ConfigError, "num_groups is 0", lambda _: SequenceTable(2, num_groups=0, block_size=2, max_blocks=2)),
    ("table of empty blocks", ConfigError, "block_size is 0", lambda _: SequenceTable(2, num_groups=1, block_size=0, max_blocks=2)),
    ("table of half a block", ConfigError, "max_blocks is 0.5", lambda _: SequenceTable(2, num_groups=1, block_size=2, max_blocks=0.5)),  # type: ignore[arg-type]
)

TOKENS: list[tuple[str, object, str]] = [
    ("a float", [1, 1.5], "flat list of integers, got float64"),
    ("whole floats", [1.0, 2.0], "flat list of integers, got float64"),
    ("a bool among them", [True, 2], "a bool among them"),
    ("bools", [True], "got bool"),
    ("a numpy bool among them", [np.True_, 2], "a bool among them"),
    ("None", None, "got object"),
    ("None among them", [1, None], "got object"),
    ("text", "abc", "flat list of integers"),
    ("texts", ["1", "2"], "flat list of integers"),
    ("bytes", b"ab", "flat list of integers"),
    ("a dict", {1: 2}, "got object"),
    ("a set", {1, 2}, "got object"),
    ("lists", [[1, 2]], "of shape (1, 2)"),
    ("ragged lists", [[1], [1, 2]], "flat list of integers"),
    ("one number", 7, "of shape ()"),
    ("NaN", [float("nan")], "got float64"),
    ("negative", [3, -1], "from 0 to 2**31 - 1, got -1"),
    ("beyond int32", [2**31], "got 2147483648"),
    ("beyond int64", [2**70], "got object"),
    ("complex", [1j], "got complex128"),
    ("an unprintable object", Unprintable(), "Unprintable"),
]

COMMANDS = table(
    *((f"open with {name}", InvalidRequestError, words, lambda m, v=value: m.open([v])) for name, value, words in TOKENS),
    *((f"match with {name}", InvalidRequestError, words, lambda m, v=value: m.match(v)) for name, value, words in TOKENS),
    *((f"pin with {name}", InvalidRequestError, words, lambda m, v=value: m.pin(v)) for name, value, words in TOKENS),
    ("open None", InvalidRequestError, "prompts is None", lambda m: m.open(None)),
    ("open a number", InvalidRequestError, "prompts is 5", lambda m: m.open(5)),
    ("open a text", InvalidRequestError, "prompts is 'ab'", lambda m: m.open("ab")),
    ("open nothing known", InvalidRequestError, "a prompt is empty", lambda m: m.open([[]])),
    ("open too long", InvalidRequestError, "a prompt has 17 tokens, max_seq_len is 16", lambda m: m.open([[1] * 17])),
    ("open too many", InvalidRequestError, "raise max_num_seqs", lambda m: m.open([[1]] * 4)),
    ("open namespaces of another number", InvalidRequestError, "2 namespaces were given for 1", lambda m: m.open([[1]], ["a", "b"])),
    ("open namespaces a text", InvalidRequestError, "namespaces is 'a'", lambda m: m.open([[1]], "a")),
    ("open namespaces a number", InvalidRequestError, "namespaces is 3", lambda m: m.open([[1]], 3)),
    ("open namespace None", InvalidRequestError, "namespace is None", lambda m: m.open([[1]], [None])),
    ("open namespace number", InvalidRequestError, "namespace is 5", lambda m: m.open([[1]], [5])),
    ("open namespace bytes", InvalidRequestError, "namespace is b'a'", lambda m: m.open([[1]], [b"a"])),
    ("open namespace unhashable", InvalidRequestError, "namespace is []", lambda m: m.open([[1]], [[]])),
    ("open use_cache 1", InvalidRequestError, "use_cache is 1", lambda m: m.open([[1]], use_cache=1)),
    ("match namespace number", InvalidRequestError, "namespace is 5", lambda m: m.match([1], 5)),
    ("match namespace unhashable", InvalidRequestError, "namespace is {}", lambda m: m.match([1], {})),
    ("pin namespace None", InvalidRequestError, "namespace is None", lambda m: m.pin([1], None)),
    ("purge namespace number", InvalidRequestError, "namespace is 5", lambda m: m.purge(5)),
    ("purge namespace unhashable", InvalidRequestError, "namespace is []", lambda m: m.purge([])),
    ("unpin 0", UnknownHandleError, "pin 0 was never issued", lambda m: m.unpin(0)),
    ("unpin text", InvalidRequestError, "pin is 'a'", lambda m: m.unpin("a")),
    ("unpin None", InvalidRequestError, "pin is None", lambda m: m.unpin(None)),
    ("unpin float", InvalidRequestError, "pin is 1.0", lambda m: m.unpin(1.0)),
    ("unpin bool", InvalidRequestError, "pin is True", lambda m: m.unpin(True)),
)

HANDLES: list[tuple[str, object, type[Exception], str]] = [
    ("None", None, InvalidRequestError, "sequence handles must be a flat list"),
    ("a number", 5, InvalidRequestError, "of shape ()"),
    ("texts", ["a"], InvalidRequestError, "sequence handles must be a flat list"),
    ("floats", [1.5], InvalidRequestError, "got float64"),
    ("bools", [True], InvalidRequestError, "got bool"),
    ("lists", [[1]], InvalidRequestError, "of shape (1, 1)"),
    ("zero", [0], UnknownHandleError, "sequence handle 0 was never issued"),
    ("negative", [-1], UnknownHandleError, "sequence handle -1 was never issued"),
    ("far beyond", [2**62], UnknownHandleError, "was never issued"),
    ("beyond int64", np.array([2**63], dtype=np.uint64), InvalidRequestError, "below 2**63"),
]
CALLS = {
    "extend": lambda m, seqs: m.extend(seqs, 1),
    "num_blocks_needed": lambda m, seqs: m.num_blocks_needed(seqs, 1),
    "complete": lambda m, seqs: m.complete(seqs),
    "append": lambda m, seqs: m.append(seqs, [1]),
    "cancel": lambda m, seqs: m.cancel(seqs),
    "truncate": lambda m, seqs: m.truncate(seqs, [1]),
    "release": lambda m, seqs: m.release(seqs),
    "rows_of": lambda m, seqs: m.rows_of(seqs),
    "num_exclusive_blocks": lambda m, seqs: m.num_exclusive_blocks(seqs),
    "distrust": lambda m, seqs: m.distrust(seqs),
}
HANDLED = table(
    *(
        (f"{command} of {name}", error, words, lambda m, c=call, v=value: c(m, v))  # type: ignore[arg-type]
        for command, call in CALLS.items()
        for name, value, error, words in HANDLES
    )
)

NUMBERS: list[tuple[str, object]] = [
    ("floats", [1.5]),
    ("bools", [True]),
    ("None", None),
    ("texts", ["a"]),
    ("two", [1, 1]),
    ("vast", [2**40]),
]
ON_A_SEQUENCE = table(
    *((f"extend by {name}", InvalidRequestError, "num_new_tokens", lambda m, v=value: m.extend([m.seq], v)) for name, value in NUMBERS),
    *(
        (f"complete {name}", InvalidRequestError, "next_token_ids", lambda m, v=value: m.complete([m.seq], v))
        for name, value in NUMBERS
        if value
    ),
    *((f"append {name}", InvalidRequestError, "next_token_ids", lambda m, v=value: m.append([m.seq], v)) for name, value in NUMBERS),
    *((f"truncate to {name}", InvalidRequestError, "num_tokens", lambda m, v=value: m.truncate([m.seq], v)) for name, value in NUMBERS),
    ("extend by True", InvalidRequestError, "num_new_tokens", lambda m: m.extend([m.seq], True)),
    ("extend by 1.0", InvalidRequestError, "num_new_tokens", lambda m: m.extend([m.seq], 1.0)),
    ("extend by text", InvalidRequestError, "num_new_tokens", lambda m: m.extend([m.seq], "1")),
    ("extend by 0", InvalidRequestError, "cannot reserve 0 tokens", lambda m: m.extend([m.seq], 0)),
    ("extend beyond what is known", InvalidRequestError, "cannot reserve 6 tokens", lambda m: m.extend([m.seq], 6)),
    ("complete with a token below -1", InvalidRequestError, "token id -2 is below 0", lambda m: m.complete([m.seq], [-2])),
    ("append a token below -1", InvalidRequestError, "token id -2 is below 0", lambda m: m.append([m.seq], [-2])),
    ("truncate to 0", InvalidRequestError, "cannot truncate to [0]", lambda m: m.truncate([m.seq], [0])),
    ("truncate beyond", InvalidRequestError, "cannot truncate to [6]", lambda m: m.truncate([m.seq], [6])),
    ("fork 0", InvalidRequestError, "fork count is 0", lambda m: m.fork(m.seq, 0)),
    ("fork float", InvalidRequestError, "fork count is 1.5", lambda m: m.fork(m.seq, 1.5)),
    ("fork bool", InvalidRequestError, "fork count is True", lambda m: m.fork(m.seq, True)),
    ("fork None", InvalidRequestError, "fork count is None", lambda m: m.fork(m.seq, None)),
    ("fork of text", InvalidRequestError, "sequence handles must be", lambda m: m.fork("a", 1)),
    ("fork of a list", InvalidRequestError, "sequence handles must be", lambda m: m.fork([m.seq], 1)),
    ("fork beyond the rows", InvalidRequestError, "raise max_num_seqs", lambda m: m.fork(m.seq, 3)),
    ("twice in one call", InvalidRequestError, "given twice", lambda m: m.extend([m.seq, m.seq], 1)),
    ("another's handle", UnknownHandleError, "was never issued by this manager", lambda m: m.release([m.seq + (7 << 32)])),
)


def generate(manager: KVCacheManager) -> tuple[list[int], int]:
    """A healthy life: slots of prompt and one token, and what is found of it afterwards."""
    (seq,) = manager.open([PROMPT], ["healthy"]).seqs.tolist()
    row = int(manager.rows_of([seq])[0])
    manager.extend([seq], len(PROMPT) - int(manager.table.num_computed[row]))
    manager.complete([seq], [4])
    slots = list(manager.snapshot().sequences[-1].slots())
    manager.release([seq])
    return slots, manager.match(PROMPT, "healthy").num_tokens


class Running(KVCacheManager):
    """A manager with one sequence whose prompt waits to be computed."""

    seq = 0


@pytest.fixture(scope="module")
def manager() -> KVCacheManager:
    manager = make()
    generate(manager)
    return manager


@pytest.fixture(scope="module")
def running() -> Running:
    manager = Running(num_blocks=9, block_size=2, max_num_seqs=3)
    generate(manager)
    (manager.seq,) = manager.open([[1, 2, 3, 4, 5]]).seqs.tolist()
    return manager


@named(SETTINGS)
def test_setting_that_cannot_work_is_refused_by_name(case: Case) -> None:
    case.hold(None)


@named(COMMANDS + HANDLED)
def test_command_with_malformed_input_changes_nothing(case: Case, manager: KVCacheManager) -> None:
    hold(case, manager)


@named(ON_A_SEQUENCE)
def test_command_on_a_sequence_with_malformed_input_changes_nothing(case: Case, running: Running) -> None:
    hold(case, running)


def hold(case: Case, manager: KVCacheManager) -> None:
    want, before = generate(manager), manager.snapshot()
    case.hold(manager)
    assert manager.snapshot() == before
    manager.check()
    assert generate(manager) == want
    manager.check()


BLOCK_IDS: list[tuple[str, object, type[Exception], str]] = [
    ("the null block", np.array([0], dtype=np.int32), UnknownHandleError, "block 0"),
    ("a negative id", np.array([-2], dtype=np.int32), UnknownHandleError, "block -2"),
    ("an id beyond", np.array([9], dtype=np.int32), UnknownHandleError, "block 9"),
    ("floats", np.array([1.5]), InvalidRequestError, "block ids must be a flat list"),
    ("bools", [True], InvalidRequestError, "block ids must be a flat list"),
    ("texts", ["a"], InvalidRequestError, "block ids must be a flat list"),
    ("vast ids", [2**40], InvalidRequestError, "32-bit"),
    ("what is a block's id in its lowest 32 bits", [1 - 2**32], InvalidRequestError, "32-bit"),
    ("None", None, InvalidRequestError, "block ids must be a flat list"),
]
ON_BLOCKS = ("acquire", "release", "forget_cached", "is_cached", "is_shared")
POOL = table(
    *(
        (f"{command} of {name}", error, words, lambda pool, c=command, v=value: getattr(pool, c)(v))  # type: ignore[arg-type]
        for command in ON_BLOCKS
        for name, value, error, words in BLOCK_IDS
    ),
    ("take -1", InvalidRequestError, "asked for is -1", lambda pool: pool.take(-1)),
    ("take 1.5", InvalidRequestError, "asked for is 1.5", lambda pool: pool.take(1.5)),
    ("take True", InvalidRequestError, "asked for is True", lambda pool: pool.take(True)),
    ("take None", InvalidRequestError, "asked for is None", lambda pool: pool.take(None)),
    ("take more than there is", OutOfBlocksError, "needs 9 blocks, 6 are available", lambda pool: pool.take(9)),
    ("mark_cached a negative id", UnknownHandleError, "block -2", lambda pool: pool.mark_cached([-2])),
    ("mark_cached the null block", UnknownHandleError, "block 0", lambda pool: pool.mark_cached([0])),
    ("mark_cached beyond", UnknownHandleError, "block 9", lambda pool: pool.mark_cached([1, 9])),
    ("mark_cached a float", InvalidRequestError, "block ids must be", lambda pool: pool.mark_cached([1.5])),
    ("mark_cached a text", InvalidRequestError, "block ids must be", lambda pool: pool.mark_cached(["a"])),
    ("mark_cached a free block", InvariantError, "only a held block", lambda pool: pool.mark_cached([8])),
    ("release a free block", StaleHandleError, "block 8 is released more often", lambda pool: pool.release(np.array([8], np.int32))),
    ("acquire a free block", StaleHandleError, "block 8 is free", lambda pool: pool.acquire(np.array([8], np.int32))),
    ("forget what is not cached", InvariantError, "only a cached block", lambda pool: pool.forget_cached(np.array([1], np.int32))),
)


@named(POOL)
def test_pool_with_malformed_input_changes_nothing(case: Case) -> None:
    pool = BlockPool(9)
    pool.take(2)
    before = (pool.references.tolist(), pool.cached.tolist(), pool.num_free)
    case.hold(pool)
    assert (pool.references.tolist(), pool.cached.tolist(), pool.num_free) == before
    pool.check()
    assert pool.take(2).block_ids.tolist() == [3, 4]


CACHE = table(
    ("match root 0", InvalidRequestError, "root is 0", lambda cache: cache.match(0, np.array([1, 2], np.int32))),
    ("match root text", InvalidRequestError, "root is 'a'", lambda cache: cache.match("a", np.array([1, 2], np.int32))),
    ("match floats", InvalidRequestError, "token ids must be", lambda cache: cache.match(-1, np.array([1.5, 2.5]))),
    ("match None", InvalidRequestError, "token ids must be", lambda cache: cache.match(-1, None)),
    ("publish a negative id", UnknownHandleError, "block -2", lambda cache: cache.publish([-1], np.array([[3, 4]], np.int32), [-2], [-1])),
    ("publish the null block", UnknownHandleError, "block 0", lambda cache: cache.publish([-1], np.array([[3, 4]], np.int32), [0], [-1])),
    ("publish beyond", UnknownHandleError, "block 9", lambda cache: cache.publish([-1], np.array([[3, 4]], np.int32), [9], [-1])),
    ("publish without parents", InvalidRequestError, "0 parents", lambda cache: cache.publish([], np.array([[3, 4]], np.int32), [2], [-1])),
    ("remove a negative id", UnknownHandleError, "block -2", lambda cache: cache.remove(np.array([-2], np.int32))),
    ("remove beyond", UnknownHandleError, "block 9", lambda cache: cache.remove(np.array([9], np.int32))),
    ("remove twice", InvariantError, "only once", lambda cache: cache.remove(np.array([1, 1], np.int32))),
    ("remove what is not there", InvariantError, "only a published block", lambda cache: cache.remove(np.array([5], np.int32))),
    ("remove floats", InvalidRequestError, "block ids must be", lambda cache: cache.remove(np.array([1.5]))),
)


@named(CACHE)
def test_cache_with_malformed_input_changes_nothing(case: Case) -> None:
    cache = PrefixCache(9, block_size=2)
    assert cache.publish([-1], np.array([[1, 2]], dtype=np.int32), [1], [-1]) == [1]
    case.hold(cache)
    cache.check()
    assert cache.match(-1, np.array([1, 2, 3], dtype=np.int32)) == [1]
    assert len(cache) == 1
