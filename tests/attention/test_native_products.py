"""Products with packed weights, of every build that runs here, against the same in float64 and against what they may not touch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from pagedkv.attention.native.library import BUILDS, Library, load_library
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.native.products import Int8Product, PairProduct
from pagedkv.errors import InvalidRequestError

RUNNABLE = [build.name for build in BUILDS if load_library(build.name).library is not None]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # of the largest result
SHAPES = ((1, 1), (3, 7), (16, 64), (65, 33), (200, 576))  # outputs, inputs: within a panel, at its end, behind it
ROWS = (0, 1, 2, 5, 6, 7, 13)

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native library was built")


def library_of(build: str) -> Library:
    library = load_library(build).library
    assert library is not None
    return library


def product(build: str, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Int8Product:
    return Int8Product(weight, scale, bias, library_of(build))


def drawn(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    return weight, torch.rand(outputs, generator=generator) + 0.01, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_int8_product_any_shape_is_what_float64_gives(build: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        weight, scale, bias = drawn(outputs, inputs, seed=outputs)
        exact_weight = weight.double() * scale.double()[:, None]
        for rows in ROWS:
            x, added = (torch.randn((1, rows, size), generator=torch.Generator().manual_seed(rows)) for size in (inputs, outputs))
            x, added = (x / 30).to(dtype), added.to(dtype)
            exact = x.double() @ exact_weight.T
            for given, more in ((None, None), (bias, None), (None, added), (bias, added)):
                want = exact + (0 if given is None else given.double()) + (0 if more is None else more.double())
                got = product(build, weight, scale, given)(x, more)
                assert (got.shape, got.dtype) == (want.shape, dtype)
                difference = (got.double() - want).abs()
                worst = float((difference / want.abs().max()).max()) if rows else 0.0
                assert worst <= BOUNDS[dtype], f"{rows} rows, {inputs} to {outputs}: {worst:.2e} of the largest"


@pytest.mark.parametrize("build", RUNNABLE)
def test_int8_product_neither_other_rows_nor_threads_change_a_bit(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = product(build, *drawn(1000, 96, seed=1))
    x = torch.randn((13, 96), generator=torch.Generator().manual_seed(2))
    together = multiply(x)
    assert torch.equal(together, torch.cat([multiply(row[None]) for row in x]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(together, multiply(x))


@pytest.mark.parametrize("build", RUNNABLE)
def test_int8_product_reads_strided_rows_and_no_neighbours(build: str) -> None:
    weight, scale, bias = drawn(70, 40, seed=3)
    multiply = product(build, weight, scale, bias)
    wide = torch.full((5, 3, 60), float("nan"), dtype=torch.bfloat16)
    wide[:, 1, 7:47] = torch.linspace(-1, 1, 200).view(5, 40)
    x, added = wide[:, 1, 7:47], torch.full((5, 141), float("nan"), dtype=torch.bfloat16)
    added[:, 1::2] = 2.0
    got = multiply(x, added[:, 1::2])
    assert torch.equal(got, multiply(x.contiguous(), torch.full((5, 70), 2.0, dtype=torch.bfloat16)))
    assert got.isfinite().all()


PAIRED = [build for build in RUNNABLE if PairProduct.fits(torch.zeros(1, 32, dtype=torch.bfloat16), library_of(build))]
PAIR_SHAPES = (
    (1, 32),
    (31, 64),
    (32, 32),
    (64, 96),
    (100, 160),
    (576, 64),
)  # outputs, inputs: part of a panel, whole ones, in halves or not
PAIR_ROWS = (0, 1, 11, 12, 13, 16, 17, 31, 32, 33, 49, 70, 257, 300)  # of tiles and of chunks: below, at, and beyond
needs_pairs = pytest.mark.skipif(not PAIRED, reason="no build that multiplies pairs runs here")


def pairs_drawn(
    build: str, outputs: int, inputs: int, *, bias: bool = False, in_halves: bool = False
) -> tuple[PairProduct, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn((outputs, inputs), generator=generator).bfloat16()
    added = torch.randn(outputs, generator=generator).bfloat16()
    return PairProduct(weight, added if bias else None, library_of(build), in_halves=in_halves), weight, added


@needs_pairs
@pytest.mark.parametrize("build", PAIRED)
def test_pair_product_any_shape_is_what_float64_gives(build: str) -> None:
    for outputs, inputs in PAIR_SHAPES:
        for has_bias, in_halves in ((False, False), (True, False), (True, True)):
            multiply, weight, bias = pairs_drawn(build, outputs, inputs, bias=has_bias, in_halves=in_halves)
            assert multiply.is_in_halves == (in_halves and outputs % 32 == 0)
            for rows in PAIR_ROWS:
                generator = torch.Generator().manual_seed(rows)
                x, more = (torch.randn((1, rows, size), generator=generator).bfloat16() for size in (inputs, outputs))
                exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
                for added in (None, more):
                    want = exact if added is None else exact + added.double()
                    got = multiply(x, added)
                    assert (got.shape, got.dtype) == (want.shape, torch.bfloat16)
                    worst = float(((got.double() - want).abs() / want.abs().max()).max()) if rows else 0.0
                    assert worst <= BOUNDS[torch.bfloat16], f"{rows} rows, {inputs} to {outputs}: {worst:.2e} of the largest"


@needs_pairs
@pytest.mark.parametrize("build", PAIRED)
def test_pair_product_neither_other_rows_nor_threads_change_a_bit(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, _, _ = pairs_drawn(build, 1000, 96)
    x = torch.randn((290, 96), generator=torch.Generator().manual_seed(2)).bfloat16()
    together = multiply(x)
    for count in (1, 5, 16, 33):
        assert torch.equal(together[7 : 7 + count], multiply(x[7 : 7 + count]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(together, multiply(x))


@needs_pairs
@pytest.mark.parametrize("build", PAIRED)
def test_pair_product_touches_nothing_but_its_result_and_no_row_sees_another(build: str) -> None:
    for outputs in (33, 64):
        multiply, weight, _ = pairs_drawn(build, outputs, 64)
        for rows in (1, 15, 20, 40):
            x = torch.randn((rows, 64), generator=torch.Generator().manual_seed(rows)).bfloat16()
            framed = torch.full((rows + 2, 64), float("nan")).bfloat16()
            framed[1:-1] = x
            assert torch.equal(multiply(framed[1:-1]), multiply(x))
            framed[2 if rows > 1 else 0] = float("inf")
            got = multiply(framed[1:-1])
            assert torch.equal(got[0], multiply(x)[0])
            assert torch.isfinite(got[0]).all()
    multiply, weight, _ = pairs_drawn(build, 100, 64)
    memory = torch.full((3, 100), 7.0).bfloat16()
    struct = type(multiply.struct).from_buffer_copy(multiply.struct)
    x = torch.ones((1, 64)).bfloat16()
    struct.x, struct.out, struct.num_rows = x.data_ptr(), memory[1].data_ptr(), 1
    library_of(build).functions.pagedkv_multiply(ctypes.addressof(struct), 1)
    assert bool((memory[[0, 2]] == 7).all())
    assert torch.allclose(memory[1].float(), (x.float() @ weight.float().T)[0], rtol=1e-2, atol=0.05)


@needs_pairs
def test_pair_product_other_shapes_are_refused() -> None:
    multiply, _, _ = pairs_drawn(PAIRED[0], 64, 96)
    x = torch.zeros((2, 96)).bfloat16()
    for rows, added in ((x[:, :64], None), (x, x[:, :64].repeat(2, 1)), (x, x)):
        with pytest.raises(InvalidRequestError, match=r"makes \[..., 64\] of \[..., 96\]"):
            multiply(rows, added)
    for rows, added in ((x.float(), None), (x.half(), None), (x, torch.zeros(2, 64))):
        with pytest.raises(InvalidRequestError, match=r"takes torch\.bfloat16"):
            multiply(rows, added)


def test_pair_product_fits_only_bfloat16_of_whole_tiles() -> None:
    library = library_of(RUNNABLE[0])
    assert not PairProduct.fits(torch.zeros(64, 64), library)
    assert not PairProduct.fits(torch.zeros(64, 40, dtype=torch.bfloat16), library)
    if "portable" in RUNNABLE:
        assert not PairProduct.fits(torch.zeros(64, 64, dtype=torch.bfloat16), library_of("portable"))
