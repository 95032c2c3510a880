"""Products with weights of eight bits, of every build that runs here, against the same in float64 and against what they may not touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagedkv.attention.native.library import BUILDS, load_library
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.native.products import Int8Product

RUNNABLE = [build.name for build in BUILDS if load_library(build.name).library is not None]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # of the largest result
SHAPES = ((1, 1), (3, 7), (16, 64), (65, 33), (200, 576))  # outputs, inputs: within a panel, at its end, behind it
ROWS = (0, 1, 2, 5, 6, 7, 13)

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native library was built")


def product(build: str, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Int8Product:
    library = load_library(build).library
    assert library is not None
    return Int8Product(weight, scale, bias, library)


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
