"""The check that decides at load whether a way of running a model is right: paged steps against the model's own forward, in numbers.

Owns the check's sequences, its schedule and the bounds. It does not own how a step runs (``packed.py``, ``dense.py``). The reference is
transformers' own forward of each sequence alone, without any cache; never code of ours.

A sequence of an encoder-decoder begins with the encoder's input. What is compared are the logits of the decoder's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import Mask
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.call import ModelCall
from pagedkv.models.limits import num_decoder_token_ids, num_token_ids
from pagedkv.models.pair_call import PairCall
from pagedkv.models.probe import ModelShape
from pagedkv.models.recurrence import RecurrentState
from pagedkv.plan import Int32Array, StepPlan
from pagedkv.storage import BatchBuilder, KVStorage, Source, StateStorage, StepBatch

_SEED = 20260101
# A window up to this size is crossed for real; a larger one rests on the classification of its mask.
_MAX_CHECKED_WINDOW = 64
_MAX_CHECKED_BLOCK = 32
# Errors of recurrent state add up, so it is followed through so many steps of one token.
_NUM_SINGLE = 12
# Tokens of the encoder for each sequence, in blocks and more: ragged, and none that ends with a block.
_SOURCE_LENS = ((1, 5), (0, 11), (1, 9))
# Largest logit difference, relative to the largest logit. In half precision one token may fall on the other side of a
# tie (an expert, a rounding), so there a tenth of the positions may exceed the bound, but ranks must agree.
EXACT_DTYPES = (torch.float32, torch.float64)
_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """What the same check saw on a copy in float32 of the first layers, judged by numbers.

    Attributes:
        num_layers: decoder layers of the copy.
        max_relative_error: as that of ``SelfCheck``.
        bound: what it was held against.
    """

    num_layers: int
    max_relative_error: float
    bound: float


@dataclass(frozen=True, slots=True)
class Int8Check:
    """How far the model is, once its weights are rounded to eight bits, from the model itself. Nothing is judged by it.

    Attributes:
        max_relative_error: largest logit difference relative to the largest logit, on random tokens.
        argmax_agreement: share of positions where both name the same next token.
    """

    max_relative_error: float
    argmax_agreement: float


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the self-check saw.

    Attributes:
        backend: the attention backend that ran; ``"own"`` where the model's own attention did.
        sequence_lens: tokens of each sequence, run in one batch.
        num_steps: steps in which they were run, prefill chunks mixed with decodes.
        max_relative_error: largest logit difference relative to the largest logit.
        argmax_agreement: share of positions where both name the same next token.
        bound: what ``max_relative_error`` was held against.
        judged_by: ``"numbers"``: no logit differs by more than the bound; ``"ranks"``, in half precision, where a rounding may tip a
            tie: nine positions of ten are within it, and three of four name the same next token.
        copy: of a model in half precision, the judgement by numbers that such ranks cannot replace; None where it was not needed, or
            could not be had.
        why_no_copy: why it could not be had; None where it was, or was not needed.
        int8: of weights rounded to eight bits, for which everything else was seen before; None where they are not.
        windows: sliding and chunked masks that the sequences crossed.
        windows_not_crossed: masks too large to cross in a short check; these rest on the classification of the mask.
    """

    backend: str
    sequence_lens: tuple[int, ...]
    num_steps: int
    max_relative_error: float
    argmax_agreement: float
    bound: float
    judged_by: Literal["numbers", "ranks"]
    windows: tuple[Mask, ...]
    windows_not_crossed: tuple[Mask, ...]
    copy: CopyCheck | None = None
    why_no_copy: str | None = None
    int8: Int8Check | None = None


class CheckedTier(Protocol):
    """The part of a tier that is checked."""

    shape: ModelShape
    recurrent_state: RecurrentState

    @property
    def attention(self) -> str:
        """Name of what attends."""

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Logits of one step."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """What is run of one sequence: ``source [E]`` of the encoder, empty without one, and ``tokens [T]``."""

    source: Tensor
    tokens: Tensor

    @property
    def known(self) -> Int32Array:
        """``[E + T]`` both."""
        return torch.cat([self.source, self.tokens]).numpy().astype(np.int32)

    def reference(self, call: ModelCall | PairCall) -> Tensor:
        """``[T, V]`` by the model's own forward."""
        device = call.model.device
        if isinstance(call, PairCall):
            return call.plain(self.source.to(device), self.tokens.to(device))
        return call.plain(self.tokens.to(device))


def self_check(tier: CheckedTier, call: ModelCall | PairCall, *, block_size: int, max_positions: int | None) -> SelfCheck:
    """Compare paged steps with the model's own forward on random tokens, and refuse the tier if they differ.

    Ragged sequences in one batch, a prefill in chunks mixed with decodes, chunks of one length with and without a past, permuted
    blocks, a pool full of NaN, and sequences longer than every window up to 64; with recurrent state, a dozen steps of one token more.

    Args:
        tier: what runs steps.
        call: how the model itself is called.
        block_size: tokens per block.
        max_positions: longest sequence that the model takes.

    Raises:
        UnsupportedModelError: the worst figure and what was run.

    Cost: three short forwards of the model and four steps, about 90 tokens in all for a model without small windows.
    """
    ours, own, num_steps = _both(tier, call, block_size=block_size, max_positions=max_positions)
    return _judge(tier, ours, own, num_steps=num_steps)


def compare_int8(tier: CheckedTier, call: ModelCall | PairCall, *, block_size: int, max_positions: int | None) -> Int8Check:
    """Compare what a tier computes with rounded weights with the model's own forward, as ``self_check`` does, without a judgement."""
    ours, own, _ = _both(tier, call, block_size=block_size, max_positions=max_positions)
    paged, reference = torch.cat(ours), torch.cat(own)
    finite = reference.isfinite()
    difference = _differences(paged.masked_fill(~finite, 0.0), reference.masked_fill(~finite, 0.0))
    return Int8Check(float(difference.max()), _agreement(paged, reference))


def _both(
    tier: CheckedTier, call: ModelCall | PairCall, *, block_size: int, max_positions: int | None
) -> tuple[list[Tensor], list[Tensor], int]:
    """The logits of every sequence, ours and the model's own, and in how many steps ours were computed."""
    num_single = 0 if tier.recurrent_state == "none" else _NUM_SINGLE
    lens = _sequence_lens(tier.shape.windows, block_size=block_size, most=max_positions, num_single=num_single)
    sequences = _pairs(tier.shape, call, lens, block_size) if isinstance(call, PairCall) else _decoders(call, lens)
    schedule = _schedule([len(each.known) for each in sequences], whole=tier.recurrent_state == "whole", num_single=num_single)
    vocab_size = min(tier.shape.vocab_size, num_decoder_token_ids(call.model))
    reference = [each.reference(call)[:, :vocab_size].float() for each in sequences]
    ours = _run(tier, sequences, schedule, block_size=block_size, device=call.model.device)
    return [logits[:, :vocab_size].float() for logits in ours], reference, len(schedule)


def _decoders(call: ModelCall, lens: Sequence[int]) -> list[_Sequence]:
    generator = torch.Generator().manual_seed(_SEED)
    nothing = torch.zeros(0, dtype=torch.int64)
    return [_Sequence(nothing, torch.randint(0, num_token_ids(call.model), (length,), generator=generator)) for length in lens]


def _pairs(shape: ModelShape, call: PairCall, lens: Sequence[int], block_size: int) -> list[_Sequence]:
    """Sequences without the token that pads, which some models leave out of their count of positions."""
    generator = torch.Generator().manual_seed(_SEED)
    limits = shape.encoder
    most_source, most = (None, None) if limits is None else (limits.max_source_tokens, limits.max_decoder_tokens)
    pad = getattr(call.model.config, "pad_token_id", None)

    def draw(num_ids: int, length: int, most: int | None) -> Tensor:
        ids = torch.randint(0, num_ids, (length if most is None else min(length, most),), generator=generator)
        return ids.masked_fill(ids == pad, (pad + 1) % num_ids) if isinstance(pad, int) else ids

    return [
        _Sequence(
            draw(num_token_ids(call.model), blocks * min(block_size, _MAX_CHECKED_BLOCK) + more, most_source),
            draw(num_decoder_token_ids(call.model), length, most),
        )
        for length, (blocks, more) in zip(lens, _SOURCE_LENS, strict=True)
    ]


def _sequence_lens(windows: tuple[Mask, ...], *, block_size: int, most: int | None, num_single: int) -> tuple[int, ...]:
    longest = min(2 * block_size, _MAX_CHECKED_BLOCK) + 5
    for mask in windows:
        if mask.size <= _MAX_CHECKED_WINDOW:
            longest = max(longest, mask.size + 13)
    if most is not None:
        longest = min(longest, most - num_single)
    second = max(longest // 2 + 1, 5)
    # One more, so that the second and the third are equally long in one step: rows that share a call of the model only then do so.
    return max(longest, 5) + num_single, second, second + 1 if second < longest else max(longest, 5)


def _schedule(lens: Sequence[int], *, whole: bool = False, num_single: int = 0) -> list[list[tuple[int, int]]]:
    """Steps as lists of (sequence, number of tokens), decodes first.

    Args:
        lens: tokens of three sequences.
        whole: whether prompts come in one piece.
        num_single: tokens of the first that come one by one after everything else.
    """
    first, second, third = lens[0] - num_single, *lens[1:]
    chunk = first - third if first > third else first // 2  # then the second chunk of the first is as long as the third's only one
    if whole:
        start = [[(0, first - 3), (1, second - 2)], [(0, 1), (1, 1), (2, third - 2)]]
    else:
        start = [[(0, chunk), (1, second - 2)], [(1, 1), (0, first - chunk - 2), (2, third - 2)]]
    return [*start, [(0, 1), (1, 1), (2, 1)], [(0, 1), (2, 1)], *[[(0, 1)]] * num_single]


def new_storage(shape: ModelShape, *, num_blocks: int, num_rows: int, block_size: int, device: torch.device) -> KVStorage:
    """Pools for a model's layers, and state for so many rows if it has any."""
    state = StateStorage(shape.states, num_rows=num_rows, device=device) if shape.states else None
    return KVStorage(shape.layers, num_blocks=num_blocks, block_size=block_size, dtype=shape.dtype, device=device, state=state)


def _run(
    tier: CheckedTier, sequences: list[_Sequence], schedule: list[list[tuple[int, int]]], *, block_size: int, device: torch.device
) -> list[Tensor]:
    """The logits of every position of every sequence, by paged steps over blocks that hold NaN until they are written."""
    size, shape = block_size, tier.shape
    needed = [-(-len(each.known) // size) for each in sequences]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(_SEED + 1)).numpy() + 1
    tables = np.zeros((1, len(sequences), max(needed)), dtype=np.int32)
    for row, count in enumerate(needed):
        tables[0, row, :count] = order[sum(needed[:row]) : sum(needed[: row + 1])]
    storage = new_storage(shape, num_blocks=len(order) + 1, num_rows=len(sequences), block_size=size, device=device)
    sources = [Source(each.source.numpy().astype(np.int32)) for each in sequences]
    try:
        storage.fill(list(range(1, len(order) + 1)), float("nan"))
        if storage.state is not None:
            storage.state.fill(np.arange(len(sequences)), float("nan"))
        builder = BatchBuilder(device, size)
        done = [0] * len(sequences)
        parts: list[list[Tensor]] = [[] for _ in sequences]
        for number, step in enumerate(schedule):
            plan = _plan(number, step, sequences=sequences, done=done, tables=tables, block_size=size)
            logits = tier.forward(builder.build(plan, [sources[sequence] for sequence, _ in step]), storage)
            if storage.state is not None:
                storage.state.commit()
            counts = [max(0, done[each] + count - max(done[each], len(sources[each]))) for each, count in step]
            for (sequence, count), part in zip(step, torch.split(logits, counts), strict=True):
                parts[sequence].append(part)
                done[sequence] += count
        return [torch.cat(part) for part in parts]
    finally:
        storage.close()


def _plan(
    number: int,
    step: list[tuple[int, int]],
    *,
    sequences: list[_Sequence],
    done: list[int],
    tables: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    block_size: int,
) -> StepPlan:
    rows = np.array([sequence for sequence, _ in step], dtype=np.int64)
    query_lens = np.array([count for _, count in step], dtype=np.int32)
    starts = np.array([done[sequence] for sequence, _ in step], dtype=np.int32)
    cumulative = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, query_lens, strict=True)])
    owners = np.repeat(rows, query_lens)
    slots = tables[0, owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    known = [each.known for each in sequences]
    source_lens = np.array([len(each.source) for each in sequences])
    every = np.arange(len(step), dtype=np.int64)
    return StepPlan(
        step=number,
        seqs=rows,
        rows=rows,
        token_ids=np.array([known[owner][position] for owner, position in zip(owners, positions, strict=True)], dtype=np.int32),
        positions=positions.astype(np.int32),
        query_lens=query_lens,
        seq_lens=starts + query_lens,
        cu_seqlens_q=cumulative,
        slot_mapping=slots[None],
        block_tables=tables,
        copies=(np.zeros((0, 2), dtype=np.int32),),
        num_decodes=int((query_lens == 1).sum()),
        logits_indices=np.flatnonzero(positions >= source_lens[owners]),
        sampling_seqs=every,
        sampling_logits=cumulative[1:].astype(np.int64) - 1,
    )


def _judge(tier: CheckedTier, paged: list[Tensor], reference: list[Tensor], *, num_steps: int) -> SelfCheck:
    ours, own = torch.cat(paged), torch.cat(reference)
    lens = tuple(len(row) for row in reference)
    dtype, masks = tier.shape.dtype, tier.shape.windows
    tried = f"sequences of {lens} tokens in {num_steps} steps, {tier.attention!r} attention, {dtype}"
    agreement = _agreement(ours, own)
    finite = own.isfinite()
    if not finite.all():  # some models write -inf for ids that can never come; both sides must do it alike
        if own.isnan().any() or not finite.any():
            raise UnsupportedModelError(f"self-check impossible: the model's own forward gives NaN on random tokens ({tried})")
        if not torch.equal(ours[~finite], own[~finite]):
            raise UnsupportedModelError(f"self-check failed: infinite logits differ from the model's own forward ({tried})")
        ours, own = (logits.masked_fill(~finite, 0.0) for logits in (ours, own))
    difference = _differences(ours, own)
    worst = float(difference.max())
    bound = _BOUNDS.get(dtype, _BOUNDS[torch.bfloat16])
    by_numbers = dtype in EXACT_DTYPES
    mostly = not math.isnan(worst) and float((difference <= bound).float().mean()) >= 0.9 and agreement >= 0.75
    if not (worst <= bound if by_numbers else mostly):
        raise UnsupportedModelError(
            f"self-check failed: logits differ from the model's own forward by {worst:.2g} of the largest logit "
            f"(allowed {bound:.0e}), {agreement:.0%} of next tokens agree ({tried})"
        )
    crossed = tuple(mask for mask in masks if mask.size < max(lens))
    return SelfCheck(
        backend=tier.attention,
        sequence_lens=lens,
        num_steps=num_steps,
        max_relative_error=worst,
        argmax_agreement=agreement,
        bound=bound,
        judged_by="numbers" if by_numbers else "ranks",
        windows=crossed,
        windows_not_crossed=tuple(mask for mask in masks if mask not in crossed),
    )


def _agreement(ours: Tensor, own: Tensor) -> float:
    return float((ours.argmax(dim=1) == own.argmax(dim=1)).float().mean())


def _differences(ours: Tensor, own: Tensor) -> Tensor:
    """For each position the largest difference, relative to the largest logit of all; NaN where ours is."""
    return (ours - own).abs().amax(dim=1) / own.abs().max().clamp_min(1e-30)
