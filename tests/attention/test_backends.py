from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from pagedkv.attention import AttendOptions, AttentionBackend, AttentionSpec, Mask, get_backend
from pagedkv.attention.native.library import load_library
from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedBackendError
from pagedkv.plan import StepPlan
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec
from pagedkv.testing.attention_cases import Case, Geometry, Variant, dense_attention, make_case, random_lengths
from pagedkv.testing.plans import make_plan

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKENDS = ["reference", "torch", "cpu"]
VARIANTS = {
    "causal": Variant(),
    "window": Variant(Mask.sliding(5)),
    "window_1": Variant(Mask.sliding(1)),
    "window_wide": Variant(Mask.sliding(1000)),
    "chunked": Variant(Mask.chunked(6)),
    "softcap": Variant(softcap=3.0),
    "sinks": Variant(sinks=True),
    "alibi": Variant(alibi=True),
    "scale": Variant(scale=0.7),
    "window_sinks": Variant(Mask.sliding(9), sinks=True),
    "window_softcap_scale": Variant(Mask.sliding(7), softcap=2.0, scale=0.3),
    "chunked_alibi_sinks": Variant(Mask.chunked(5), alibi=True, sinks=True),
}
GEOMETRIES = [
    Geometry(num_kv_heads=heads, group=group, key_dim=key, value_dim=value, block_size=size)
    for heads, group, key, value, size in [
        (2, 1, 8, 8, 1),
        (1, 4, 16, 16, 4),
        (3, 3, 64, 64, 16),
        (2, 3, 16, 8, 4),
        (1, 1, 24, 80, 16),
        (4, 1, 80, 80, 64),
        (2, 4, 12, 20, 1),
    ]
]


def check(case: Case, backend: AttentionBackend, options: AttendOptions, message: str) -> None:
    expected = dense_attention(case, options)
    actual = case.attend(backend, options)
    tolerance = TOLERANCE[case.geometry.dtype]
    assert actual.dtype == case.geometry.dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}\n{text}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_attend_ragged_step_matches_dense_attention(name: str, variant: str) -> None:
    for seed, geometry in enumerate(GEOMETRIES):
        generator = torch.Generator().manual_seed(seed)
        query_lens, seq_lens = random_lengths(generator, decodes=5, chunks=4, longest=70)
        case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator)
        options = VARIANTS[variant].options(geometry, generator, torch.device("cpu"))
        check(case, get_backend(name, device="cpu"), options, f"seed {seed}, {geometry}, {query_lens} of {seq_lens}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_attend_other_dtype_matches_dense_attention(name: str, dtype: torch.dtype) -> None:
    if name == "cpu" and dtype == torch.float64:
        pytest.skip("the kernel has no float64, as its supports() says")
    for seed, variant in enumerate(("causal", "window_sinks", "chunked_alibi_sinks", "softcap")):
        generator = torch.Generator().manual_seed(seed)
        for geometry in (Geometry(3, 3, 64, 64, 16, dtype), Geometry(2, 2, 16, 24, 4, dtype)):
            query_lens, seq_lens = random_lengths(generator, decodes=6, chunks=3, longest=60)
            case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator)
            options = VARIANTS[variant].options(geometry, generator, torch.device("cpu"))
            check(case, get_backend(name, device="cpu"), options, f"seed {seed}, {variant}, {geometry}")


def test_attend_every_length_around_a_block_matches_dense_attention() -> None:
    backend = get_backend("torch", device="cpu")
    for size, seed in product((1, 4, 16), range(2)):
        generator = torch.Generator().manual_seed(seed)
        geometry = Geometry(num_kv_heads=1, group=2, key_dim=8, value_dim=8, block_size=size)
        lengths = list(range(1, 3 * size + 2))
        for query_lens in ([1] * len(lengths), lengths, [max(1, length // 2) for length in lengths]):
            case = make_case(geometry, query_lens, seq_lens=lengths, generator=generator)
            options = VARIANTS["causal"].options(geometry, generator, torch.device("cpu"))
            check(case, backend, options, f"seed {seed}, block size {size}, {query_lens}")


@pytest.mark.parametrize("variant", ["causal", "window", "sinks", "alibi"])
def test_attend_many_ragged_decodes_in_several_buckets_matches_dense_attention(variant: str) -> None:
    seed = 7
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(num_kv_heads=2, group=2, key_dim=64, value_dim=64, block_size=16)
    seq_lens = [*torch.randint(1, 500, (40,), generator=generator).tolist(), 3000, 2999]
    case = make_case(geometry, [1] * len(seq_lens), seq_lens=seq_lens, generator=generator)
    options = VARIANTS[variant].options(geometry, generator, torch.device("cpu"))
    check(case, get_backend("torch", device="cpu"), options, f"seed {seed}, lengths {seq_lens}")


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(Mask.sliding(100)), Variant(Mask.sliding(700)), Variant(Mask.chunked(300)), Variant(Mask.sliding(300), sinks=True)],
    ids=str,
)
def test_attend_long_chunks_in_several_tiles_match_dense_attention(variant: Variant) -> None:
    seed = 11
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(num_kv_heads=1, group=2, key_dim=16, value_dim=16, block_size=16)
    case = make_case(geometry, [1, 600, 601, 2], seq_lens=[900, 600, 1000, 800], generator=generator)
    check(case, get_backend("torch", device="cpu"), variant.options(geometry, generator, torch.device("cpu")), f"seed {seed}")


@pytest.mark.parametrize("mask", [Mask.sliding(5), Mask.sliding(16), Mask.chunked(8)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_attend_blocks_behind_the_window_given_back_reads_none_of_them(name: str, mask: Mask) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        geometry = Geometry(num_kv_heads=2, group=2, block_size=4)
        query_lens, seq_lens = random_lengths(generator, decodes=8, chunks=4, longest=60)
        case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator, drop_behind=mask)
        options = Variant(mask).options(geometry, generator, torch.device("cpu"))
        check(case, get_backend(name, device="cpu"), options, f"seed {seed}, {query_lens} of {seq_lens}")


def test_attend_layers_of_different_geometry_and_mask_share_one_step() -> None:
    seed = 3
    generator = torch.Generator().manual_seed(seed)
    backend = get_backend("torch", device="cpu")
    specs = [LayerSpec(2, 8, 8), LayerSpec(1, 16, 4, group=1), LayerSpec(2, 8, 8)]
    masks = [Mask.causal(), Mask.sliding(6), Mask.chunked(4)]
    storage = KVStorage(specs, num_blocks=(12, 14), block_size=4, dtype=torch.float32, device="cpu")
    oracle = get_backend("reference", device="cpu")
    tables = [[[3, 9, 5], [11, 2, 0]], [[13, 1, 7], [4, 12, 0]]]
    builder = BatchBuilder("cpu", 4)
    for query_lens, seq_lens in (([9, 6], [9, 6]), ([1, 1], [10, 7]), ([1, 1], [11, 8])):
        batch = builder.build(make_plan(query_lens, seq_lens, block_tables=torch.tensor(tables).numpy(), block_size=4))
        step, oracle_step = backend.plan(batch), oracle.plan(batch)
        for pool, mask in zip(storage.layers, masks, strict=True):
            tokens, spec = sum(query_lens), pool.spec
            backend.write(
                pool,
                torch.randn(tokens, spec.num_kv_heads, spec.key_dim, generator=generator),
                torch.randn(tokens, spec.num_kv_heads, spec.value_dim, generator=generator),
                step,
            )
            query = torch.randn(tokens, 4, spec.key_dim, generator=generator)
            options = AttendOptions(mask, 0.5)
            expected = oracle.attend(query, pool, oracle_step, options)
            torch.testing.assert_close(
                backend.attend(query, pool, step, options), expected, rtol=1e-5, atol=1e-6, msg=f"seed {seed}, {mask}"
            )


@pytest.mark.parametrize("name", BACKENDS)
def test_attend_transposed_query_matches_contiguous_query(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    geometry = Geometry()
    case = make_case(geometry, [1, 1, 6], seq_lens=[9, 4, 11], generator=generator)
    backend, options = get_backend(name, device="cpu"), AttendOptions(Mask.causal(), 0.25)
    expected = case.attend(backend, options)
    step = backend.plan(case.batch)
    strided = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(backend.attend(strided, case.storage.layers[0], step, options), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_attend_started_in_inference_mode_works_outside_of_it(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    backend, options = get_backend(name, device="cpu"), AttendOptions(Mask.causal(), 0.25, softcap=5.0)
    with torch.inference_mode():
        case = make_case(Geometry(dtype=torch.bfloat16), [1, 1, 6], seq_lens=[9, 4, 11], generator=generator)
        expected = case.attend(backend, options)
    with torch.no_grad():
        torch.testing.assert_close(backend.attend(case.query, case.storage.layers[0], backend.plan(case.batch), options), expected)


def test_attend_twice_gives_the_same_bits_and_a_fresh_output() -> None:
    generator = torch.Generator().manual_seed(8)
    case = make_case(Geometry(), [1, 1, 5], seq_lens=[40, 3, 20], generator=generator)
    backend, options = get_backend("torch", device="cpu"), AttendOptions(Mask.causal(), 0.25)
    first = case.attend(backend, options)
    kept = first.clone()
    second = case.attend(backend, options)
    assert torch.equal(first, kept)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("query", "sinks", "words"),
    [
        (torch.zeros(2, 6, 16), None, "is needed for this step"),
        (torch.zeros(3, 5, 16), None, "a multiple of 2"),
        (torch.zeros(3, 6, 15), None, "is needed for this step"),
        (torch.zeros(3, 6, 16, dtype=torch.float64), None, "the pool stores"),
        (torch.zeros(3, 6, 16, requires_grad=True), None, "gradient"),
        (torch.zeros(3, 6, 16), torch.zeros(2), "sinks"),
    ],
)
def test_attend_wrong_input_is_refused_by_name(name: str, query: torch.Tensor, sinks: torch.Tensor | None, words: str) -> None:
    case = make_case(Geometry(), [1, 2], seq_lens=[5, 2], generator=torch.Generator().manual_seed(0))
    backend = get_backend(name, device="cpu")
    with pytest.raises(InvalidRequestError, match=words):
        backend.attend(query, case.storage.layers[0], backend.plan(case.batch), AttendOptions(Mask.causal(), 0.25, sinks=sinks))


def test_attend_step_of_another_backend_is_refused() -> None:
    case = make_case(Geometry(), [1], seq_lens=[5], generator=torch.Generator().manual_seed(0))
    step = get_backend("reference", device="cpu").plan(case.batch)
    with pytest.raises(InvalidRequestError, match="another backend"):
        get_backend("torch", device="cpu").attend(case.query, case.storage.layers[0], step, AttendOptions(Mask.causal(), 0.25))


def test_write_pool_of_another_block_size_is_refused() -> None:
    case = make_case(Geometry(block_size=4), [1], seq_lens=[5], generator=torch.Generator().manual_seed(0))
    other = KVStorage([LayerSpec(2, 16, 16)], num_blocks=4, block_size=8, dtype=torch.float32, device="cpu")
    backend = get_backend("torch", device="cpu")
    with pytest.raises(InvalidRequestError, match="blocks of 4 tokens"):
        backend.write(other.layers[0], case.key, case.value, backend.plan(case.batch))


def test_get_backend_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"'flash'.*auto, reference, torch, cpu"):
        get_backend("flash", device="cpu")


def test_get_backend_object_is_returned_as_it_is() -> None:
    backend = get_backend("auto", device="cpu")
    assert get_backend(backend, device="cpu") is backend
    assert isinstance(backend, AttentionBackend)
    assert backend.name == ("cpu" if load_library().library else "torch")
    with pytest.raises(UnsupportedBackendError, match="neither a name"):
        get_backend(3, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
def test_supports_heads_that_cannot_be_grouped_says_why(name: str) -> None:
    backend = get_backend(name, device="cpu")
    spec = {"num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "block_size": 4, "device_type": "cpu", "mask": Mask.causal()}
    assert backend.supports(AttentionSpec(num_heads=4, dtype=torch.float32, **spec)) is None
    assert "multiple of 2" in (backend.supports(AttentionSpec(num_heads=5, dtype=torch.float32, **spec)) or "")
    assert "int8" in (backend.supports(AttentionSpec(num_heads=4, dtype=torch.int8, **spec)) or "")


def test_options_softcap_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="softcap"):
        AttendOptions(Mask.causal(), 1.0, softcap=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_attend_on_cuda_matches_dense_attention(variant: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is visible")
    device = torch.device("cuda")
    for seed, (geometry, dtype) in enumerate(product(GEOMETRIES, (torch.float32, torch.bfloat16))):
        geometry = Geometry(**{**vars(geometry), "dtype": dtype})
        generator = torch.Generator().manual_seed(seed)
        query_lens, seq_lens = random_lengths(generator, decodes=6, chunks=4, longest=90)
        case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator, device=device)
        options = VARIANTS[variant].options(geometry, generator, device)
        for name in BACKENDS:
            check(case, get_backend(name, device=device), options, f"seed {seed}, {name}, {geometry}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mask", [Mask.sliding(5), Mask.sliding(20), Mask.chunked(6), Mask.chunked(32)], ids=str)
def test_attend_does_not_look_at_table_entries_behind_a_window(name: str, mask: Mask) -> None:
    # They are null after a block was given back. Here they name a block of NaN, so that whoever follows one is found out.
    for seed, size in enumerate([1, 4, 16] * 3):
        generator = torch.Generator().manual_seed(seed)
        geometry, variant = Geometry(block_size=size), Variant(mask, sinks=seed % 2 == 0, softcap=3.0 if seed % 4 == 0 else None)
        query_lens, seq_lens = random_lengths(generator, decodes=5, chunks=4, longest=90)
        case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator, drop_behind=mask)
        options = variant.options(geometry, generator, torch.device("cpu"))
        backend = get_backend(name, device="cpu", specs=[variant.spec(geometry, torch.device("cpu"))])
        poisoned = replace(case, batch=BatchBuilder("cpu", size).build(follow_poison(case.batch.plan, size)))
        check(poisoned, backend, options, f"{name}, {mask}, seed {seed}")


def follow_poison(plan: StepPlan, block_size: int) -> StepPlan:
    """The same step, with the lowest block, which belongs to nobody, wherever a sequence's own entry is null."""
    tables = plan.block_tables.copy()
    inside = np.arange(tables.shape[2]) < -(-plan.seq_lens // block_size)[:, None]
    tables[:, plan.rows] = np.where(inside & (tables[:, plan.rows] == 0), 1, tables[:, plan.rows])
    return replace(plan, block_tables=tables)
