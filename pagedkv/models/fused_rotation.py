"""The rotary embedding of a modeling file as one native operation, for the length of a step.

Owns the proof that the file's function computes it, and the function that takes its place. Modeling files call it by a global name, so
that name is what changes, for all threads: without a step in the calling thread, the former function is called.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.attention.native.operations import DTYPES, Operations
from pagedkv.models.context import active_step
from pagedkv.models.trials import agree

_NAME = "apply_rotary_pos_emb"
_SEED = 20260104
_LOCK = threading.Lock()

Rotation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(slots=True, eq=False)
class FusedRotation:
    """The function of one modeling file, and what stands in for it while at least one step runs that wants it.

    Attributes:
        module: name of the modeling file's module.
        namespace: its globals.
        former: the function.
        stand_in: what takes its place.
        users: steps that run now.
    """

    module: str
    namespace: dict[str, Any]
    former: Rotation
    stand_in: Rotation
    users: int = 0


_KNOWN: dict[str, FusedRotation | None] = {}  # by module; one per process, because the name that is changed is


def find_rotations(model: nn.Module, operations: Operations) -> list[FusedRotation]:
    """The functions of the files that a model's modules are written in, each proven. Nothing is changed."""
    found = []
    for module in dict.fromkeys(type(part).__module__ for part in model.modules()):
        namespace = vars(sys.modules[module])
        former = namespace.get(_NAME)
        if not callable(former):
            continue
        with _LOCK:
            known = _KNOWN.get(module)
            if module not in _KNOWN or (known is not None and former not in (known.former, known.stand_in)):
                proven = _is_rotation(former, operations)
                known = FusedRotation(module, namespace, former, _stand_in(former, operations)) if proven else None
                _KNOWN[module] = known
        if known is not None:
            found.append(known)
    return found


@contextmanager
def in_place(rotations: list[FusedRotation]) -> Iterator[None]:
    """Put the stand-ins in their places for a ``with`` block; the last step that ends puts the functions back.

    A function that somebody replaced in the meantime stays replaced.
    """
    entered = []
    try:
        for rotation in rotations:
            with _LOCK:
                rotation.users += 1
                entered.append(rotation)
                if rotation.users == 1 and rotation.namespace.get(_NAME) is rotation.former:
                    rotation.namespace[_NAME] = rotation.stand_in
        yield
    finally:
        for rotation in entered:
            with _LOCK:
                rotation.users -= 1
                if rotation.users == 0 and rotation.namespace.get(_NAME) is rotation.stand_in:
                    rotation.namespace[_NAME] = rotation.former


def _stand_in(former: Rotation, operations: Operations) -> Rotation:
    rotate = operations.rotate

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or active_step() is None or torch.is_grad_enabled() or not _is_known(q, k, cos, sin):
            return former(q, k, cos, sin, *args, **kwargs)
        cosines, sines = cos[0], sin[0]
        return rotate(q[0], cosines, sines)[None], rotate(k[0], cosines, sines)[None]

    return rotated


def _is_known(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are ``[1, H, T, D]`` twice and ``[1, T, D]`` twice, of one dtype, as the operation reads them."""
    dtype = q.dtype
    return (
        dtype in DTYPES
        and k.dtype is dtype
        and q.device.type == "cpu"
        and q.dim() == k.dim() == 4
        and q.shape[0] == k.shape[0] == 1
        and q.shape[2:] == k.shape[2:]
        and q.stride(-1) == k.stride(-1) == 1
        and are_angles(cos, sin, dtype, q.shape[2], q.shape[3])
    )


def are_angles(cos: Tensor, sin: Tensor, dtype: torch.dtype, num_tokens: int, width: int) -> bool:
    """Whether these are ``[1, T, D]`` cosines and sines as the operation reads them."""
    return (
        cos.dtype is sin.dtype is dtype
        and cos.shape == sin.shape == (1, num_tokens, width)
        and width % 2 == 0
        and cos.stride(2) == sin.stride(2) == 1
        and cos.stride(1) == sin.stride(1)
    )


def _is_rotation(function: Rotation, operations: Operations) -> bool:
    generator = torch.Generator().manual_seed(_SEED)
    q, k = (torch.randn((1, heads, 3, 8), generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn((1, 3, 8), generator=generator) for _ in range(2))
    try:
        with torch.no_grad():
            theirs = function(q, k, cos, sin)
            ours = [operations.rotate(x[0], cos[0], sin[0])[None] for x in (q, k)]
            return len(theirs) == 2 and all(map(agree, ours, theirs))
    except Exception:  # another signature, other shapes
        return False
