"""What a proof by trial is made of: a module without its weights or children, a call that may fail, and a comparison. Owns no verdict."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# Of a difference, relative to the largest result: orders of addition differ, and in half precision roundings.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def emptied(module: nn.Module, parameters: dict[str, nn.Parameter | None], modules: dict[str, nn.Module | None]) -> nn.Module:
    """A shallow copy that computes with other weights or children."""
    probe = copy.copy(module)
    vars(probe).update(_parameters=parameters, _modules=modules)
    return probe


def tried(module: nn.Module, rows: Tensor) -> Any:
    """What a module makes of rows, or None: it was not made for such a call."""
    try:
        return module(rows)
    except Exception:  # whatever a module raises, it is not one of ours
        return None


def agree(ours: Tensor, theirs: Any) -> bool:
    """Whether two results are the same in shape, dtype and numbers, and not both nothing."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype or not theirs.any():
        return False
    return bool((ours - theirs).abs().max() <= _BOUNDS[ours.dtype] * theirs.abs().max())
