"""What an attention backend is, and the values that a caller hands to one. It computes nothing and owns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pagedkv.attention.mask import Mask
from pagedkv.checks import flag, integer, number, shown
from pagedkv.errors import ConfigError, InvalidRequestError
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer asks of a backend, before any tensor exists.

    Attributes:
        num_heads: query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: heads of K and V.
        key_dim: elements of one head of Q and K.
        value_dim: elements of one head of V and of the output.
        block_size: tokens in one block.
        dtype: dtype of Q, K, V and the output.
        device_type: ``"cpu"``, ``"cuda"``, ...
        mask: which positions are seen.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: each query head has a learned logit in the softmax denominator.
        alibi: each query head has a slope by distance.
        scale: factor on the scores; None for ``key_dim ** -0.5``.

    Raises:
        ConfigError: a count, cap or scale that cannot be; names it.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype
    device_type: str
    mask: Mask
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim", "block_size"):
            integer(f"AttentionSpec.{name}", getattr(self, name), least=1, most=2**31 - 1)
        for name, kind in (("dtype", torch.dtype), ("device_type", str), ("mask", Mask)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"AttentionSpec.{name} is {shown(getattr(self, name))}: it must be a {kind.__name__}")
        for name in ("sinks", "alibi"):
            flag(f"AttentionSpec.{name}", getattr(self, name))
        _check_factors("AttentionSpec", softcap=self.softcap, scale=self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class AttendOptions:
    """How one layer attends. The order is: scale, soft cap, ALiBi, mask, sink, softmax.

    Attributes:
        mask: which positions are seen.
        scale: factor on ``q . k``.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
        sinks: ``[Hq]`` one logit per query head that joins the softmax denominator and takes no value; None for none.
        alibi_slopes: ``[Hq]`` adds ``slope * (key position - query position)``; None for none.

    Raises:
        ConfigError: a cap that is not positive and finite, a scale that is not finite, or a mask that is none.
    """

    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise ConfigError(f"AttendOptions.mask is {shown(self.mask)}: it must be a Mask")
        number("AttendOptions.scale", self.scale, limit="a finite number")
        _check_factors("AttendOptions", softcap=self.softcap, scale=None)
        for name in ("sinks", "alibi_slopes"):
            per_head = getattr(self, name)
            if per_head is not None and not isinstance(per_head, Tensor):
                raise ConfigError(f"AttendOptions.{name} is {shown(per_head)}: it must be a tensor, or None")


def _check_factors(owner: str, *, softcap: object, scale: object) -> None:
    if softcap is not None and not number(f"{owner}.softcap", softcap, limit="positive and finite, or None for no cap") > 0:
        raise ConfigError(f"{owner}.softcap is {softcap}: it must be positive and finite, or None for no cap")
    if scale is not None:
        number(f"{owner}.scale", scale, limit="a finite number")


class StepAttention:
    """A backend's own metadata of one step. Callers keep it and hand it back; only the backend that made it reads it.

    Args:
        batch: the step on the device.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: StepBatch) -> None:
        self.batch = batch


@runtime_checkable
class AttentionBackend(Protocol):
    """Writes K/V into pools and reads them through block tables. One instance serves one engine, from one thread."""

    @property
    def name(self) -> str:
        """The name that ``get_backend`` knows it by."""
        ...

    def supports(self, spec: AttentionSpec) -> str | None:
        """None when layers like this can be run exactly, else the reason why not."""
        ...

    def plan(self, batch: StepBatch) -> StepAttention:
        """Metadata of one step, shared by all of its layers; valid as long as ``batch`` is."""
        ...

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """Store the K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]`` of the step's tokens in the slots of the pool's group."""
        ...

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """Attend from the step's tokens to all K/V of their sequences, which must have been written.

        Args:
            query: ``[T, Hq, Dk]``, packed like the step's tokens, any strides.
            pool: the layer's K and V.
            step: what ``plan`` returned for this step.
            options: mask, scale and variants.

        Returns:
            ``[T, Hq, Dv]`` in the query's dtype.

        Raises:
            InvalidRequestError: shapes that do not fit the pool or the step.
        """
        ...


def write_step(pool: LayerPool, key: Tensor, value: Tensor, batch: StepBatch) -> None:
    """Store the step's K and V in the slots of the pool's group; what most backends' ``write`` is."""
    group = pool.spec.group
    check_step(pool, batch)
    pool.write(key, value, blocks=batch.slot_blocks[group], offsets=batch.slot_offsets[group])


def check_query(query: Tensor, pool: LayerPool, batch: StepBatch, options: AttendOptions) -> None:
    """Raise ``InvalidRequestError`` when the query or the options do not fit the pool and the step. Reads no device value."""
    tokens, spec = batch.plan.num_tokens, pool.spec
    if query.ndim != 3 or query.shape[0] != tokens or query.shape[2] != spec.key_dim or query.shape[1] % spec.num_kv_heads:
        raise InvalidRequestError(
            f"query {list(query.shape)}: [{tokens}, a multiple of {spec.num_kv_heads}, {spec.key_dim}] is needed for this step and {spec}"
        )
    check_step(pool, batch)
    if query.requires_grad:
        raise InvalidRequestError("query requires a gradient: a K/V cache is for inference, run the model under torch.inference_mode()")
    if query.dtype != pool.dtype:
        raise InvalidRequestError(f"query is {query.dtype}, the pool stores {pool.dtype}")
    for name, per_head in (("sinks", options.sinks), ("alibi_slopes", options.alibi_slopes)):
        if per_head is not None and per_head.shape != query.shape[1:2]:
            raise InvalidRequestError(f"{name} {list(per_head.shape)}: one value for each of {query.shape[1]} query heads is needed")


def check_write(pool: LayerPool, key: Tensor, value: Tensor, batch: StepBatch) -> None:
    """Raise ``InvalidRequestError`` when K and V do not fit the pool and the step. Reads no device value."""
    check_step(pool, batch)
    pool.check_rows(key, value, num_tokens=batch.plan.num_tokens)


def check_step(pool: LayerPool, batch: StepBatch) -> None:
    """Raise ``InvalidRequestError`` when the step is not for this pool."""
    if pool.block_size != batch.block_size or pool.spec.group >= len(batch.slot_blocks):
        raise InvalidRequestError(
            f"the step has {len(batch.slot_blocks)} layer groups and blocks of {batch.block_size} tokens, "
            f"the pool is of group {pool.spec.group} with blocks of {pool.block_size}"
        )
