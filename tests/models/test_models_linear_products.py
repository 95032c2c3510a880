"""Products with repacked weights: the numbers of ``F.linear``, parts handed out once and to whom they belong, changes seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagedkv.attention.native.library import load_library
from pagedkv.models.linear_products import PackedProduct, product_dtype, why_not_packable

WIDTH = 48
pytestmark = pytest.mark.skipif(why_not_packable(torch.float32) is not None, reason=str(why_not_packable(torch.float32)))


def make_linears(*heights: int, bias: tuple[bool, ...] = (), seed: int = 0) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    linears = [nn.Linear(WIDTH, height, bias=place < len(bias) and bias[place]) for place, height in enumerate(heights)]
    with torch.no_grad():
        for linear in linears:
            for parameter in linear.parameters():
                parameter.normal_(generator=generator)
    return linears


def make_input(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_is(got: Tensor | None, linear: nn.Linear, x: Tensor) -> None:
    assert got is not None
    want = F.linear(x, linear.weight, linear.bias)
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("heights", [(16,), (1,), (40, 8, 8), (3, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (1, 300), (3, 4, 7), (6,), (1, 0), ()])
def test_product_of_any_shape_is_that_of_each_linear(heights: tuple[int, ...], shape: tuple[int, ...]) -> None:
    linears = make_linears(*heights)
    product = PackedProduct(linears)
    x = make_input(*shape)
    for place, linear in enumerate(linears):
        assert_is(product.result(x, place), linear, x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_with_something_to_add_is_both_products_and_the_sum(dtype: torch.dtype) -> None:
    linears = [linear.to(dtype) for linear in make_linears(24, 8, bias=(True, False))]
    product = PackedProduct(linears)
    if product.reason is not None:
        pytest.skip(product.reason)
    for rows in (1, 5, 40):
        x, added = make_input(rows).to(dtype), make_input(rows, seed=2)[:, :32].to(dtype)
        before, plain = added.clone(), torch.cat([linear(x).float() for linear in linears], -1) + added.float()
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((product.whole(x, added).float() - plain).abs().max()) <= bound * float(plain.abs().max())
        assert torch.equal(added, before)  # the residual is read again


def test_input_that_is_not_contiguous_is_multiplied_as_it_is() -> None:
    linears = make_linears(16, 8)
    product = PackedProduct(linears)
    wide = torch.randn(1, 9, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    for x in (wide[..., ::2], wide[..., :WIDTH], make_input(9, 1).transpose(0, 1), make_input(1, 1).expand(1, 4, WIDTH)):
        for place, linear in enumerate(linears):
            assert_is(product.result(x, place), linear, x)


@torch.no_grad()
@pytest.mark.parametrize("bias", [(True,), (True, True), (False, True), (True, False)])
def test_biases_are_added_where_there_are_any(bias: tuple[bool, ...]) -> None:
    linears = make_linears(*[16, 24][: len(bias)], bias=bias)
    product = PackedProduct(linears)
    x = make_input(1, 3)
    for place, linear in enumerate(linears):
        assert_is(product.result(x, place), linear, x)
    assert product.nbytes == 4 * (WIDTH + 1) * sum(linear.out_features for linear in linears)


@torch.no_grad()
def test_siblings_with_one_input_share_one_result() -> None:
    product = PackedProduct(make_linears(16, 24, 8))
    x = make_input(1, 3)
    parts = [product.result(x, place) for place in (0, 1, 2)]
    assert len({part.untyped_storage().data_ptr() for part in parts if part is not None}) == 1
    again = product.result(x, 0)
    assert again is not None
    assert parts[0] is not None
    assert again.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()


@torch.no_grad()
def test_sibling_called_with_an_equal_but_other_tensor_computes_its_own() -> None:
    linears = make_linears(16, 24)
    product = PackedProduct(linears)
    x, other = make_input(1, 3), make_input(1, 3, seed=2)
    assert_is(product.result(x, 0), linears[0], x)
    assert_is(product.result(other, 1), linears[1], other)
    assert_is(product.result(x, 1), linears[1], x)


@torch.no_grad()
def test_sibling_called_after_the_input_was_changed_in_place_computes_anew() -> None:
    linears = make_linears(16, 24)
    product = PackedProduct(linears)
    x = make_input(1, 3)
    product.result(x, 0)
    x.mul_(-2)
    assert_is(product.result(x, 1), linears[1], x)


@torch.no_grad()
def test_part_changed_in_place_by_its_receiver_changes_no_other() -> None:
    linears = make_linears(16, 24, 8)
    product = PackedProduct(linears)
    x = make_input(1, 3)
    first = product.result(x, 1)
    assert first is not None
    first.fill_(float("nan"))
    for place in (1, 0, 2, 2):
        assert_is(product.result(x, place), linears[place], x)


@torch.no_grad()
def test_result_that_was_kept_is_forgotten_on_demand() -> None:
    linears = make_linears(16, 24)
    product = PackedProduct(linears)
    x = make_input(1, 3)
    product.result(x, 0)
    product.forget()
    with torch.no_grad():
        linears[1].weight.mul_(3)
    assert_is(product.result(x, 1), linears[1], x)


def test_inputs_of_inference_mode_are_multiplied() -> None:
    linears = make_linears(16, 24)
    product = PackedProduct(linears)
    with torch.inference_mode():
        x = make_input(1, 3)
        for place, linear in enumerate(linears):
            assert_is(product.result(x, place), linear, x)


def in_place(linear: nn.Linear) -> None:
    linear.weight[3:].mul_(2)


def one_number(linear: nn.Linear) -> None:
    linear.weight[0, 0] += 5


def another_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight * 2)


def another_storage(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight * 2


def adapter_merged_through_data(linear: nn.Linear) -> None:
    linear.weight.data += 0.01 * make_input(linear.out_features, seed=7)


def loaded(linear: nn.Linear) -> None:
    linear.load_state_dict({name: value * 2 for name, value in linear.state_dict().items()})


def loaded_by_assignment(linear: nn.Linear) -> None:
    linear.load_state_dict({name: value * 2 for name, value in linear.state_dict().items()}, assign=True)


def bias_in_place(linear: nn.Linear) -> None:
    if linear.bias is not None:
        linear.bias.add_(1)


def bias_replaced(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


def bias_removed(linear: nn.Linear) -> None:
    linear.bias = None


CHANGES: list[Callable[[nn.Linear], None]] = [
    in_place,
    one_number,
    another_parameter,
    another_storage,
    adapter_merged_through_data,
    loaded,
    loaded_by_assignment,
    bias_in_place,
    bias_replaced,
    bias_removed,
]


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("heights", [(16, 24), (16,)])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_are_used_by_the_next_product(
    change: Callable[[nn.Linear], None], heights: tuple[int, ...], changed: int, bias: bool
) -> None:
    linears = make_linears(*heights, bias=(bias,) * len(heights))
    product = PackedProduct(linears)
    x = make_input(1, 3)
    product.result(x, 0)
    change(linears[changed % len(linears)])
    product.forget()
    for place, linear in enumerate(linears):
        assert_is(product.result(x, place), linear, x)
    assert product.reason is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_weights_changed_into_what_cannot_be_packed_leave_the_linear_to_itself(dtype: torch.dtype) -> None:
    linears = make_linears(16, 24)
    product = PackedProduct(linears)
    linears[1].weight.requires_grad_(False)
    linears[1].weight.data = linears[1].weight.to(dtype)
    assert product.result(make_input(1, 3), 0) is None
    assert str(dtype) in str(product.reason)
    assert product.nbytes == 0


@torch.no_grad()
def test_weights_with_nan_or_of_unequal_dtype_are_refused_with_the_reason() -> None:
    (broken,) = make_linears(16)
    broken.weight[2, 3] = float("nan")
    assert "differs from F.linear" in str(PackedProduct([broken]).reason)
    mixed = make_linears(16, 24)
    mixed[1].to(torch.bfloat16)
    assert PackedProduct(mixed).reason is not None


def test_weights_of_inference_mode_are_refused_because_changes_could_not_be_seen() -> None:
    with torch.inference_mode():
        linears = make_linears(16)
    assert "inference mode" in str(PackedProduct(linears).reason)


def test_dtype_that_onednn_does_not_know_is_not_packable() -> None:
    assert "float64" in str(why_not_packable(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_packed_right_or_refused_with_a_reason(dtype: torch.dtype) -> None:
    linears = make_linears(16, 24)
    for linear in linears:
        linear.to(dtype)
    product = PackedProduct(linears)
    assert (product.reason is None) == (why_not_packable(dtype) is None)
    if product.reason is None:
        x = make_input(1, 5).to(dtype)
        for place, linear in enumerate(linears):
            got = product.result(x, place)
            assert got is not None
            assert torch.allclose(got.float(), F.linear(x, linear.weight).float(), rtol=3e-2, atol=3e-1)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from its own context manager
def test_onednn_switched_off_is_a_reason() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert "switched off" in str(why_not_packable(torch.float32))


def test_probing_draws_no_number_of_the_global_generator() -> None:
    before = torch.get_rng_state()
    why_not_packable(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_half_precision_is_the_float32_product_rounded_where_the_processor_has_no_half_instructions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    linears = [torch.nn.Linear(24, size, dtype=dtype) for size in (8, 16)]
    product = PackedProduct(linears)
    assert product.reason is None, product.reason
    x = torch.randn(1, 5, 24, generator=generator).to(dtype)
    with torch.no_grad():
        for place, linear in enumerate(linears):
            bias = None if linear.bias is None else linear.bias.float()
            exact = torch.nn.functional.linear(x.float(), linear.weight.float(), bias)
            ours = product.result(x, place)
            assert ours is not None
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    assert product.nbytes == 24 * 25 * product_dtype(dtype).itemsize


def test_weights_of_another_kind_are_packed_for_who_multiplies_that_kind() -> None:
    library = load_library().library
    linear = nn.Linear(64, 32, bias=False).bfloat16()
    product = PackedProduct([linear], library)
    for weight in (torch.randn(32, 64), torch.randn(32, 40).bfloat16(), torch.randn(48, 96).bfloat16()):
        linear.weight = nn.Parameter(weight)
        linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
        assert product.usable(), product.reason
        x = torch.randn(5, weight.shape[1]).to(weight.dtype)
        with torch.no_grad():
            torch.testing.assert_close(product.whole(x).float(), linear(x).float(), rtol=2e-2, atol=0.1)
