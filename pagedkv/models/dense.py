"""The dense tier: the model's own attention runs, over K/V that are gathered from blocks into right-aligned rows.

For every model that no attention function of ours can be given to, or whose attention is more than K, V and a mask of positions
(ALiBi, say). Right-aligned with a mask of what is there is how transformers' own batched generation pads, so whatever a model derives
from mask and length comes out as it does there. A model that counts positions from one number for the whole batch is right only where
rows are equally long, and then needs no mask. It owns how a step is cut into calls of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.call import ModelCall
from pagedkv.models.context import OwnAttention, activate
from pagedkv.models.facade import DenseCache
from pagedkv.models.pair_call import PairCall
from pagedkv.models.probe import ModelShape, probe_dense
from pagedkv.models.recurrence import RecurrentState
from pagedkv.models.replacements import Replacements
from pagedkv.models.states import StatefulCache
from pagedkv.plan import BoolArray, Int64Array, StepPlan
from pagedkv.storage import KVStorage, StateStorage, StepBatch
from pagedkv.storage.pool import LayerPool
from pagedkv.storage.slots import Slots, right_aligned_slots

_Call = TypeVar("_Call", ModelCall, PairCall)

# Below this length rows share a call whatever their lengths; above, only with rows less than twice as long.
_SHORT = 128


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Sequences of a step that one call of the model computes: ``R`` rows with ``Q`` new tokens each.

    Attributes:
        seqs: ``[R]`` their places in the plan.
        tokens: ``[R, Q]`` the packed tokens of each.
        lens: ``[R]`` stored tokens of each after the step.
        starts: ``[R]`` tokens that each sequence's table has before those, for an encoder; 0 without one.
    """

    seqs: Int64Array
    tokens: Int64Array
    lens: Int64Array
    starts: Int64Array

    @property
    def num_keys(self) -> int:
        """Length of the rows of K and V: of the longest sequence."""
        return int(self.lens.max())

    @property
    def past_len(self) -> int:
        """Tokens before the new ones in the longest row."""
        return self.num_keys - int(self.tokens.shape[1])

    @property
    def there(self) -> BoolArray:
        """``[R, K]`` which keys are tokens; the others pad on the left."""
        return np.arange(self.num_keys) >= (self.num_keys - self.lens)[:, None]


def split_rows(plan: StepPlan, *, starts: Int64Array | None = None, equal: bool = False, by_past: bool = False) -> Iterator[Rows]:
    """Cut a step into calls of the model, with rows of one query length.

    Args:
        plan: the step.
        starts: ``[S]`` tokens at the beginning of each sequence that are another part's work: left out, but rows that share a call are
            alike in them, too. None for 0.
        equal: only rows of one length share a call; else those of lengths so similar that at most half is padding, or all short ones.
        by_past: whether rows that have computed no token yet get calls of their own: recurrent layers start there, and do not go on.
    """
    starts = np.zeros(plan.num_seqs, dtype=np.int64) if starts is None else starts
    lens = plan.seq_lens - starts
    queries = np.minimum(plan.query_lens, lens)
    alike = [lens, starts] if equal else [similar(lens), similar(starts)]
    kinds = np.stack([queries, *alike, lens > queries] if by_past else [queries, *alike])
    _, kind_of = np.unique(kinds, axis=1, return_inverse=True)
    kind_of = np.where(queries > 0, kind_of.reshape(-1), -1)
    for kind in np.unique(kind_of[kind_of >= 0]):
        seqs = np.flatnonzero(kind_of == kind)
        count = int(queries[seqs[0]])
        tokens = plan.cu_seqlens_q[seqs + 1].astype(np.int64)[:, None] - count + np.arange(count)
        yield Rows(seqs, tokens, lens[seqs], starts[seqs])


def similar(lens: Int64Array) -> Int64Array:
    """``[n]`` a number for each length that lengths share of which the same power of 2 is the bound, or all short ones."""
    return np.frexp(np.maximum(lens - 1, _SHORT - 1).astype(np.float64))[1].astype(np.int64)


class WantedLogits:
    """The logits of a step, call by call.

    Args:
        plan: the step.
        vocab_size: width of the model's logits.
        device: where they go.

    Attributes:
        logits: ``[K, V]`` float32, one row per entry of ``plan.logits_indices``.
    """

    def __init__(self, plan: StepPlan, vocab_size: int, device: torch.device) -> None:
        self.logits = torch.empty(len(plan.logits_indices), vocab_size, dtype=torch.float32, device=device)
        self._places = np.full(plan.num_tokens, -1, dtype=np.int64)
        self._places[plan.logits_indices] = np.arange(len(plan.logits_indices))

    def columns(self, rows: Rows) -> Tensor:
        """``[C]`` int64 columns of a call's rows of which any logits are wanted."""
        return torch.from_numpy(self._columns(rows)).to(self.logits.device)

    def put(self, rows: Rows, result: Tensor) -> None:
        """Take ``[R, C, V]`` logits of a call in these columns."""
        columns = self._columns(rows)
        places = self._places[rows.tokens][:, columns]
        row, column = np.nonzero(places >= 0)
        where, row_index, column_index = (torch.from_numpy(index).to(self.logits.device) for index in (places[row, column], row, column))
        self.logits[where] = result[row_index, column_index].float()

    def _columns(self, rows: Rows) -> Int64Array:
        return np.flatnonzero((self._places[rows.tokens] >= 0).any(axis=0))


def probed(probe: Callable[[_Call], ModelShape], call: _Call, replacements: Replacements, *, equal: bool) -> ModelShape:
    """The layers of a model whose own attention is to run, and what stands in for its modules made ready for that.

    Args:
        probe: finds the layers.
        call: how to call the model.
        replacements: what stands in.
        equal: whether only rows of one length share a call, which needs no mask.

    Raises:
        UnsupportedModelError: the model takes no mask and needs one, or what the probe says against it.
    """
    if not (equal or call.takes_mask):
        raise UnsupportedModelError(
            f"{type(call.model).__name__}.forward takes no {call.mask_argument}: rows of several lengths cannot be told"
        )
    with replacements.recording():
        shape = probe(call)
    replacements.pack()
    return shape


class DenseTier:
    """Runs steps with the model's own attention.

    Args:
        call: how to call the model.
        replacements: what stands in for modules of it during a step.
        equal: whether only rows of one length share a call, without a mask.

    Raises:
        UnsupportedModelError: the model failed over a cache of ours, or takes no ``attention_mask`` and needs one.

    Attributes:
        name: ``"dense"``, or ``"dense-equal"``.
        attention: ``"own"``: no backend of ours attends.
        shape: the model's layers.
        recurrent_state: ``"none"``, ``"chunked"`` or ``"whole"``; whoever checks the tier finds out which of the last two.
    """

    attention = "own"
    adapters = ()

    def __init__(self, call: ModelCall, replacements: Replacements, *, equal: bool) -> None:
        self.name = "dense-equal" if equal else "dense"
        self._equal, self._call, self._replacements = equal, call, replacements
        self.shape: ModelShape = probed(probe_dense, call, replacements, equal=equal)
        self.recurrent_state: RecurrentState = "chunked" if self.shape.states else "none"
        self._index = {layer: place for place, layer in enumerate(self.shape.layer_ids)}

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Logits ``[K, V]`` of one step; see ``Tier.forward``.

        Cost: one forward for each query length, and a copy of all K/V that is read.
        """
        wanted = WantedLogits(batch.plan, self.shape.vocab_size, batch.token_ids.device)
        if storage.state is not None:
            storage.state.begin()
        with self._replacements.in_place():
            for rows in split_rows(batch.plan, equal=self._equal, by_past=storage.state is not None):
                wanted.put(rows, self._run(rows, batch, storage, columns=wanted.columns(rows)))
        return wanted.logits

    def _run(self, rows: Rows, batch: StepBatch, storage: KVStorage, *, columns: Tensor) -> Tensor:
        """Logits ``[R, C, V]`` of some columns of some rows."""
        step, state = DenseStep(rows, batch, storage.layers, self._index), storage.state
        tokens, cache = step.tokens, DenseCache(step, rows.past_len)
        if state is not None:
            cache = stateful = self._with_states(step, rows, batch.plan, state)
        with activate(step):
            logits = self._call(
                batch.token_ids[tokens], batch.positions[tokens], cache=cache, columns=columns, attention_mask=self._mask(rows)
            )
        if not step.complete:
            raise UnsupportedModelError(
                f"{type(self._call.model).__name__} stored K/V in {len(step.written)} of its {len(self._index)} layers"
            )
        if state is not None:
            state.stage(batch.plan.rows[rows.seqs], batch.plan.seq_lens[rows.seqs], stateful.states())
        return logits

    def _mask(self, rows: Rows) -> Tensor | None:
        """``[R, K]`` int64, 1 where a row has a key; None where none is padded, or the model stores no K/V."""
        if self._equal or not self._index:
            return None
        return torch.from_numpy(rows.there.astype(np.int64)).to(self._call.model.device)

    def _with_states(self, step: DenseStep, rows: Rows, plan: StepPlan, state: StateStorage) -> StatefulCache:
        """The cache of rows that all go on from their states, or all have none yet."""
        starts = plan.seq_lens[rows.seqs] - plan.query_lens[rows.seqs]
        states = state.read(plan.rows[rows.seqs], starts) if starts[0] else None
        return StatefulCache(step, rows.past_len, config=self._call.model.config, states=states)


class DenseStep(OwnAttention):
    """The step context of one call: new K/V into their slots, those of whole rows out of the pools.

    Args:
        rows: what the call computes.
        batch: the step.
        pools: one per layer that stores K/V.
        index: from transformers' layer index to the place in ``pools``.

    Attributes:
        tokens: ``[R, Q]`` int64 packed tokens, on the device.
        written: layers that stored their K/V so far.
    """

    def __init__(self, rows: Rows, batch: StepBatch, pools: Sequence[LayerPool], index: Mapping[int, int]) -> None:
        self._rows, self._batch, self._pools, self._index = rows, batch, pools, index
        self._new: dict[int, Slots] = {}
        self._all: dict[int, Slots] = {}
        self.tokens = torch.from_numpy(rows.tokens).to(batch.token_ids.device)
        self.written: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every layer was stored."""
        return len(self.written) == len(self._index)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Write ``[R, Hkv, Q, D]`` keys and values of one layer to the rows' slots; returns ``[R, Hkv, K, D]`` of whole rows."""
        place = self._index.get(layer_idx)
        if place is None or layer_idx in self.written or (key.shape[0], key.shape[2]) != self.tokens.shape:
            raise UnsupportedModelError(
                f"layer {layer_idx} stored K {list(key.shape)} where one "
                f"[{self.tokens.shape[0]}, heads, {self.tokens.shape[1]}, dim] per known layer is expected"
            )
        self.written.add(layer_idx)
        pool = self._pools[place]
        new = self._new_slots(pool.spec.group)
        pool.write(key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1), blocks=new.blocks, offsets=new.offsets)
        if not self._rows.past_len:
            return None  # nothing was stored before, and nothing pads: the new tokens are all there is
        slots = self._all_slots(pool)
        return pool.gather_slots(slots.blocks, slots.offsets)  # contiguous as from transformers' own cache: some models take views

    def _new_slots(self, group: int) -> Slots:
        slots = self._new.get(group)
        if slots is None:
            tokens, batch = self.tokens.flatten(), self._batch
            slots = self._new[group] = Slots(batch.slot_blocks[group][tokens], batch.slot_offsets[group][tokens])
        return slots

    def _all_slots(self, pool: LayerPool) -> Slots:
        group = pool.spec.group
        slots = self._all.get(group)
        if slots is None:
            plan, rows, size = self._batch.plan, self._rows, pool.block_size
            slots = self._all[group] = right_aligned_slots(
                plan, rows.seqs, lens=rows.lens, starts=rows.starts, group=group, block_size=size, device=pool.device
            )
        return slots
