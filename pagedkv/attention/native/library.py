"""Finds, checks and loads the shared library that was built for this processor's instruction set.

Owns the names of the builds, the order of preference and the mirrored structs. It compiles nothing: what is missing is said, and why.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
_ABI = 5


class StepStruct(ctypes.Structure):
    """``Step`` of step.h: one layer's tensors and one step's tables, by address and stride in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "output", "key", "value", "sinks", "slopes", "tables", "cu_seqlens_q", "seq_lens")),
        ("table_stride", ctypes.c_int64),
        ("query_stride", ctypes.c_int64 * 2),
        ("output_stride", ctypes.c_int64 * 2),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in ("num_seqs", "num_heads", "num_kv_heads", "key_dim", "value_dim", "block_size")),
        *((name, ctypes.c_int32) for name in ("dtype", "mask", "mask_size", "batch_invariant")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class RowsStruct(ctypes.Structure):
    """``Rows`` of joined.h: K and V of some tokens, and the slots where they go."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "key_pool", "value_pool", "blocks", "offsets")),
        ("key_stride", ctypes.c_int64 * 2),
        ("value_stride", ctypes.c_int64 * 2),
        ("key_pool_stride", ctypes.c_int64 * 3),
        ("value_pool_stride", ctypes.c_int64 * 3),
        ("num_tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_kv_heads", "key_nbytes", "value_nbytes", "item_nbytes")),
    )


class LayerStruct(ctypes.Structure):
    """``Layer`` of layers.h: one norm, gate or rotation of some rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "out")),
        *((name, ctypes.c_int64 * 2) for name in ("x_stride", "y_stride", "out_stride")),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_heads", "width", "dtype", "form")),
        ("epsilon", ctypes.c_float),
    )


class JoinedStruct(ctypes.Structure):
    """``Joined`` of joined.h: the structs of a rotation, of rows to store and of attention, and the step's work list."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rotation", "rows", "step", "items", "merges", "counts")),
        ("key_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class ProductStruct(ctypes.Structure):
    """``Product`` of products.h: rows, and packed weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "added", "out")),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs", "num_rows")),
        *((name, ctypes.c_int32) for name in ("dtype", "layout", "halves", "gate")),
    )


class DecoderStruct(ctypes.Structure):
    """``Decoder`` of decoder.h: the norms of one layer, and its products of many and of few rows."""

    _fields_ = (
        *((name, LayerStruct) for name in ("first_norm", "second_norm")),
        *((name, ProductStruct * 4) for name in ("many", "few")),
        ("most_few", ctypes.c_int64),
    )


class PlacedStruct(ctypes.Structure):
    """``PlacedDecoder`` of decoder.h: a layer, and where its K and V are."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("decoder", "key_pool", "value_pool"))


ITEM_NBYTES = 8 * 4
"""Bytes of an ``Item`` and of a ``Merge``."""


@dataclass(frozen=True, slots=True)
class Build:
    """One build of the kernel.

    Attributes:
        name: of the instruction set, as ``python -m pagedkv doctor`` shows it.
        machines: processors, by ``platform.machine()``, that it can be built for; empty for any.
        flags: what the compiler is told.
        needs: processor flags without which it may not be run.
        permission: entry point that asks the system for what no process may use unasked, and returns 0 when it may; None if not needed.
    """

    name: str
    machines: tuple[str, ...]
    flags: tuple[str, ...]
    needs: frozenset[str]
    permission: str | None = None

    @property
    def path(self) -> Path:
        """Where the library lies, if it was built."""
        return FOLDER / f"libpagedkv_{self.name}.so"


_X86 = ("x86_64", "AMD64")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c"})
_DOTS = _AVX512 | {"avx512_bf16"}
BUILDS = (
    Build(
        "amx",
        _X86,
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        _DOTS | {"amx_tile", "amx_bf16"},
        "pagedkv_ask_for_tiles",
    ),
    Build("avx512bf16", _X86, ("-march=x86-64-v4", "-mavx512bf16"), _DOTS),
    Build("avx512", _X86, ("-march=x86-64-v4",), _AVX512),
    Build("avx2", _X86, ("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c", "bmi2"})),
    Build("portable", (), (), frozenset()),
)
"""All builds, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library. ``build`` says which; ``functions`` are its entry points, typed."""

    build: Build
    functions: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of the search: a library or None, and a reason for every build that is preferred to it and was not taken."""

    library: Library | None
    reasons: tuple[str, ...]


def processor_flags() -> frozenset[str]:
    """The instruction sets that the processor and the system offer, by the kernel's names; empty where it cannot be known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def load_library(name: str | None = None) -> Loaded:
    """The best library that was built and can run here.

    Args:
        name: of one build, to take just that; any when None.

    Cost: opens one or more files; call it once per backend.
    """
    flags, machine = processor_flags(), platform.machine()
    reasons: list[str] = []
    for build in BUILDS:
        if name is not None and build.name != name:
            continue
        reason = _unusable(build, flags, machine)
        if reason is None:
            opened = _open(build)
            if isinstance(opened, ctypes.CDLL):
                return Loaded(Library(build, opened), tuple(reasons))
            reason = opened
        reasons.append(f"{build.name}: {reason}")
    if name is not None and not reasons:
        reasons.append(f"{name}: no such build, there are {', '.join(build.name for build in BUILDS)}")
    return Loaded(None, tuple(reasons))


def _unusable(build: Build, flags: frozenset[str], machine: str) -> str | None:
    if build.machines and machine not in build.machines:
        return f"not for {machine}"
    missing = build.needs - flags
    if missing:
        return f"the processor lacks {', '.join(sorted(missing))}"
    return None if build.path.is_file() else "was not built: reinstall pagedkv from source where a C++ compiler (g++ or clang++) is found"


def _open(build: Build) -> ctypes.CDLL | str:
    try:
        functions = ctypes.CDLL(str(build.path))
        for name in (
            "pagedkv_abi",
            "pagedkv_lanes",
            "pagedkv_step_nbytes",
            "pagedkv_rows_nbytes",
            "pagedkv_layer_nbytes",
            "pagedkv_joined_nbytes",
            "pagedkv_product_nbytes",
            "pagedkv_decoder_nbytes",
            "pagedkv_multiplies_pairs",
        ):
            getattr(functions, name).restype = ctypes.c_int32
        sizes = (
            functions.pagedkv_abi(),
            functions.pagedkv_step_nbytes(),
            functions.pagedkv_rows_nbytes(),
            functions.pagedkv_layer_nbytes(),
            functions.pagedkv_joined_nbytes(),
            functions.pagedkv_product_nbytes(),
            functions.pagedkv_decoder_nbytes(),
        )
    except (OSError, AttributeError) as error:
        return f"cannot be loaded, reinstall pagedkv: {error}"
    if sizes != (_ABI, *map(ctypes.sizeof, (StepStruct, RowsStruct, LayerStruct, JoinedStruct, ProductStruct, DecoderStruct))):
        return "was built for another version: reinstall pagedkv"
    if build.permission is not None and getattr(functions, build.permission)() != 0:
        return "the system does not let this process use its instructions"
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    functions.pagedkv_plan.argtypes = (pointer, pointer, pointer, pointer)
    functions.pagedkv_plan.restype = None
    functions.pagedkv_scratch_nbytes.argtypes = (pointer, pointer, number)
    functions.pagedkv_scratch_nbytes.restype = ctypes.c_int64
    functions.pagedkv_attend.argtypes = (pointer, pointer, pointer, pointer, pointer, number)
    functions.pagedkv_attend.restype = number
    functions.pagedkv_write.argtypes = (pointer,)
    functions.pagedkv_write.restype = None
    functions.pagedkv_attend_joined.argtypes = (pointer,) * 8
    functions.pagedkv_attend_joined.restype = number
    functions.pagedkv_run_decoders.argtypes = (pointer, number, *(pointer,) * 5, number, *(pointer,) * 2)
    functions.pagedkv_run_decoders.restype = number
    for name in ("pagedkv_norm", "pagedkv_gate", "pagedkv_rotate", "pagedkv_multiply"):
        getattr(functions, name).argtypes = (pointer, number)
        getattr(functions, name).restype = number
    return functions
