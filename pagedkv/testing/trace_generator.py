"""Making traces that look like published ones, for those who do not have the files: the same lengths, arrivals and reuse, from a seed.

Fitted to three published traces: Mooncake's synthetic one (FAST 2025, Apache-2.0) and Azure's code and conversation traces of 2023
(CC-BY-4.0; Splitwise, ISCA 2024). Only quantiles and counts of them are kept here. Not kept: bursts, that is, how one gap between arrivals
depends on the one before; and how an output's length depends on its prompt's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidRequestError
from pagedkv.testing.traces import Trace, TraceRequest, make_trace

Quantiles = tuple[float, ...]

_AT = np.array([0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.9, 100]) / 100  # where a table's values stand
_MOONCAKE_BLOCK_SIZE = 512


@dataclass(frozen=True, slots=True)
class _Tables:
    """Quantiles of one population of requests: tokens, and milliseconds between arrivals."""

    prompt: Quantiles
    output: Quantiles


_GAPS: Mapping[str, Quantiles] = MappingProxyType(
    {
        "mooncake": (0, 3, 13, 26, 55, 90, 129, 175, 229, 311, 417, 584, 783, 1006, 1215, 1842, 2119),
        "azure-code": (0, 0, 0, 0, 1, 3, 15, 64, 95, 100, 160, 273, 401, 799, 2205, 79233, 217169),
        "azure-conv": (0, 1, 6, 16, 37, 61, 87, 118, 159, 214, 289, 421, 565, 749, 890, 1411, 4315),
    }
)
# The longest gaps are too rare for quantiles to say how much they add up to.
_MEAN_GAPS: Mapping[str, float] = MappingProxyType({"mooncake": 256.0, "azure-code": 389.7, "azure-conv": 180.8})
_AZURE: Mapping[str, _Tables] = MappingProxyType(
    {
        "azure-code": _Tables(
            prompt=(3, 17, 75, 147, 386, 770, 1075, 1469, 1909, 2433, 3192, 5188, 7303, 7436, 7436, 7437, 7437),
            output=(6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 171, 251, 825, 1899),
        ),
        "azure-conv": _Tables(
            prompt=(2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4098, 4142, 6179, 14050),
            output=(7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 540, 601, 954, 1000),
        ),
    }
)
# Mooncake's requests either share their first block with no other, or ask about a document that 2 to 24 of them ask about.
_ALONE = _Tables(
    prompt=(13, 16, 19, 22, 30, 42, 74, 169, 543, 3532, 15769, 19624, 24428, 34815, 41155, 98686, 134773),
    output=(1, 3, 17, 43, 114, 168, 212, 251, 291, 331, 387, 513, 664, 770, 782, 826, 842),
)
_ASKING = _Tables(
    prompt=(13, 24, 2696, 3160, 5580, 11100, 15806, 18150, 23460, 31297, 37351, 45119, 54834, 62054, 66766, 191374, 191378),
    output=(2, 2, 2, 2, 4, 7, 10, 15, 23, 39, 68, 117, 213, 394, 532, 768, 893),
)
_SHARE_ASKING = 2190 / 3993
_GROUP_SIZES: Quantiles = (2, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 9, 12, 16, 20, 24, 24)
_MEAN_GROUP_SIZE = 2190 / 408
_NEW_BLOCKS = np.array([213, 1141, 288, 112, 16, 12]) / 1782  # how often so many last blocks of a document are a request's own
# From the first request about a document to the last, counted in requests, and of how many in all.
_SPANS: Quantiles = (3, 42, 227, 408, 804, 1064, 1465, 1790, 2113, 2472, 2873, 3225, 3458, 3618, 3700, 3847, 3856)
_SPANS_OF = 3993
_SPAN_NOISE = 0.5  # how loosely spans follow the logarithm of the number of requests

KINDS = tuple(_GAPS)


def generate_trace(kind: str, num_requests: int, seed: int) -> Trace:
    """Draw a trace with the statistics of a published one.

    Lengths and gaps are drawn evenly over their distribution (one from each of ``num_requests`` equal parts, in random order), so that a
    short trace has the quantiles of a long one.

    Args:
        kind: ``"mooncake"`` (hash ids of 512 tokens), ``"azure-code"`` or ``"azure-conv"`` (no hash ids).
        num_requests: at least 1.
        seed: the same seed gives the same trace.

    Raises:
        InvalidRequestError: an unknown kind, or fewer than one request.
    """
    if kind not in KINDS:
        raise InvalidRequestError(f"trace kind is {kind!r}: generators exist for {', '.join(KINDS)}")
    if num_requests < 1:
        raise InvalidRequestError(f"num_requests is {num_requests}: it must be at least 1")
    rng = np.random.default_rng(seed)
    gaps = _draw(_GAPS[kind], num_requests - 1, rng)
    gaps *= _MEAN_GAPS[kind] / max(float(gaps.mean()), 1e-9) if len(gaps) else 1.0
    arrivals = np.concatenate([np.zeros(1), np.cumsum(gaps) / 1000]).tolist()
    bodies: list[_Body]
    if kind == "mooncake":
        placed = [*_alone(num_requests - _num_asking(num_requests), rng), *_asking(_num_asking(num_requests), rng)]
        bodies = _with_ids(body for _, body in sorted(placed, key=lambda each: each[0]))
        size = _MOONCAKE_BLOCK_SIZE
    else:
        prompts, outputs = (_whole(_draw(table, num_requests, rng)) for table in (_AZURE[kind].prompt, _AZURE[kind].output))
        bodies = [(prompt, output, ()) for prompt, output in zip(prompts, outputs, strict=True)]
        size = 0
    return make_trace(kind, size, (TraceRequest(at, *body) for at, body in zip(arrivals, bodies, strict=True)))


_Body = tuple[int, int, tuple[int, ...]]  # prompt and output tokens, hash ids


@dataclass(frozen=True, slots=True)
class _Wish:
    """A request before it has hash ids: of which document, and how many blocks at its end are its own."""

    num_prompt_tokens: int
    num_output_tokens: int
    document: int | None
    num_own_blocks: int


def _num_asking(num_requests: int) -> int:
    return round(num_requests * _SHARE_ASKING)


def _alone(num: int, rng: np.random.Generator) -> Iterator[tuple[float, _Wish]]:
    """Requests that share nothing, each with its place in the trace, from 0 to 1."""
    lens = zip(_whole(_draw(_ALONE.prompt, num, rng)), _whole(_draw(_ALONE.output, num, rng)), strict=True)
    for (prompt, output), place in zip(lens, rng.random(num).tolist(), strict=True):
        yield place, _Wish(prompt, output, None, -(-prompt // _MOONCAKE_BLOCK_SIZE))


def _asking(num: int, rng: np.random.Generator) -> Iterator[tuple[float, _Wish]]:
    """Requests about documents, as far from each other as in the published trace, with their places."""
    outputs = iter(_whole(_draw(_ASKING.output, num, rng)))
    num_documents = max(round(num / _MEAN_GROUP_SIZE), 1)
    sizes = _whole(_draw(_GROUP_SIZES, num_documents, rng))
    # What rounding left over or short goes to documents at random, one request each.
    while (excess := sum(sizes) - num) != 0:
        chosen = int(rng.integers(num_documents))
        sizes[chosen] = max(sizes[chosen] - (1 if excess > 0 else -1), 0)
    # The more requests ask about a document, the longer it is asked about, and the more often towards the end.
    spans = np.empty(num_documents)
    spans[np.argsort(np.log1p(sizes) + _SPAN_NOISE * rng.standard_normal(num_documents))] = np.sort(_draw(_SPANS, num_documents, rng))
    spans /= _SPANS_OF
    lengths = _whole(_draw(_ASKING.prompt, num_documents, rng))
    for document, (length, span, askers) in enumerate(zip(lengths, spans.tolist(), sizes, strict=True)):
        within = np.concatenate([[0.0, 1.0], np.sqrt(rng.random(max(askers - 2, 0)))])[:askers]
        for place in (rng.random() * (1 - span) + span * within).tolist():
            own = min(int(rng.choice(len(_NEW_BLOCKS), p=_NEW_BLOCKS)), -(-length // _MOONCAKE_BLOCK_SIZE))
            yield place, _Wish(length, next(outputs), document, own)


def _with_ids(wishes: Iterator[_Wish]) -> list[_Body]:
    """Hash ids: a document's for the shared blocks, new ones for the others. The first who asks brings the document."""
    documents: dict[int, tuple[int, ...]] = {}
    numbers, bodies = count(), []
    for wish in wishes:
        num_blocks = -(-wish.num_prompt_tokens // _MOONCAKE_BLOCK_SIZE)
        known = documents.get(wish.document, ()) if wish.document is not None else ()
        shared = known[: num_blocks - wish.num_own_blocks]
        ids = shared + tuple(islice(numbers, num_blocks - len(shared)))
        if wish.document is not None:
            documents.setdefault(wish.document, ids)
        bodies.append((wish.num_prompt_tokens, wish.num_output_tokens, ids))
    return bodies


def _draw(quantiles: Quantiles, num: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """``[num]`` values, one from each of ``num`` equally likely parts of the distribution, in random order."""
    parts = (rng.permutation(num) + rng.random(num)) / max(num, 1)
    # Between a table's values the logarithm is interpolated: their tails are long.
    values: npt.NDArray[np.float64] = np.expm1(np.interp(parts, _AT, np.log1p(np.array(quantiles, dtype=np.float64))))
    return values


def _whole(values: npt.NDArray[np.float64]) -> list[int]:
    rounded: list[int] = np.maximum(np.rint(values), 1).astype(np.int64).tolist()
    return rounded
