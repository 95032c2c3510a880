"""Bugs of attention kernels, planted one at a time: ``check_attention_backend`` finds each, and says so on a small step.

``Kernel`` is right, with a method for each decision that a kernel makes; every bug gets one of them wrong.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionSpec, Mask, StepAttention
from pagedkv.attention.protocol import write_step
from pagedkv.storage import LayerPool, StepBatch
from pagedkv.testing.conformance import check_attention_backend
from pagedkv.testing.violations import ViolationError

MAX_CASES = 20


class Kernel:
    name = "kernel"

    def supports(self, spec: AttentionSpec) -> str | None:
        return None

    def plan(self, batch: StepBatch) -> StepAttention:
        return StepAttention(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        write_step(pool, key, value, step.batch)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        plan = step.batch.plan
        output = query.new_zeros(query.shape[0], query.shape[1], pool.spec.value_dim)
        for seq in range(plan.num_seqs):
            first, end = int(plan.cu_seqlens_q[seq]), int(plan.cu_seqlens_q[seq + 1])
            length = self.length(step.batch, seq)
            key, value = pool.gather(self.table(step.batch, pool, seq).long(), length)
            queries = self.positions(length, end - first)[:, None]
            seen = self.visible(options.mask, queries, torch.arange(length), step)
            key, value = key.double(), self.hidden_zeroed(value.double(), seen)
            for head in range(query.shape[1]):
                kv_head = self.kv_head(head, query.shape[1], pool.spec.num_kv_heads)
                scores = self.scores(query[first:end, head].double(), key[kv_head], options, pool)
                scores = self.biased(scores, options, head, torch.arange(length) - queries)
                output[first:end, head] = self.weights(self.masked(scores, seen, options), options, head, queries) @ value[kv_head]
        return output

    def length(self, batch: StepBatch, seq: int) -> int:
        return int(batch.plan.seq_lens[seq])

    def table(self, batch: StepBatch, pool: LayerPool, seq: int) -> Tensor:
        return batch.block_tables[pool.spec.group, seq]

    def positions(self, length: int, num_queries: int) -> Tensor:
        return torch.arange(length - num_queries, length)

    def visible(self, mask: Mask, query: Tensor, key: Tensor, step: StepAttention) -> Tensor:
        return mask.visible(query, key)

    def kv_head(self, head: int, num_heads: int, num_kv_heads: int) -> int:
        return head // (num_heads // num_kv_heads)

    def hidden_zeroed(self, value: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen.any(dim=0)[:, None], value, 0)

    def scores(self, query: Tensor, key: Tensor, options: AttendOptions, pool: LayerPool) -> Tensor:
        return self.capped(query @ key.T * options.scale, options)

    def capped(self, scores: Tensor, options: AttendOptions) -> Tensor:
        return scores if options.softcap is None else options.softcap * torch.tanh(scores / options.softcap)

    def biased(self, scores: Tensor, options: AttendOptions, head: int, distance: Tensor) -> Tensor:
        return scores if options.alibi_slopes is None else scores + options.alibi_slopes[head].double() * distance

    def masked(self, scores: Tensor, seen: Tensor, options: AttendOptions) -> Tensor:
        return torch.where(seen, scores, -torch.inf)

    def weights(self, scores: Tensor, options: AttendOptions, head: int, queries: Tensor) -> Tensor:
        if options.sinks is None:
            return torch.softmax(scores, dim=1)
        sink = options.sinks[head].double().expand(len(scores), 1)
        return torch.softmax(torch.cat([scores, sink], dim=1), dim=1)[:, :-1]


# Who sees what.


class WindowOneShort(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(mask, query, key, step) & ((key > query - mask.size + 1) | (mask.kind != "sliding") | (mask.size == 1))


class WindowOneWide(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(Mask.sliding(mask.size + 1) if mask.kind == "sliding" else mask, query, key, step)


class WindowIgnored(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(Mask.causal() if mask.kind == "sliding" else mask, query, key, step)


class WindowIgnoredInDecodes(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(Mask.causal() if len(query) == 1 else mask, query, key, step)


class ChunkTakenForWindow(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(Mask.sliding(mask.size) if mask.kind == "chunked" else mask, query, key, step)


class SeesTheNextToken(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(mask, query + 1, key, step)


class DoesNotSeeItself(Kernel):
    def visible(self, mask, query, key, step):
        return super().visible(mask, query, key, step) & ((key < query) | (query == 0) | (mask.size == 1))


class ForgetsThePast(Kernel):
    def positions(self, length, num_queries):
        return torch.arange(num_queries)


class FirstLayersMaskForAll(Kernel):
    def plan(self, batch):
        self.first = None
        return super().plan(batch)

    def visible(self, mask, query, key, step):
        self.first = self.first or mask
        return super().visible(self.first, query, key, step)


# Which bytes.


class OneSlotPastTheEnd(Kernel):
    def length(self, batch, seq):
        room = batch.block_tables.shape[2] * batch.block_size
        return min(super().length(batch, seq) + 1, room)

    def positions(self, length, num_queries):
        return super().positions(length - 1, num_queries) + 1


class LengthOfTheFirstForAll(Kernel):
    def length(self, batch, seq):
        return (
            min(int(batch.plan.seq_lens[0]), super().length(batch, seq)) if batch.plan.query_lens[seq] == 1 else super().length(batch, seq)
        )


class TablesOfTheFirstLayerGroup(Kernel):
    def table(self, batch, pool, seq):
        return batch.block_tables[0, seq]


class TablesByPlaceNotByRow(Kernel):
    def table(self, batch, pool, seq):
        return torch.from_numpy(batch.plan.block_tables[pool.spec.group, seq, : batch.block_tables.shape[2]].copy())


class BlocksInOrder(Kernel):
    def table(self, batch, pool, seq):
        return super().table(batch, pool, seq).sort(descending=True).values


class MultipliesHiddenValues(Kernel):
    def hidden_zeroed(self, value, seen):
        return value


class QueryTakenAsContiguous(Kernel):
    def attend(self, query, pool, step, options):
        return super().attend(query.as_strided(query.shape, query.new_empty(query.shape).stride()), pool, step, options)


class KeysTakenAsContiguous(Kernel):
    def write(self, pool, key, value, step):
        write_step(pool, key.as_strided(key.shape, key.new_empty(key.shape).stride()), value, step.batch)


class NeighbourKvHead(Kernel):
    def kv_head(self, head, num_heads, num_kv_heads):
        return head % num_kv_heads


class FirstKvHeadForAll(Kernel):
    def kv_head(self, head, num_heads, num_kv_heads):
        return 0


# What is computed.


class ScaleByValueWidth(Kernel):
    def scores(self, query, key, options, pool):
        return super().scores(query * (pool.spec.key_dim / pool.spec.value_dim) ** 0.5, key, options, pool)


class ScaleOfItsOwn(Kernel):
    def scores(self, query, key, options, pool):
        return self.capped(query @ key.T * pool.spec.key_dim**-0.5, options)


class CapBeforeScale(Kernel):
    def scores(self, query, key, options, pool):
        return self.capped(query @ key.T, options) * options.scale


class CapForgotten(Kernel):
    def capped(self, scores, options):
        return scores


class CapAfterMask(Kernel):
    def masked(self, scores, seen, options):
        return self.capped(super().masked(scores, seen, options), options)


class CapAfterSlopes(Kernel):
    def scores(self, query, key, options, pool):
        return query @ key.T * options.scale

    def biased(self, scores, options, head, distance):
        return self.capped(super().biased(scores, options, head, distance), options)


class MaskedScoreIsFinite(Kernel):
    def masked(self, scores, seen, options):
        return torch.where(seen, scores, -10.0)


class SlopesUpsideDown(Kernel):
    def biased(self, scores, options, head, distance):
        return super().biased(scores, options, head, -distance)


class SlopesByKeyPosition(Kernel):
    """The same without sinks, since a softmax does not see what all scores share."""

    def biased(self, scores, options, head, distance):
        return super().biased(scores, options, head, distance - distance[:, :1])


class SlopeOfTheFirstHead(Kernel):
    def biased(self, scores, options, head, distance):
        return super().biased(scores, options, 0, distance)


class SinkForgotten(Kernel):
    def weights(self, scores, options, head, queries):
        return torch.softmax(scores, dim=1)


class SinkOfTheFirstHead(Kernel):
    def weights(self, scores, options, head, queries):
        return super().weights(scores, options, 0, queries)


class MaximumNotSubtracted(Kernel):
    def weights(self, scores, options, head, queries):
        exponentials = scores.float().exp()
        sink = 0 if options.sinks is None else options.sinks[head].exp()
        return (exponentials / (exponentials.sum(dim=1, keepdim=True) + sink)).double()


class WeightsInHalfPrecision(Kernel):
    def weights(self, scores, options, head, queries):
        return super().weights(scores, options, head, queries).half().double()


# What is given back, and what is written.


class ResultInFloat32(Kernel):
    def attend(self, query, pool, step, options):
        return super().attend(query, pool, step, options).float()


class ResultForgotten(Kernel):
    def attend(self, query, pool, step, options):
        super().attend(query, pool, step, options)


class ScalesTheQueryInPlace(Kernel):
    def attend(self, query, pool, step, options):
        output = super().attend(query, pool, step, options)
        query.mul_(options.scale)
        return output


class ZeroesStaleValuesInThePool(Kernel):
    def attend(self, query, pool, step, options):
        pool.value.nan_to_num_(0.0)
        return super().attend(query, pool, step, options)


class ValuesNotWritten(Kernel):
    def write(self, pool, key, value, step):
        write_step(pool, key, torch.zeros_like(value), step.batch)


class LastTokenNotWritten(Kernel):
    def write(self, pool, key, value, step):
        batch, group = step.batch, pool.spec.group
        pool.write(key[:-1], value[:-1], blocks=batch.slot_blocks[group][:-1], offsets=batch.slot_offsets[group][:-1])


class WritesWhereTheFirstLayerGroupDoes(Kernel):
    def write(self, pool, key, value, step):
        pool.write(key, value, blocks=step.batch.slot_blocks[0], offsets=step.batch.slot_offsets[0])


class BlocksOf16InThePromise(Kernel):
    def write(self, pool, key, value, step):
        slots = step.batch.slot_mapping[pool.spec.group]
        pool.write(key, value, blocks=slots // 16, offsets=slots % 16)


BUGS = Kernel.__subclasses__()


def test_kernel_without_a_bug_passes() -> None:
    assert check_attention_backend(Kernel(), num_cases=MAX_CASES).num_run == MAX_CASES


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_kernel_bug_is_found_and_shown_on_a_small_step(bug: type[Kernel], record_property: pytest.RecordProperty) -> None:
    with pytest.raises(ViolationError) as caught:
        check_attention_backend(bug(), num_cases=MAX_CASES)
    error = caught.value
    found = re.search(r"found at case (\d+)", "".join(error.__notes__))
    assert found is not None
    record_property("cases_to_kill", int(found[1]) + 1)
    print(f"{bug.__name__}: killed by case {int(found[1]) + 1}; {error}")
    assert error.case is not None
    assert sum(error.case.seq_lens) <= 6, f"not simple: {error.case}"
    assert f"the step: {error.case}" in str(error)


def test_kernel_bugs_are_many() -> None:
    assert len(BUGS) >= 35
