"""The bookkeeping alone, inside a toy engine: numpy and the standard library, no torch.

    python examples/01_bookkeeping_only.py

The "model" is a hash: the next token depends on every earlier one, so a wrong block anywhere changes all that follows. What a real engine
stores as K/V is here the token itself, in an array of slots. Requests come with a shared prefix, one of them wants three continuations,
and the pool is so small that some are preempted. All outputs equal those of the plain loop without any cache.
"""

import sys
import zlib

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig

BLOCK_SIZE, NUM_BLOCKS, MAX_TOKENS = 4, 26, 20


def toy_model(tokens: list[int], sample: int) -> int:
    """The next of 1,000 tokens after these, for one of a request's samples."""
    return zlib.crc32(np.array([sample, *tokens], dtype=np.int64).tobytes()) % 1000


def without_cache(prompt: list[int], sample: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        tokens.append(toy_model(tokens, sample))
    return tokens[len(prompt) :]


prefix = list(range(100, 114))  # 14 tokens: three full blocks and a half-full one
requests = [
    Request("first", [*prefix, 1, 2, 3], max_tokens=MAX_TOKENS),
    Request("second", [*prefix, 4], max_tokens=MAX_TOKENS),
    Request("three at once", [*prefix, 5, 6, 7, 8], max_tokens=MAX_TOKENS, n=3),
    Request("something else", [9, 9, 9], max_tokens=MAX_TOKENS),
]

manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
scheduler = Scheduler(manager, SchedulerConfig(max_num_batched_tokens=16))
for request in requests:
    scheduler.submit(request)

slots = np.full((NUM_BLOCKS, BLOCK_SIZE), -1)  # what a real engine keeps as K/V
sample_of_row: dict[int, int] = {}  # which of the request's samples each row of the block tables works on
outputs: dict[tuple[str, int], list[int]] = {}
while (plan := scheduler.plan()) is not None:
    for assignment in scheduler.take_assignments():
        sample_of_row[assignment.row] = assignment.index
    for source, target in plan.copies[0]:  # copy-on-write: a shared block is about to be written
        print(f"step {plan.step:2d}: block {source} is shared, its copy {target} is written instead")
        slots[target] = slots[source]
    slots.reshape(-1)[plan.slot_mapping[0]] = plan.token_ids  # the "forward pass" stores every token of the step ...
    sampled = []
    for seq in plan.sampling_seqs:  # ... and reads each sequence back through its block table
        row, length = int(plan.rows[seq]), int(plan.seq_lens[seq])
        tokens = slots[plan.block_tables[0, row]].reshape(-1)[:length].tolist()
        sampled.append(toy_model(tokens, sample_of_row[row]))
    scheduler.complete(plan, np.array(sampled, dtype=np.int32))
    for branch in scheduler.take_ended():
        outputs[branch.request.request_id, branch.index] = branch.output_token_ids.tolist()
    manager.check()  # every invariant, after every step

for request in requests:
    record = scheduler.record(request.request_id)
    print(f"\n{request.request_id}: {record.num_cached_tokens} prompt tokens from the cache, {record.num_preemptions} preemptions")
    for event in record.events:
        print(f"    {event}")
    for sample in range(request.n):
        assert outputs[request.request_id, sample] == without_cache(request.prompt_token_ids.tolist(), sample)

statistics = manager.statistics()
print(f"\n{statistics.num_hit_tokens} prompt tokens found, {statistics.num_copies} blocks copied before a write, ", end="")
print(f"{scheduler.num_preemptions} preemptions; all {len(outputs)} outputs are right, and torch was not imported")
assert min(statistics.num_hit_tokens, statistics.num_copies, scheduler.num_preemptions) > 0
assert manager.num_available_blocks == manager.num_usable_blocks
assert "torch" not in sys.modules
