"""Which running rows are computing the beginning of which prompts. Owns an index, nothing else; stale entries are dropped when met."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pagedkv.plan import Int32Array
from pagedkv.scheduling.request import Branch


class PrefixesInFlight:
    """Finds running branches by namespace and first block of their prompt, exactly.

    Args:
        block_size: tokens in a block.
        is_prefilling: whether a branch still computes its prompt in the row it has.
    """

    def __init__(self, block_size: int, is_prefilling: Callable[[Branch], bool]) -> None:
        self._size = block_size
        self._is_prefilling = is_prefilling
        self._branches: dict[tuple[str, bytes], list[Branch]] = {}

    def add(self, branch: Branch) -> None:
        """Note a branch that starts computing its prompt; prompts shorter than a block have nothing to share."""
        key = self._key(branch.request.namespace, branch.token_ids)
        if key is not None:
            # Without those that have finished: an endless stream of one prompt must not grow the list.
            self._branches[key] = [*filter(self._is_prefilling, self._branches.get(key, ())), branch]

    def find(self, namespace: str, token_ids: Int32Array) -> Iterator[Branch]:
        """Branches that are computing a prompt with the same first block, in order of admission.

        Cost: amortised O(branches found): what has finished its prompt is dropped.
        """
        key = self._key(namespace, token_ids)
        if key is None or key not in self._branches:
            return
        alive = [branch for branch in self._branches[key] if self._is_prefilling(branch)]
        if alive:
            self._branches[key] = alive
        else:
            del self._branches[key]
        yield from alive

    def sweep(self) -> None:
        """Drop all that has finished its prompt; O(entries)."""
        for key, branches in list(self._branches.items()):
            alive = [branch for branch in branches if self._is_prefilling(branch)]
            if alive:
                self._branches[key] = alive
            else:
                del self._branches[key]

    def __len__(self) -> int:
        return len(self._branches)

    def _key(self, namespace: str, token_ids: Int32Array) -> tuple[str, bytes] | None:
        return (namespace, token_ids[: self._size].tobytes()) if len(token_ids) > self._size else None
