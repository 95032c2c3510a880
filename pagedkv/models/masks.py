"""From transformers' mask functions to ``attention.Mask`` values.

Owns the classification (by probing what the function answers, never by names or configs: several models build a sliding
or chunked mask without saying so anywhere else) and the carriers, one-element tensors that travel through the model in
a mask's place. It does not own how a mask is applied: that is the attention backend's.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import CodeType, FunctionType

import torch
from torch import Tensor

from pagedkv.attention import Mask
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import AttentionCall, MaskFunction

# Probes lie far out, so that a window of any real size shows its left edge.
_FAR = 1 << 40
_MAX_REMEMBERED = 256


def classify_mask(mask_function: MaskFunction, *, device: torch.device | str = "cpu") -> Mask | None:
    """Which kind of mask a transformers mask function is.

    Finds the left edge of what a query sees by bisection, guesses the kind from how the edge moves, and accepts the guess
    only if it agrees with the function on dense and on scattered positions, for two heads.

    Args:
        mask_function: ``(batch, head, query position, key position) -> bool`` over int64 tensors that broadcast.
        device: where tensors that the function captured live.

    Returns:
        A causal, sliding or chunked ``Mask``; None when the function is of no such kind or cannot be evaluated.

    Cost: about 150 calls of the function on single numbers and 6 on small grids, some milliseconds.
    """
    try:
        guess = _guess(_Probe(mask_function, torch.device(device)))
        return guess if guess is not None and _agrees(guess, mask_function, torch.device(device)) else None
    except (IndexError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return None  # functions over captured tensors (padding, packed documents) cannot be asked about far positions


class _Probe:
    """Asks a mask function about single pairs of positions, batch 0, head 0."""

    def __init__(self, mask_function: MaskFunction, device: torch.device) -> None:
        self._function = mask_function
        self._device = device
        self._zero = torch.zeros((), dtype=torch.int64, device=device)

    def visible(self, query: int, key: int) -> bool:
        at = [torch.tensor(position, dtype=torch.int64, device=self._device) for position in (query, key)]
        return bool(torch.as_tensor(self._function(self._zero, self._zero, at[0], at[1])))

    def first(self, query: int) -> int:
        """The earliest visible key of a query, if visibility is one run that ends at the query."""
        if self.visible(query, 0):
            return 0
        hidden, seen = 0, query
        while seen - hidden > 1:
            middle = (hidden + seen) // 2
            if self.visible(query, middle):
                seen = middle
            else:
                hidden = middle
        return seen


def _guess(probe: _Probe) -> Mask | None:
    if not probe.visible(_FAR, _FAR) or probe.visible(_FAR, _FAR + 1):
        return None
    here, after = probe.first(_FAR), probe.first(_FAR + 1)
    if here == after == 0:
        return Mask.causal()
    if after == here + 1 and probe.first(_FAR + 7777) == here + 7777:
        return Mask.sliding(_FAR - here + 1)
    # Chunked: the edge of every query of a chunk is the chunk's start, so the next chunk begins one size further on.
    size = 1
    while size < _FAR and probe.first(here + size) == here:
        size *= 2
    same, other = size // 2, size
    while other - same > 1:
        middle = (same + other) // 2
        if probe.first(here + middle) == here:
            same = middle
        else:
            other = middle
    return Mask.chunked(other)


def _agrees(mask: Mask, mask_function: MaskFunction, device: torch.device) -> bool:
    size = max(mask.size, 1)
    generator = torch.Generator().manual_seed(size & 0x7FFFFFFF)
    scattered = torch.randint(0, max(4 * size, 4096), (2, 4096), generator=generator)
    base = 5 * size + 31
    edge = torch.cat([torch.arange(max(base - size - 66, 0), max(base - size + 66, 1)), torch.arange(base - 66, base + 68)])
    queries = torch.arange(base, base + 64)
    grids = [
        (torch.arange(130)[:, None], torch.arange(130)[None, :]),
        (queries[:, None], edge[None, :]),
        (scattered[0], scattered[1]),
    ]
    for query, key in grids:
        want = mask.visible(query, key)
        for head in (0, 1):
            indices = [torch.tensor(0), torch.tensor(head), query, key]
            got = torch.as_tensor(mask_function(*(index.to(device) for index in indices))).cpu()
            if not torch.equal(got.expand(want.shape), want):
                return False
    return True


class MaskCarriers:
    """Gives each mask of a model a carrier tensor and knows it again when the attention function receives it.

    A carrier is recognised by its storage: Python attributes would not survive the slicing that some models do. It lives
    on the CPU whatever the model's device, because nobody may compute with it.

    Args:
        shapes_only: take what cannot be classified for causal, because only shapes are of interest (models without weights).
        harmless: that models may compute with carriers, in vain, because whoever attends knows the mask without what comes of it:
            they are on the model's device, and have one row.
    """

    def __init__(self, *, shapes_only: bool = False, harmless: bool = False) -> None:
        self._shapes_only = shapes_only
        self._harmless = harmless
        self._carriers: dict[Mask, Tensor] = {}
        self._by_storage: dict[int, Mask] = {}
        self._remembered: dict[Hashable, Mask | None] = {}
        self._unknown = torch.zeros((1, 1, 1, 1), device="cpu")

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks seen so far, in the order in which they came."""
        return tuple(self._carriers)

    def carrier(self, mask_function: MaskFunction, num_queries: int, device: torch.device | None) -> Tensor:
        """The carrier ``[1, 1, num_queries, 1]`` of a mask function.

        A mask of no known kind gets one too, that ``mask_of`` refuses: models make masks that none of their layers uses.
        """
        mask = self._classified(mask_function, device)
        where = device if self._harmless and device is not None else torch.device("cpu")
        carrier = self._unknown if mask is None else self._known(mask, where)
        return carrier.expand(1, 1, 1 if self._harmless else int(num_queries), 1)

    def mask_of(self, carrier: Tensor) -> Mask:
        """The mask that a carrier, or a view of one, stands for."""
        storage = carrier.untyped_storage().data_ptr()
        mask = self._by_storage.get(storage)
        if mask is not None:
            return mask
        if storage == self._unknown.untyped_storage().data_ptr():
            raise UnsupportedModelError("the model's attention mask is none of causal, sliding window and chunked")
        raise UnsupportedModelError("the model computes on its attention mask instead of only passing it to attention")

    def _known(self, mask: Mask, device: torch.device) -> Tensor:
        base = self._carriers.get(mask)
        if base is None:
            base = torch.zeros((1, 1, 1, 1), device=device)
            self._carriers[mask] = base
            self._by_storage[base.untyped_storage().data_ptr()] = mask
        return base

    def _classified(self, mask_function: MaskFunction, device: torch.device | None) -> Mask | None:
        # transformers makes the closure anew for every forward; what it is made of says which mask it is.
        try:
            key: Hashable = _structure(mask_function)
        except _NoStructureError:
            key = None
        if key is not None and key in self._remembered:
            return self._remembered[key]
        where = "cpu" if device is None or torch.device(device).type == "meta" else device
        mask = classify_mask(mask_function, device=where)
        if mask is None and self._shapes_only:
            mask = Mask.causal()
        if key is not None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = mask
        return mask


def resolve_mask(call: AttentionCall, carriers: MaskCarriers) -> Mask:
    """The mask of one attention call: the one the model made, checked against the window that the module states.

    Raises:
        UnsupportedModelError: the two disagree, so implementations of transformers would differ among themselves.
    """
    if call.mask is None:
        return Mask.causal() if call.window is None else Mask.sliding(call.window)
    mask = carriers.mask_of(call.mask)
    if call.window is not None and (mask.kind != "sliding" or mask.size != call.window):
        raise UnsupportedModelError(
            f"{type(call.module).__name__} states a sliding window of {call.window} but its mask is {mask.kind} {mask.size or ''}".rstrip()
        )
    return mask


class _NoStructureError(Exception):
    """A mask function captured something that has no value to compare."""


def _structure(value: object) -> Hashable:
    """A value that is equal for two functions made of the same code over the same captured values."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, FunctionType):
        code: CodeType = value.__code__
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return (
            value.__module__,
            code,
            _structure(cells),
            _structure(value.__defaults__),
            _structure(tuple((value.__kwdefaults__ or {}).items())),
        )
    if isinstance(value, (tuple, list)):
        return tuple(_structure(item) for item in value)
    if isinstance(value, Tensor) and value.numel() <= 8 and value.device.type != "meta":
        return str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist())
    raise _NoStructureError
