"""Norms, gates and rotations of every build that runs here, against the same in float64 and against what they may not touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagedkv.attention.native.library import BUILDS, load_library
from pagedkv.attention.native.operations import DTYPES, Operations, evenly_spaced

RUNNABLE = [build.name for build in BUILDS if load_library(build.name).library is not None]
BOUNDS = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # one or two places of the largest result
WIDTHS = (1, 2, 15, 16, 17, 64, 100, 576)
ROWS = (1, 3, 50)

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no native library was built")


def operations(build: str) -> Operations:
    library = load_library(build).library
    assert library is not None
    return Operations(library)


def assert_close(ours: Tensor, exact: Tensor, what: str, factor: float = 1.0) -> None:
    assert ours.shape == exact.shape
    difference, largest = float((ours.double() - exact).abs().max()), float(exact.abs().max())
    assert difference <= factor * BOUNDS[ours.dtype] * largest, f"{what}: {difference:.2e} where the largest is {largest:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_norm_any_width_is_what_float64_gives(build: str, dtype: torch.dtype) -> None:
    ops, generator = operations(build), torch.Generator().manual_seed(0)
    for width in WIDTHS:
        for rows in ROWS:
            x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, rows, width), (width,)))
            wide, scale = x.double(), weight.double()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3)
            for form, factor in enumerate((scale, scale, scale + 1)):
                assert_close(ops.norm(x, weight, 1e-3, form), normed * factor, f"form {form}, {rows} rows of {width}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_gate_any_width_and_spacing_is_what_float64_gives(build: str, dtype: torch.dtype) -> None:
    ops, generator = operations(build), torch.Generator().manual_seed(1)
    for width in WIDTHS:
        for rows in ROWS:
            both = (3 * torch.randn((1, rows, 2 * width), generator=generator)).to(dtype)
            gate, up = both.split(width, -1)
            assert evenly_spaced(gate)
            functions = (F.silu(gate.double()), F.gelu(gate.double(), approximate="tanh"))
            for form, function in enumerate(functions):
                # 1 + tanh loses places where tanh is near -1, in torch as well; it shows where few numbers make the largest small.
                assert_close(ops.gate(gate, up, form), function * up.double(), f"form {form}, {rows} rows of {width}", factor=4)


@pytest.mark.parametrize("build", RUNNABLE)
def test_gate_extreme_values_are_those_of_torch(build: str) -> None:
    gate = torch.tensor([[-float("inf"), -1e30, -88.8, -0.0, 0.0, 88.8, 1e30, float("inf"), float("nan")]])
    up = torch.ones_like(gate)
    for form, theirs in enumerate((F.silu(gate), F.gelu(gate, approximate="tanh"))):
        torch.testing.assert_close(operations(build).gate(gate, up, form), theirs, equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_rotate_any_strides_is_what_float64_gives(build: str, dtype: torch.dtype) -> None:
    ops, generator = operations(build), torch.Generator().manual_seed(2)
    for width in (2, 6, 34, 64, 96):
        for rows in ROWS:
            x = torch.randn((rows, 5, 2 * width), generator=generator).to(dtype)[..., :width].transpose(0, 1)
            angles = torch.randn((rows, width), generator=generator)
            cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
            turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1).double()
            exact = x.double() * cosines.double() + turned * sines.double()
            assert_close(ops.rotate(x, cosines, sines), exact, f"{rows} rows of {width}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_operations_more_threads_give_the_same_bits(build: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, generator = operations(build), torch.Generator().manual_seed(3)
    x, y = (torch.randn((1, 300, 200), generator=generator).to(dtype) for _ in range(2))

    def results() -> list[Tensor]:
        return [
            ops.norm(x, y[0, 0], 1e-6, 0),
            ops.gate(x, y, 0),
            ops.rotate(x[0].view(300, 10, 20).transpose(0, 1), y[0, :, :20], y[0, :, 20:40]),
        ]

    one = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))


@pytest.mark.parametrize("build", RUNNABLE)
def test_operations_neighbouring_memory_is_neither_read_nor_written(build: str) -> None:
    ops = operations(build)
    both = torch.full((1, 4, 51), float("nan"), dtype=torch.bfloat16)
    both[..., :17], both[..., 34:] = 1.5, 2.0
    before = both.clone()
    assert torch.isfinite(ops.gate(both[..., :17], both[..., 34:], 0)).all()
    assert torch.isfinite(ops.norm(both[..., :17], both[0, 0, 34:], 1e-6, 1)).all()
    assert torch.equal(both.view(torch.int16), before.view(torch.int16))
