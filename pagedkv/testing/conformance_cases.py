"""Attention steps in a few numbers: drawn at random, said in words, made simpler one number at a time. Owns no tensor."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pagedkv.attention import AttentionSpec, Mask
from pagedkv.testing.attention_cases import Geometry, Variant

_GROUPS = (1, 1, 2, 3, 4, 5, 8)
_DIMS = (4, 8, 16, 20, 32, 64, 80, 128)
_BLOCK_SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
_DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WINDOWS = (1, 2, 5, 17, 64)
_LONGEST = (12, 40, 40, 130)
_NUM_DECODES, _NUM_CHUNKS = (0, 1, 3, 6), (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class StepCase:
    """One step and the layer that attends in it; equal cases make equal tensors.

    Attributes:
        geometry: sizes and dtype of the layer.
        variant: mask, scale and what else the layer asks for.
        query_lens: per sequence the tokens to compute.
        seq_lens: per sequence its tokens after the step.
        drop_behind: blocks that the mask hides from every query of the step are null in the tables.
        garbage: what does not belong to the step lies around it; see ``make_case``.
        mixed_layers: a layer with the plain causal mask attends first, over the same planned step.
        large: scores reach far beyond what ``exp`` can hold in float32.
        seed: of all numbers.
    """

    geometry: Geometry
    variant: Variant
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    drop_behind: bool = False
    garbage: bool = False
    mixed_layers: bool = False
    large: bool = False
    seed: int = 0

    def spec(self, device: torch.device) -> AttentionSpec:
        """What the layer asks of a backend."""
        return self.variant.spec(self.geometry, device)

    def __str__(self) -> str:
        layer, variant = self.geometry, self.variant
        sequences = ", ".join(f"{query} of {length}" for query, length in zip(self.query_lens, self.seq_lens, strict=True))
        mask = variant.mask.kind if not variant.mask.size else f"{variant.mask.kind} mask of {variant.mask.size}"
        parts = [
            f"{_count(layer.num_heads, 'query head')} over {_count(layer.num_kv_heads, 'K/V head')}",
            f"K of width {layer.key_dim}, V of {layer.value_dim}",
            f"{layer.dtype}".removeprefix("torch."),
            f"blocks of {layer.block_size}",
            mask,
            *([f"soft cap {variant.softcap}"] if variant.softcap is not None else []),
            *([f"scale {variant.scale}"] if variant.scale is not None else []),
            *(["sinks"] if variant.sinks else []),
            *(["ALiBi slopes"] if variant.alibi else []),
            *(["blocks behind the mask given back"] if self.drop_behind else []),
            *(["garbage around the tables"] if self.garbage else []),
            *(["behind a causal layer in the same step"] if self.mixed_layers else []),
            *(["large scores"] if self.large else []),
        ]
        return f"{', '.join(parts)}; tokens computed: {sequences} (seed {self.seed})"


def draw_case(seed: int) -> StepCase:
    """A random case of anything that the protocol can say; the same seed gives the same case."""
    rng = random.Random(seed)
    key_dim = rng.choice(_DIMS)
    geometry = Geometry(
        num_kv_heads=rng.choice((1, 2, 3)),
        group=rng.choice(_GROUPS),
        key_dim=key_dim,
        value_dim=rng.choice((key_dim, key_dim, *_DIMS)),
        block_size=rng.choice(_BLOCK_SIZES),
        dtype=rng.choice(_DTYPES),
    )
    window = rng.choice(_WINDOWS)
    plain = rng.random() < 0.3  # many a kernel knows masks and nothing else
    variant = Variant(
        mask=rng.choice((Mask.causal(), Mask.sliding(window), Mask.chunked(window))),
        softcap=None if plain else rng.choice((None, None, 2.0, 30.0)),
        sinks=not plain and rng.random() < 0.4,
        alibi=not plain and rng.random() < 0.4,
        scale=rng.choice((None, None, 0.3, 1.0 / key_dim)),
    )
    query_lens, seq_lens = _draw_lengths(rng)
    return StepCase(
        geometry,
        variant,
        query_lens=query_lens,
        seq_lens=seq_lens,
        drop_behind=rng.random() < 0.5,
        garbage=rng.random() < 0.5,
        mixed_layers=rng.random() < 0.3,
        large=rng.random() < 0.2,
        seed=seed,
    )


def _draw_lengths(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Decodes, then chunks with and without a past, some of a single token; at least one sequence."""
    longest, decodes, chunks = rng.choice(_LONGEST), rng.choice(_NUM_DECODES), rng.choice(_NUM_CHUNKS)
    seq_lens = [rng.randint(1, longest) for _ in range(max(decodes + chunks, 1))]
    query_lens = [1] * decodes + [length if rng.random() < 0.5 else rng.randint(1, length) for length in seq_lens[decodes:]]
    return tuple(query_lens), tuple(seq_lens)


def simpler_cases(case: StepCase) -> Iterator[StepCase]:
    """Cases that differ from this one in a single respect, and are simpler in that; the largest steps first."""
    for seq in range(len(case.seq_lens) if len(case.seq_lens) > 1 else 0):
        yield replace(case, query_lens=_without(case.query_lens, seq), seq_lens=_without(case.seq_lens, seq))
    plain = (
        replace(case, large=False),
        replace(case, mixed_layers=False),
        replace(case, garbage=False),
        replace(case, drop_behind=False),
    )
    yield from (simpler for simpler in plain if simpler != case)
    for variant in _simpler_variants(case.variant):
        yield replace(case, variant=variant)
    for geometry in _simpler_geometries(case.geometry):
        yield replace(case, geometry=geometry)
    for seq, (query, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        for shorter in _smaller(length):
            yield _with_lengths(case, seq, min(query, shorter), shorter)
        for fewer in _smaller(query):
            yield _with_lengths(case, seq, fewer, length)


def _simpler_variants(variant: Variant) -> Iterator[Variant]:
    plain = Variant()
    for name in ("softcap", "sinks", "alibi", "scale", "mask"):
        if getattr(variant, name) != getattr(plain, name):
            yield replace(variant, **{name: getattr(plain, name)})
    for size in _smaller(variant.mask.size):
        yield replace(variant, mask=Mask(variant.mask.kind, size))


def _simpler_geometries(geometry: Geometry) -> Iterator[Geometry]:
    if geometry.dtype != torch.float32:
        yield replace(geometry, dtype=torch.float32)
    yield from (replace(geometry, group=smaller) for smaller in _smaller(geometry.group))
    yield from (replace(geometry, num_kv_heads=smaller) for smaller in _smaller(geometry.num_kv_heads))
    yield from (replace(geometry, block_size=smaller) for smaller in _smaller(geometry.block_size))
    for width in (1, 4, 8, 16):
        if width < geometry.key_dim:
            yield replace(geometry, key_dim=width, value_dim=width)
    if geometry.value_dim != geometry.key_dim:
        yield replace(geometry, value_dim=geometry.key_dim)


def _smaller(number: int) -> list[int]:
    """Numbers from 1 to below this one: the smallest, where most bugs show, and some on the way there; a bug may want an odd one."""
    return [smaller for smaller in dict.fromkeys((1, 2, 3, 5, number // 2, number - 2, number - 1)) if 1 <= smaller < number]


def _with_lengths(case: StepCase, seq: int, query: int, length: int) -> StepCase:
    queries, lengths = list(case.query_lens), list(case.seq_lens)
    queries[seq], lengths[seq] = query, length
    return replace(case, query_lens=tuple(queries), seq_lens=tuple(lengths))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _without(values: tuple[int, ...], index: int) -> tuple[int, ...]:
    return values[:index] + values[index + 1 :]
