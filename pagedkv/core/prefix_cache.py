"""Which full block holds which tokens after which parent: exact content, no hash to trust.

Owns the map from (namespace, parent block, token ids) to block, and the tree that it forms. Does not own reference counts or the order of
eviction (``BlockPool``): it is told which blocks went.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import NoReturn

import numpy as np

from pagedkv.checks import integer
from pagedkv.core.arguments import as_block_ids, as_tokens
from pagedkv.errors import InvalidRequestError, InvariantError, UnknownHandleError
from pagedkv.plan import Int32Array

_ID_NBYTES = 4
_KEY_DTYPE = np.dtype("<i4")
_PACK_ID = struct.Struct("<i").pack
_UNPACK_ID = struct.Struct("<i").unpack_from
_MAX_ROOTS = 2**31 - 1


class PrefixCache:
    """Finds published blocks by exact tokens.

    A key is the parent's block id followed by the block's token ids, as bytes. The first block of a chain has its namespace's *root* for a
    parent: a negative number that is never given out twice, so chains of two namespaces never meet. A parent's id cannot come to mean
    something else while a child is cached, because a block with cached children is never evicted (see ``remove``).

    Args:
        num_blocks: size of the id space.
        block_size: tokens in a block.

    Raises:
        ConfigError: a size that is not such an integer.

    Memory: 24 bytes a block, plus about 160 for each published one at 16 tokens a block (key and map entry).
    """

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        integer("num_blocks", num_blocks, least=2, most=2**31 - 1)
        integer("block_size", block_size, least=1, most=2**31 - 1)
        self._blocks: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_blocks
        self._width = block_size * _ID_NBYTES
        # Lists, not arrays: they are read and written a block at a time, which costs a list a fifth of what it costs an array.
        self._roots = [0] * num_blocks  # 0: not published
        self._num_children = [0] * num_blocks

    def __len__(self) -> int:
        """Published blocks."""
        return len(self._blocks)

    def match(self, root: int, token_ids: Int32Array) -> list[int]:
        """Block ids of the longest published chain that the tokens begin with; changes nothing.

        Cost: O(blocks matched), about 0.3 microseconds each.
        """
        if not isinstance(token_ids, np.ndarray) or token_ids.dtype != _KEY_DTYPE or token_ids.ndim != 1:
            token_ids = as_tokens(token_ids)
        if type(root) is not int or not -_MAX_ROOTS <= root < 0:
            root = integer("root", root, least=-_MAX_ROOTS, most=-1, error=InvalidRequestError)
        width = self._width
        raw = token_ids.astype(_KEY_DTYPE, copy=False).tobytes()
        find = self._blocks.get
        found: list[int] = []
        parent: int | None = root
        for start in range(0, len(raw) - width + 1, width):
            parent = find(_PACK_ID(parent) + raw[start : start + width])
            if parent is None:
                break
            found.append(parent)
        return found

    def publish(self, parents: Sequence[int], token_ids: Int32Array, block_ids: Sequence[int], roots: Sequence[int]) -> list[int]:
        """Make full blocks findable, one for each of ``n`` sequences; where the content is published already, say by which block.

        Lists, not arrays: they come a few at a time, and each is looked at one by one.

        Args:
            parents: ``n`` ids of the block before, or the root for a sequence's first block.
            token_ids: ``[n, B]`` int32 contents.
            block_ids: ``n`` ids of the blocks that hold them.
            roots: ``n`` namespace roots.

        Returns:
            ``n`` ids, the block that holds each content from now on: the given one, or an older twin.

        Raises:
            UnknownHandleError: a block outside the id space, or the null block.
            InvalidRequestError: lists of different lengths.

        Cost: about 0.5 microseconds a block.
        """
        if not len(parents) == len(token_ids) == len(block_ids) == len(roots):
            raise InvalidRequestError(f"{len(block_ids)} blocks, {len(parents)} parents, {len(token_ids)} contents and {len(roots)} roots")
        if block_ids and not (min(block_ids) > 0 and max(block_ids) < len(self._keys)):
            self._refuse(block_ids)
        holders: list[int] = []
        self._claim(parents, token_ids, block_ids, roots, holders)
        return holders

    def publish_chain(self, parent: int, token_ids: Int32Array, block_ids: Int32Array, root: int) -> Int32Array:
        """Make consecutive full blocks of one sequence findable.

        Like ``publish``, for ``[k, B]`` tokens in ``[k]`` blocks that follow each other; each block's parent is the holder found for the
        one before it.
        """
        holders: list[int] = []
        # Each block's parent stands in the list of holders by the time that it is asked for.
        self._claim(chain([parent], holders), token_ids, block_ids.tolist(), repeat(root), holders)
        return np.array(holders, dtype=np.int32)

    def remove(self, block_ids: Int32Array) -> None:
        """Forget published blocks, whose bytes are about to be reused.

        Raises:
            UnknownHandleError: a block outside the id space, or the null block.
            InvariantError: a block is not published, or a published block would outlive its parent. Nothing was changed.
        """
        ids = as_block_ids(block_ids).tolist()
        if ids and not (min(ids) > 0 and max(ids) < len(self._keys)):
            self._refuse(ids)
        keys = [self._keys[block] for block in ids]
        if None in keys or len(set(ids)) < len(ids):
            raise InvariantError("prefix cache: only a published block can be removed, and only once")
        parents = [_parent_of(key) for key in keys if key is not None]
        children = self._num_children
        for parent in parents:
            children[parent] -= 1
        orphans = [block for block in ids if children[block]]
        if orphans:
            for parent in parents:
                children[parent] += 1
            raise InvariantError(
                f"prefix cache: block {orphans[0]} is to go before blocks that continue it; the eviction policy must pop leaves first"
            )
        for block, key in zip(ids, keys, strict=True):
            del self._blocks[key]
            self._keys[block] = None
            self._roots[block] = 0

    def blocks_of(self, root: int) -> Int32Array:
        """Published blocks of one namespace; O(blocks)."""
        return np.flatnonzero(np.array(self._roots) == root).astype(np.int32)

    def published(self) -> set[int]:
        """All published blocks; O(published blocks)."""
        return set(self._blocks.values())

    def roots_of(self, block_ids: Iterable[int]) -> list[int]:
        """The namespace root of each of these blocks, 0 for one that is not published."""
        roots = self._roots
        return [roots[block] for block in block_ids]

    def continuations_of(self, block_ids: Int32Array) -> Int32Array:
        """These published blocks and all that continue them, ascending; O(published blocks)."""
        children: dict[int, list[int]] = {}
        for key, block in self._blocks.items():
            children.setdefault(_parent_of(key), []).append(block)
        found = dict.fromkeys(block_ids.tolist())
        unseen = list(found)
        while unseen:
            fresh = [block for block in children.get(unseen.pop(), ()) if block not in found]
            found.update(dict.fromkeys(fresh))
            unseen += fresh
        return np.array(sorted(found), dtype=np.int32)

    def live_roots(self) -> Int32Array:
        """Roots that have published blocks; O(blocks)."""
        return np.array(sorted(set(self._roots) - {0}), dtype=np.int32)

    def check(self) -> None:
        """Verify that keys, blocks, roots and counts of children agree; O(blocks).

        Raises:
            InvariantError: naming the first that does not hold.
        """
        keys, roots, children = self._keys, self._roots, [0] * len(self._keys)
        for key, block in self._blocks.items():
            if keys[block] != key:
                raise InvariantError(f"prefix cache: block {block} is found by a key that it does not carry")
            (parent,) = _UNPACK_ID(key)
            root = parent
            if parent > 0:
                root = roots[parent]
                if keys[parent] is None:
                    raise InvariantError(f"prefix cache: block {block} outlived its parent {parent}")
            if roots[block] != root:
                raise InvariantError(f"prefix cache: block {block} is in another namespace than its parent")
            children[parent if parent > 0 else 0] += 1
        if children != self._num_children:
            raise InvariantError("prefix cache: a block's count of children is wrong")
        if keys.count(None) != roots.count(0) or len(keys) - keys.count(None) != len(self._blocks):
            raise InvariantError("prefix cache: a block carries a key or a namespace without being findable")

    def _refuse(self, block_ids: Sequence[int]) -> NoReturn:
        wrong = next(block for block in block_ids if not 0 < block < len(self._keys))
        raise UnknownHandleError(f"block {wrong} is not one of 1 to {len(self._keys) - 1} (0 is the null block)")

    def _claim(
        self, parents: Iterable[int], token_ids: Int32Array, block_ids: Sequence[int], roots: Iterable[int], holders: list[int]
    ) -> None:
        """Make blocks findable one after the other, and append to ``holders`` who holds each content, the same block or an older one."""
        raw, width, end = token_ids.astype(_KEY_DTYPE, copy=False).tobytes(), self._width, 0
        claim, keys, owners, children = self._blocks.setdefault, self._keys, self._roots, self._num_children
        for block, parent, root in zip(block_ids, parents, roots, strict=False):
            start, end = end, end + width
            key = _PACK_ID(parent) + raw[start:end]
            holder = claim(key, block)
            if holder == block and keys[block] is None:
                keys[block] = key
                owners[block] = root
                children[parent if parent > 0 else 0] += 1  # the null block stands for the roots
            holders.append(holder)


def _parent_of(key: bytes) -> int:
    """The parent's block id; the null block for a namespace's root."""
    return max(int.from_bytes(key[:_ID_NBYTES], "little", signed=True), 0)


class Namespaces:
    """Gives every namespace a root: a negative number that is never given out twice.

    Owns names and roots. Names that neither a sequence nor a published block uses are swept out when many have come together, so that
    endless fresh salts take bounded memory.
    """

    def __init__(self) -> None:
        self._roots: dict[str, int] = {}
        self._next = -1
        self._sweep_at = 1024

    def __len__(self) -> int:
        return len(self._roots)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that have a root."""
        return tuple(self._roots)

    def find(self, name: str) -> int | None:
        """The namespace's root, if it has one; changes nothing."""
        return self._roots.get(name)

    def intern(self, name: str) -> int:
        """The namespace's root, made on first use.

        Raises:
            InvariantError: 2**31 - 1 namespaces have been made.
        """
        root = self._roots.get(name)
        if root is None:
            if -self._next > _MAX_ROOTS:
                raise InvariantError("no more namespaces can be told apart; make a new manager")
            root = self._roots[name] = self._next
            self._next -= 1
        return root

    def forget(self, name: str) -> None:
        """Drop a name; its next use gets a fresh root, which matches nothing that was published before."""
        self._roots.pop(name, None)

    @property
    def crowded(self) -> bool:
        """Whether it is time to ``sweep``."""
        return len(self._roots) >= self._sweep_at

    def sweep(self, used: set[int]) -> None:
        """Drop the names whose roots are not in ``used``; O(names), paid for by the names that came since the last sweep."""
        self._roots = {name: root for name, root in self._roots.items() if root in used}
        self._sweep_at = max(1024, 2 * len(self._roots))
