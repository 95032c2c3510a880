"""The encoder-decoder tiers: to the books a sequence is the encoder's input and then the decoder's tokens, over one block table.

A slot of an encoder's token holds K and V of cross attention, one of a decoder's token those of self attention, in the same pools where
their shapes agree. So what holds for blocks of a decoder (forks, preemption, admission, cached prefixes) holds for both. Only what cross
attention reads depends on the whole input: whoever keeps prefixes has to give each input a namespace of its own.

The encoder runs once for each input, over all of it, when the first of its tokens is due. The decoder runs as in the dense tier, over rows
that are gathered from blocks, right-aligned for self attention and left-aligned for cross attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pagedkv.errors import InvariantError, UnsupportedModelError
from pagedkv.models.context import OwnAttention, activate
from pagedkv.models.cross_cache import CrossCache, PairedCache
from pagedkv.models.dense import DenseStep, Rows, WantedLogits, probed, similar, split_rows
from pagedkv.models.facade import DenseCache, cross_id
from pagedkv.models.pair_call import ANY_TOKEN, PairCall
from pagedkv.models.pair_probe import probe_pair
from pagedkv.models.probe import EncoderShape, ModelShape
from pagedkv.models.recurrence import RecurrentState
from pagedkv.models.replacements import Replacements
from pagedkv.models.row_positions import RowPositions
from pagedkv.models.stored import stored_tensors
from pagedkv.plan import Int64Array
from pagedkv.storage import KVStorage, LayerPool, Source, StepBatch
from pagedkv.storage.slots import Slots, left_aligned_slots


class EncoderDecoderTier:
    """Runs steps of an encoder-decoder with the model's own attention.

    Args:
        call: how to call the model.
        replacements: what stands in for modules of it during a step.
        equal: whether only inputs of one length, and rows of the decoder of one length over them, share a call.

    Raises:
        UnsupportedModelError: the model failed over a cache of its own, or takes no mask for the decoder and needs one.

    Attributes:
        name: ``"encoder-decoder"``, or ``"encoder-decoder-equal"``.
        attention: ``"own"``: no backend of ours attends.
        shape: the model's layers.
        recurrent_state: ``"none"``.
    """

    attention = "own"
    adapters = ()
    recurrent_state: RecurrentState = "none"

    def __init__(self, call: PairCall, replacements: Replacements, *, equal: bool) -> None:
        self.name = "encoder-decoder-equal" if equal else "encoder-decoder"
        self._equal, self._call, self._replacements = equal, call, replacements
        self.shape: ModelShape = probed(probe_pair, call, replacements, equal=equal)
        self._encoder = encoder = _encoder_of(self.shape)
        self._index = {layer: place for place, layer in enumerate(self.shape.layer_ids) if layer > cross_id(0)}
        self._positions = RowPositions(call.model, encoder.tables)
        # In place of the encoder's hidden states once cross attention is stored: who reads them after all is found out by what comes of it.
        self._no_states = torch.full((1, 1, 1), float("nan"), dtype=encoder.dtype, device=call.model.device)

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Logits ``[K, V]`` of one step; see ``Tier.forward``. ``batch.sources`` says what each sequence gives to the encoder.

        Cost: one run of the encoder, and of the decoder for one token, for inputs that come to their turn and are similarly long; one
        forward of the decoder for each query length, and a copy of all K/V that it reads.
        """
        plan = batch.plan
        if len(batch.sources) != plan.num_seqs:
            raise InvariantError(f"{len(batch.sources)} sources are known of {plan.num_seqs} sequences: an encoder-decoder needs all")
        lens = np.array([len(source) for source in batch.sources], dtype=np.int64)
        wanted = WantedLogits(plan, self.shape.vocab_size, batch.token_ids.device)
        with self._replacements.in_place():
            self._store_sources(batch, storage.layers, lens)
            for rows in split_rows(plan, starts=lens, equal=self._equal):
                wanted.put(rows, self._decode(rows, batch, storage.layers)[:, wanted.columns(rows)])
        return wanted.logits

    def _store_sources(self, batch: StepBatch, pools: Sequence[LayerPool], lens: Int64Array) -> None:
        """Write K and V of cross attention for the encoder's tokens that are due in this step."""
        plan = batch.plan
        starts = plan.seq_lens.astype(np.int64) - plan.query_lens
        ends = np.minimum(plan.seq_lens, lens)
        due = np.flatnonzero(starts < ends).tolist()
        if not due:
            return
        new = list({id(source): source for source in (batch.sources[seq] for seq in due) if source.unstored is None}.values())
        for together in _alike(new, equal=self._equal):
            self._encode(together)
        first = plan.cu_seqlens_q[due].astype(np.int64)
        counts = ends[due] - starts[due]
        tokens = np.concatenate([np.arange(begin, begin + count) for begin, count in zip(first, counts, strict=True)])
        index = torch.from_numpy(tokens).to(batch.token_ids.device)
        for number, place in enumerate(self._encoder.cross.values()):
            parts = [_part(batch.sources[seq], number, int(starts[seq]), int(ends[seq])) for seq in due]
            pool = pools[place]
            slots = Slots(batch.slot_blocks[pool.spec.group][index], batch.slot_offsets[pool.spec.group][index])
            key, value = (torch.cat(each) for each in zip(*parts, strict=True))
            pool.write(key, value, blocks=slots.blocks, offsets=slots.offsets)
        for seq in due:
            if ends[seq] == lens[seq]:
                batch.sources[seq].unstored = None

    def _encode(self, sources: list[Source]) -> None:
        """Run the encoder on some inputs, and the decoder on one token, by which it makes K and V of cross attention."""
        device = self._call.model.device
        ids = np.zeros((len(sources), max(map(len, sources))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, source in enumerate(sources):
            ids[row, : len(source)], mask[row, : len(source)] = source.token_ids, 1
        seen = torch.from_numpy(mask).to(device)
        with activate(OwnAttention()):
            states = self._call.encode(torch.from_numpy(ids).to(device), seen)
            cache, _ = self._call.stored(states, seen, torch.full((len(sources), 1), ANY_TOKEN, device=device))
        stored = stored_tensors(cache.cross_attention_cache)
        if list(stored) != list(self._encoder.cross):
            known = list(self._encoder.cross)
            raise UnsupportedModelError(
                f"{type(self._call.model).__name__} stored cross attention in layers {list(stored)}, in the probe in {known}"
            )
        for row, source in enumerate(sources):
            source.unstored = tuple((key[row, :, : len(source)], value[row, :, : len(source)]) for key, value in stored.values())

    def _decode(self, rows: Rows, batch: StepBatch, pools: Sequence[LayerPool]) -> Tensor:
        """Logits ``[R, Q, V]`` of some rows of the decoder."""
        device, step = batch.token_ids.device, DenseStep(rows, batch, pools, self._index)
        cross = _CrossRows(rows, batch, pools, self._encoder.cross)
        longest = int(rows.starts.max())
        seen = torch.from_numpy((np.arange(longest) < rows.starts[:, None]).astype(np.int64)).to(device)
        there = None if self._equal else torch.from_numpy(rows.there.astype(np.int64)).to(device)
        positions = batch.positions[step.tokens] - torch.from_numpy(rows.starts).to(device)[:, None]
        cache = PairedCache(DenseCache(step, rows.past_len), CrossCache(max(self._encoder.cross) + 1, cross.read, longest))
        states = self._no_states.expand(len(rows.seqs), longest, self._encoder.width)
        with activate(step), self._positions.given(positions, rows.past_len):
            logits = self._call.decode(states, seen, batch.token_ids[step.tokens], cache=cache, positions=positions, decoder_mask=there)
        if not step.complete or cross.read_layers != set(self._encoder.cross):
            raise UnsupportedModelError(
                f"{type(self._call.model).__name__} stored K/V in {len(step.written)} of its {len(self._index)} layers, and read cross "
                f"attention in {len(cross.read_layers)} of {len(self._encoder.cross)}"
            )
        return logits


class _CrossRows:
    """K and V of cross attention of a call's rows, out of the pools.

    Attributes:
        read_layers: those that were read so far.
    """

    def __init__(self, rows: Rows, batch: StepBatch, pools: Sequence[LayerPool], places: Mapping[int, int]) -> None:
        self._rows, self._batch, self._pools, self._places = rows, batch, pools, places
        self._slots: dict[int, Slots] = {}
        self.read_layers: set[int] = set()

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """K ``[R, Hkv, E, Dk]`` and V ``[R, Hkv, E, Dv]``, zeros behind a row's input."""
        self.read_layers.add(layer)
        pool, rows = self._pools[self._places[layer]], self._rows
        group = pool.spec.group
        if group not in self._slots:
            self._slots[group] = left_aligned_slots(
                self._batch.plan, rows.seqs, lens=rows.starts, group=group, block_size=pool.block_size, device=pool.device
            )
        return pool.gather_slots(self._slots[group].blocks, self._slots[group].offsets)


def _encoder_of(shape: ModelShape) -> EncoderShape:
    if shape.encoder is None:
        raise UnsupportedModelError("the model has no encoder")
    return shape.encoder


def _alike(sources: list[Source], *, equal: bool) -> list[list[Source]]:
    """The inputs that share a call of the encoder: those of one length, or similar ones."""
    lens = np.array([len(source) for source in sources], dtype=np.int64)
    kinds = lens if equal else similar(lens)
    return [[sources[place] for place in np.flatnonzero(kinds == kind)] for kind in np.unique(kinds)]


def _part(source: Source, number: int, start: int, end: int) -> tuple[Tensor, Tensor]:
    """K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]`` of some tokens in one layer."""
    if source.unstored is None:
        raise InvariantError("an input of the encoder is due and was not run")
    key, value = source.unstored[number]
    return key[:, start:end].transpose(0, 1), value[:, start:end].transpose(0, 1)
