"""Where the stored tokens of a step's sequences lie, as index tensors for ``LayerPool.gather_slots``. Owns no bytes and no table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.plan import Int64Array, StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Places in the pools of one layer group.

    Attributes:
        blocks: int64 block ids of any shape.
        offsets: int64 places inside the blocks, of the same shape.
    """

    blocks: Tensor
    offsets: Tensor


def right_aligned_slots(
    plan: StepPlan, seqs: Int64Array, *, lens: Int64Array, starts: Int64Array, group: int, block_size: int, device: torch.device
) -> Slots:
    """Stored tokens of some sequences, one row each, every row ending with its sequence's last token.

    Args:
        plan: the step.
        seqs: ``[R]`` places of the sequences in the plan.
        lens: ``[R]`` tokens of each row.
        starts: ``[R]`` tokens that the sequence's table has before them.
        group: layer group, which selects the block tables.
        block_size: tokens in one block.
        device: where the index tensors go.

    Returns:
        ``[R, K]`` slots, ``K`` the length of the longest row; the null block, which holds zeros, pads on the left.
    """
    positions = np.arange(lens.max()) - (lens.max() - lens)[:, None]
    inside = positions >= 0
    return _rows_on(device, plan, seqs, np.where(inside, positions + starts[:, None], 0), inside, group=group, block_size=block_size)


def left_aligned_slots(plan: StepPlan, seqs: Int64Array, *, lens: Int64Array, group: int, block_size: int, device: torch.device) -> Slots:
    """The first ``lens [R]`` tokens of some sequences, one row each: ``[R, max(lens)]`` slots, the null block pads on the right."""
    positions = np.arange(lens.max()) + np.zeros_like(seqs)[:, None]
    inside = positions < lens[:, None]
    return _rows_on(device, plan, seqs, np.where(inside, positions, 0), inside, group=group, block_size=block_size)


def packed_slots(plan: StepPlan, *, group: int, block_size: int, device: torch.device) -> Slots:
    """All stored tokens of all sequences of a step, one after the other: ``[K]`` slots, ``K`` the sum of ``plan.seq_lens``."""
    lens = plan.seq_lens.astype(np.int64)
    owners = np.repeat(np.arange(len(lens)), lens)
    positions = np.arange(len(owners)) - np.repeat(np.cumsum(lens) - lens, lens)
    return _on(device, plan.block_tables[group][plan.rows[owners], positions // block_size], positions % block_size)


def _rows_on(
    device: torch.device,
    plan: StepPlan,
    seqs: Int64Array,
    positions: Int64Array,
    inside: npt.NDArray[np.bool_],
    *,
    group: int,
    block_size: int,
) -> Slots:
    """The slots of ``[R, K]`` positions of these sequences' tables, and the null block where nothing is inside."""
    tables = plan.block_tables[group]
    blocks = np.where(inside, tables[plan.rows[seqs][:, None], positions // block_size], 0)
    return _on(device, blocks, positions % block_size)


def _on(device: torch.device, blocks: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer]) -> Slots:
    return Slots(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in (blocks, offsets)))
