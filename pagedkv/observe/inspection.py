"""Makes views: copies one sequence's books and bytes out of a manager and a storage, or out of an engine.

Owns the choice of what is copied. It does not own how that looks (``view.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedkv.core import SequenceSnapshot, Snapshot
from pagedkv.errors import InvalidRequestError, UnknownHandleError
from pagedkv.observe.view import SequenceView
from pagedkv.storage import KVStorage

if TYPE_CHECKING:
    from pagedkv.engine import Engine


def inspect_sequence(engine: Engine, request_id: str, index: int = 0, *, position: int | None = None, layer: int = 0) -> SequenceView:
    """A view of a running request's sequence, copied out: it stays as it is when the engine goes on.

    Args:
        engine: between two steps.
        request_id: of a request that is running.
        index: which of its ``n`` continuations.
        position: whose K is shown; the last computed one when not given.
        layer: in which layer.

    Returns:
        the view: ``print`` it, or let a notebook show it.

    Raises:
        InvalidRequestError: no such request, continuation, position or layer; or the request waits or has ended and holds no blocks.
        ClosedError: the engine is closed.

    Cost: O(everything that lives in the engine); waits for the device once.
    """
    view = view_sequence(engine.snapshot(), engine.sequence_of(request_id, index), engine.storage, position=position, layer=layer)
    tokenizer = engine.tokenizer
    texts = () if tokenizer is None else tuple(str(tokenizer.decode([token])) for token in view.sequence.token_ids)
    return replace(view, title=f"request {request_id!r}, continuation {index}", texts=texts)


def view_sequence(
    snapshot: Snapshot, seq: int, storage: KVStorage | None = None, *, position: int | None = None, layer: int = 0
) -> SequenceView:
    """A view of one sequence of a snapshot, for users of the core and the storage without an engine.

    Args:
        snapshot: of the manager, taken now if ``storage`` is given: blocks may hold something else later.
        seq: the sequence's handle.
        storage: the pools; without them the view has no K.
        position: whose place (and K) is shown; the last computed one when not given.
        layer: in which layer; it also chooses the layer group. Only 0 without a storage.

    Raises:
        UnknownHandleError: the snapshot has no such sequence.
        InvalidRequestError: a position that is not computed, or a layer that does not exist.
        ClosedError: the storage is closed.
    """
    found = [sequence for sequence in snapshot.sequences if sequence.seq == seq]
    if not found:
        raise UnknownHandleError(f"the snapshot has no sequence of handle {seq}")
    sequence = found[0]
    layers = 1 if storage is None else len(storage.layers)
    if not 0 <= layer < layers:
        raise InvalidRequestError(f"layer is {layer}: it must be from 0 to {layers - 1}")
    position = _position(sequence, position)
    references = [dict(group) for group in snapshot.references]
    holders = tuple(tuple(held.get(block, 0) for block in table) for held, table in zip(references, sequence.block_tables, strict=True))
    group = 0 if storage is None else storage.layers[layer].spec.group
    view = SequenceView(f"sequence {seq}", sequence, holders, position=position, layer=layer, group=group)
    if storage is None or position is None:
        return view
    block, offset = view.block_id, position % sequence.block_size
    key = storage.layers[layer].key[block, :, offset].float().cpu().tolist()
    return replace(view, key=tuple(tuple(head) for head in key))


def _position(sequence: SequenceSnapshot, asked: int | None) -> int | None:
    computed = sequence.num_computed_tokens
    if asked is None:
        return computed - 1 if computed else None
    if not 0 <= asked < computed:
        raise InvalidRequestError(f"position is {asked}: K is stored for {computed} of the sequence's {sequence.num_tokens} tokens, from 0")
    return asked
