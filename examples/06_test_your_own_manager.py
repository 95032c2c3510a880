"""Your own block manager under the kit's generators and oracles: an adapter, one call, and a bug told in the fewest operations.

    python examples/06_test_your_own_manager.py

Runs without torch, on a small manager written here; and on nano-vLLM's and vLLM's managers where they can be imported, through the adapters
in nano_vllm_adapter.py and vllm_adapter.py.
"""

from collections.abc import Sequence

from nano_vllm_adapter import NanoAdapter
from vllm_adapter import VllmAdapter

from pagedkv.testing.manager_check import check_manager
from pagedkv.testing.violations import ViolationError


class SmallManager:
    """A free list and block tables, nothing shared. These six methods are the whole adapter protocol (``pagedkv.testing.adapters``)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size, self.ids = block_size, list(range(num_blocks))
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        self.tables[seq_id], self.lengths[seq_id] = [], 0
        if not self.grow(seq_id, len(token_ids)):
            self.free(seq_id)
            return None
        return 0  # tokens were found in a cache: nothing is shared here

    def append(self, seq_id: int, token_id: int) -> bool:
        return self.grow(seq_id, 1)

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        needed = -(-(self.lengths[seq_id] + num_tokens) // self.size) - len(self.tables[seq_id])
        if needed > len(self.ids):
            return False
        self.tables[seq_id] += [self.ids.pop() for _ in range(needed)]
        self.lengths[seq_id] += num_tokens
        return True

    def computed(self, seq_id: int) -> None: ...

    def block_ids(self, seq_id: int) -> Sequence[int]:
        return self.tables[seq_id]

    def free(self, seq_id: int) -> None:
        self.ids += self.tables.pop(seq_id)  # a second time raises KeyError

    def num_free_blocks(self) -> int:
        return len(self.ids)


class Forgetful(SmallManager):
    def free(self, seq_id: int) -> None:
        self.ids += self.tables.get(seq_id, [])  # the planted bug: the table stays, so a second time frees the same blocks again


print("the small manager:", check_manager(SmallManager, num_operations=1_000))
found = None
try:
    check_manager(Forgetful, num_operations=1_000)
except ViolationError as violation:
    found = violation
assert found is not None, "the planted bug was not found"
assert found.kind == "atomicity"
assert found.program is not None
assert len(found.program.operations) <= 3
print(f"with a planted bug: {found}", *found.__notes__, sep="\n")

for adapter in (NanoAdapter, VllmAdapter):
    try:
        print(f"{adapter.__name__}:", check_manager(adapter, num_operations=1_000, block_sizes=(2, 3, 4)))
    except ViolationError as violation:
        if not isinstance(violation.__cause__, ImportError):
            raise
        print(f"{adapter.__name__}: not tried, {violation.__cause__}")
