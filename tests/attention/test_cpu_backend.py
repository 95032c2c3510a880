"""The native kernel: every build that runs here against dense attention; what a result may not depend on; libraries that are no good."""

from __future__ import annotations

import _ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagedkv.attention import AttendOptions, AttentionSpec, Mask, get_backend
from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native import library
from pagedkv.attention.native.library import BUILDS, load_library
from pagedkv.attention.native.operations import DTYPES, Operations
from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedBackendError
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec
from pagedkv.testing.attention_cases import Case, Geometry, Variant, dense_attention, make_case, random_lengths
from pagedkv.testing.plans import make_plan

RUNNABLE = [build.name for build in BUILDS if load_library(build.name).library is not None]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TABLES = [[3, 1, 7, 9], [2, 5, 12, 4]]
CASES_PER_BUILD = 520
CASES_PER_TEST = 40
CASES_BY_DEFAULT = 80  # the others are marked slow

pytestmark = pytest.mark.skipif(not RUNNABLE, reason=f"no build of the kernel runs here: {load_library().reasons}")


def draw(generator: torch.Generator, *choices: object) -> object:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def random_case(generator: torch.Generator) -> tuple[Case, AttendOptions, str]:
    """A step of any geometry and variant that the kernel claims to run."""
    group = draw(generator, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32)
    dims = draw(generator, 8, 16, 20, 24, 33, 64, 72, 80, 96, 112, 128, 192, 256)
    value_dim = draw(generator, dims, dims, dims, 8, 40, 64)
    dtype = draw(generator, torch.float32, torch.float32, torch.bfloat16, torch.float16)
    heads = draw(generator, 1, 2, 3)
    geometry = Geometry(heads, group, dims, value_dim, draw(generator, 1, 3, 4, 16, 32, 256), dtype)  # type: ignore[arg-type]
    size = draw(generator, 1, 5, 17, 64, 300)
    mask = draw(generator, Mask.causal(), Mask.causal(), Mask.sliding(size), Mask.chunked(size))  # type: ignore[arg-type]
    variant = Variant(
        mask,  # type: ignore[arg-type]
        softcap=draw(generator, None, None, 3.0, 50.0),  # type: ignore[arg-type]
        sinks=bool(draw(generator, False, False, True)),
        alibi=bool(draw(generator, False, False, True)),
        scale=draw(generator, None, None, 0.3 if int(dims) <= 64 else None),  # type: ignore[arg-type, call-overload]
    )
    # Wide layers get short sequences: it is the dense attention that takes the time.
    longest = min(int(draw(generator, 20, 70, 280, 600)), 20 + 600_000 // (int(heads) * int(group) * int(dims)))  # type: ignore[call-overload]
    query_lens, seq_lens = random_lengths(
        generator,
        decodes=int(draw(generator, 0, 1, 4, 9)),
        chunks=int(draw(generator, 1, 2)),
        longest=longest,  # type: ignore[call-overload]
    )
    drop = variant.mask if draw(generator, False, True) else None
    case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator, drop_behind=drop)
    options = variant.options(geometry, generator, torch.device("cpu"))
    return case, options, f"{geometry}, {variant}, {query_lens} of {seq_lens}"


@pytest.mark.parametrize("build", RUNNABLE)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.slow] if first >= CASES_BY_DEFAULT else [])
        for first in range(0, CASES_PER_BUILD, CASES_PER_TEST)
    ],
)
def test_attend_random_steps_match_dense_attention(build: str, first: int) -> None:
    backend = CpuBackend(build=build)
    for seed in range(first, first + CASES_PER_TEST):
        case, options, said = random_case(torch.Generator().manual_seed(seed))
        actual, expected = case.attend(backend, options), dense_attention(case, options)
        tolerance = TOLERANCE[case.geometry.dtype]
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, s=seed, w=said: f"seed {s}, {build}, {w}\n{text}"
        )


@pytest.mark.parametrize("build", RUNNABLE)
@pytest.mark.parametrize("group", [1, 16, pytest.param(128, marks=pytest.mark.slow)])
def test_attend_latent_heads_of_unequal_width_match_dense_attention(build: str, group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    geometry = Geometry(num_kv_heads=1, group=group, key_dim=576, value_dim=512, block_size=16)
    case = make_case(geometry, [1, 1, 40], seq_lens=[9, 2100, 70], generator=generator)
    options = AttendOptions(Mask.causal(), 576**-0.5)
    torch.testing.assert_close(case.attend(CpuBackend(build=build), options).double(), dense_attention(case, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", RUNNABLE)
@pytest.mark.parametrize("scale", [0.2, 2.0])  # all parts of a sequence weigh much; some one does
def test_attend_decodes_of_many_parts_match_dense_attention(build: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(9)
    case = make_case(Geometry(2, 2, 32, 40, 16, torch.float32), [1, 1, 1], seq_lens=[4_097, 8_500, 70], generator=generator)
    options = AttendOptions(Mask.causal(), scale)
    torch.testing.assert_close(case.attend(CpuBackend(build=build), options).double(), dense_attention(case, options), rtol=1e-5, atol=1e-5)


LONG_CHUNKS = [
    # query lengths, sequence lengths, mask, widths of K and V: more rows than an item has, more positions than are packed at once
    pytest.param([300, 1], [1300, 1100], Mask.causal(), 64, 64, id="causal"),
    pytest.param([270], [1000], Mask.sliding(600), 72, 40, id="sliding", marks=pytest.mark.slow),
    pytest.param([400], [1100], Mask.chunked(520), 128, 128, id="chunked", marks=pytest.mark.slow),
    pytest.param([40, 3], [700, 530], Mask.sliding(30), 256, 256, id="wide", marks=pytest.mark.slow),
    pytest.param([30], [300], Mask.causal(), 576, 512, id="latent", marks=pytest.mark.slow),
    pytest.param([2200], [2200], Mask.causal(), 33, 8, id="long", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("build", RUNNABLE)
@pytest.mark.parametrize(("query_lens", "seq_lens", "mask", "key_dim", "value_dim"), LONG_CHUNKS)
@pytest.mark.parametrize("variant", ["plain", pytest.param("bent", marks=pytest.mark.slow)])
def test_attend_long_chunks_in_bfloat16_match_dense_attention(
    build: str, query_lens: list[int], seq_lens: list[int], mask: Mask, key_dim: int, value_dim: int, variant: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    geometry = Geometry(1, 3, key_dim, value_dim, 16, torch.bfloat16)
    case = make_case(geometry, query_lens, seq_lens=seq_lens, generator=generator, drop_behind=mask)
    options = Variant(mask, softcap=5.0 if variant == "bent" else None, alibi=variant == "bent", sinks=True).options(
        geometry, generator, torch.device("cpu")
    )
    # Weighted sums over hundreds of positions are small: to what they are rounded is, too.
    torch.testing.assert_close(case.attend(CpuBackend(build=build), options).double(), dense_attention(case, options), rtol=1e-2, atol=3e-3)


# Heads, group, widths of K and V: one item reads one of these heads, several or all, by the size of a block and of the group.
MANY_HEADS = [(11, 3, 40, 72), (11, 3, 64, 96), (3, 8, 96, 32), (17, 1, 32, 64), (2, 9, 32, 32)]


@pytest.mark.parametrize("block_size", [pytest.param(1, marks=pytest.mark.slow), 11, 16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MANY_HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_decodes_of_many_heads_match_dense_attention(
    build: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], block_size: int
) -> None:
    generator = torch.Generator().manual_seed(block_size)
    geometry = Geometry(*sizes, block_size, dtype)
    case = make_case(geometry, [1, 1, 1], seq_lens=[1100, 33, 1], generator=generator)
    options = Variant(Mask.sliding(900), sinks=True, alibi=True).options(geometry, generator, torch.device("cpu"))
    tolerance = TOLERANCE[dtype] / 3
    actual = case.attend(CpuBackend(build=build, num_threads=2), options).double()
    torch.testing.assert_close(actual, dense_attention(case, options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_decodes_in_bfloat16_round_nothing_but_the_result(build: str) -> None:
    generator = torch.Generator().manual_seed(6)
    case = make_case(Geometry(3, 4, 64, 64, 16, torch.bfloat16), [1, 1], seq_lens=[700, 90], generator=generator)
    options = AttendOptions(Mask.causal(), 0.125)
    actual = case.attend(CpuBackend(build=build), options).double()
    torch.testing.assert_close(actual, dense_attention(case, options), rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_negative_scale_turns_the_order_of_scores(build: str) -> None:
    generator = torch.Generator().manual_seed(3)
    case = make_case(Geometry(1, 2, 32, 32, 16, torch.bfloat16), [40, 1], seq_lens=[90, 70], generator=generator)
    options = AttendOptions(Mask.causal(), -2.0)
    torch.testing.assert_close(case.attend(CpuBackend(build=build), options).double(), dense_attention(case, options), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_huge_score_weighs_one(build: str, dtype: torch.dtype, num_tokens: int) -> None:
    if build == "amx" and num_tokens > 1 and dtype is torch.bfloat16:
        pytest.skip("its exponents are rounded before they are compared: a logit beyond 2^31 gives NaN, which the sampler refuses")
    case = make_case(Geometry(1, 3, 64, 64, 16, dtype), [num_tokens], seq_lens=[num_tokens], generator=torch.Generator().manual_seed(5))
    case.query.fill_(6e4)
    case.key.fill_(1)
    case.key[0] = 6e4  # a logit of 3e10: what is rounded of it is more than what exp2 takes
    actual = case.attend(CpuBackend(build=build), AttendOptions(Mask.causal(), 0.125))
    torch.testing.assert_close(actual, case.value[:1].expand(num_tokens, 3, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_scores_of_minus_infinity_weigh_nothing(build: str, dtype: torch.dtype) -> None:
    case = make_case(Geometry(1, 3, 64, 64, 16, dtype), [40], seq_lens=[40], generator=torch.Generator().manual_seed(5))
    case.query.fill_(1)
    case.key.fill_(0)
    case.key[0, 0, 0] = -torch.inf
    actual = case.attend(CpuBackend(build=build), AttendOptions(Mask.causal(), 0.125))
    assert actual[0].isnan().all()  # it sees nothing else
    torch.testing.assert_close(actual[1], case.value[1].expand(3, 64))


# Scores that rise from position to position, or by far from one to the next: what was summed up before them is as good as nothing.
RISING = [pytest.param(4.0, 0.0, id="apart"), pytest.param(0.125, 0.6, id="steadily"), pytest.param(0.125, 0.02, id="slowly")]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("scale", "rise"), RISING)
@pytest.mark.parametrize(("width", "group"), [(64, 3), (96, 17), (128, 1)])
@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_rising_scores_in_bfloat16_match_dense_attention(
    build: str, width: int, group: int, scale: float, rise: float, batch_invariant: bool
) -> None:
    generator = torch.Generator().manual_seed(9)
    lengths = [330, 90]
    case = make_case(Geometry(2, group, width, width, 16, torch.bfloat16), lengths, seq_lens=lengths, generator=generator)
    case.query[..., 0] = 1
    for new, (key, _) in zip(case.key.split(lengths), case.dense, strict=True):
        new[..., 0] = key[..., 0] = (torch.arange(len(key)) * rise / scale)[:, None]
    options, backend = AttendOptions(Mask.causal(), scale), CpuBackend(build=build, batch_invariant=batch_invariant)
    torch.testing.assert_close(case.attend(backend, options).double(), dense_attention(case, options), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_more_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    geometry = Geometry(3, 3, 64, 64, 16, dtype)
    case = make_case(geometry, [1, 1, 1, 1, 90, 200], seq_lens=[3000, 700, 40, 1, 90, 900], generator=generator)
    options = AttendOptions(Mask.causal(), 0.125)
    expected = case.attend(CpuBackend(num_threads=1), options)
    for threads in (2, 3, 16):  # more than there are cores, too
        assert torch.equal(case.attend(CpuBackend(num_threads=threads), options), expected), f"{threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_beside_other_sequences_gives_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    query_lens, seq_lens = [1, 1, 70, 1], [1500, 300, 400, 20]
    case = make_case(Geometry(2, 3, 64, 64, 16, dtype), query_lens, seq_lens=seq_lens, generator=generator)
    options = AttendOptions(Mask.sliding(900), 0.125)
    together = case.attend(backend := CpuBackend(), options)
    for seq, start in enumerate(case.batch.plan.cu_seqlens_q[:-1].tolist()):
        tokens = slice(start, start + query_lens[seq])
        tables = case.batch.plan.block_tables[:, seq : seq + 1]
        batch = BatchBuilder("cpu", 16).build(
            make_plan(query_lens[seq : seq + 1], seq_lens[seq : seq + 1], block_tables=tables[0], block_size=16)
        )
        alone = backend.attend(case.query[tokens], case.storage.layers[0], backend.plan(batch), options)
        assert torch.equal(alone, together[tokens]), f"sequence {seq}"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_attend_layers_of_two_dtypes_share_one_step(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    backend, options = CpuBackend(), AttendOptions(Mask.causal(), 0.25)
    # More rows than one item has in float32, fewer than one has in bfloat16.
    cases = [make_case(Geometry(dtype=dtype), [1, 150], seq_lens=[30, 150], generator=torch.Generator().manual_seed(3)) for dtype in dtypes]
    step = backend.plan(cases[0].batch)  # the same seed: the tables of both are the same
    for case in cases:
        pool = case.storage.layers[0]
        backend.write(pool, case.key, case.value, step)
        tolerance = TOLERANCE[case.geometry.dtype]
        actual = backend.attend(case.query, pool, step, options)
        torch.testing.assert_close(actual.double(), dense_attention(case, options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", RUNNABLE)
@pytest.mark.parametrize(
    ("mask", "scale"),
    [(Mask.causal(), 0.125), (Mask.sliding(150), 0.125), (Mask.chunked(100), 0.125), (Mask.causal(), 4.0)],
    ids=str,
)
def test_attend_batch_invariant_does_not_depend_on_how_a_prompt_is_cut(mask: Mask, scale: float, build: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    length, geometry = 333, Geometry(2, 3, 64, 64, 16, dtype)
    case = make_case(geometry, [length], seq_lens=[length], generator=generator)
    options, backend = AttendOptions(mask, scale), CpuBackend(build=build, batch_invariant=True)
    whole = case.attend(backend, options)
    tables = case.batch.plan.block_tables[0]
    for cut in (1, 7, 16, 100, 128):
        for low in range(0, length, cut) if cut > 1 else range(length - 20, length):
            high = min(low + cut, length)
            batch = BatchBuilder("cpu", 16).build(make_plan([high - low], [high], block_tables=tables, block_size=16))
            part = backend.attend(case.query[low:high], case.storage.layers[0], backend.plan(batch), options)
            assert torch.equal(part, whole[low:high]), f"cut {cut}, positions {low} to {high}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.sliding(21)], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_attend_poison_in_slots_that_nobody_sees_changes_no_bit(poison: float, mask: Mask, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    query_lens, seq_lens = random_lengths(generator, decodes=6, chunks=3, longest=100)
    case = make_case(Geometry(2, 3, 32, 32, 16, dtype), query_lens, seq_lens=seq_lens, generator=generator)
    backend, options = CpuBackend(), AttendOptions(mask, 0.2)
    expected = case.attend(backend, options)
    pool = case.storage.layers[0]
    used = torch.zeros(pool.num_blocks * 16, dtype=torch.bool)
    for row, (queries, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        positions = torch.arange(mask.first_visible(length - queries), length)
        used[torch.from_numpy(case.batch.plan.block_tables[0, row]).long()[positions // 16] * 16 + positions % 16] = True
    for block, offset in (~used).nonzero().squeeze(1).unsqueeze(1).expand(-1, 2).tolist():
        pool.key[block // 16, :, offset % 16] = poison
        pool.value[block // 16, :, offset % 16] = poison
    assert torch.equal(case.attend(backend, options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_strided_rows_stores_what_the_pool_itself_would(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    storages = [KVStorage([LayerSpec(2, 8, 12)], num_blocks=9, block_size=4, dtype=dtype, device="cpu") for _ in range(2)]
    batch = BatchBuilder("cpu", 4).build(make_plan([5, 1], [5, 9], block_tables=torch.tensor([[3, 5, 0], [8, 1, 2]]).numpy(), block_size=4))
    key = torch.randn(2, 6, 16, generator=generator).to(dtype).transpose(0, 1)[..., ::2]
    value = torch.randn(2, 6, 12, generator=generator).to(dtype).transpose(0, 1)
    for storage, backend in zip(storages, (CpuBackend(), get_backend("torch", device="cpu")), strict=True):
        backend.write(storage.layers[0], key, value, backend.plan(batch))
    assert torch.equal(storages[0].layers[0].key, storages[1].layers[0].key)
    assert torch.equal(storages[0].layers[0].value, storages[1].layers[0].value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (torch.zeros(1, 2, 16), torch.zeros(2, 2, 16), "do not fit 1 slots"),
        (torch.zeros(1, 2, 15), torch.zeros(1, 2, 16), "do not fit 1 slots"),
        (torch.zeros(1, 2, 16, dtype=torch.float16), torch.zeros(1, 2, 16), "the pool stores"),
        (torch.zeros(1, 2, 16, requires_grad=True), torch.zeros(1, 2, 16), "gradient"),
    ],
)
def test_write_wrong_input_is_refused_by_name(key: torch.Tensor, value: torch.Tensor, words: str) -> None:
    case = make_case(Geometry(), [1], seq_lens=[5], generator=torch.Generator().manual_seed(0))
    backend = CpuBackend()
    with pytest.raises(InvalidRequestError, match=words):
        backend.write(case.storage.layers[0], key, value, backend.plan(case.batch))


def test_attend_float64_pool_is_refused_by_name() -> None:
    case = make_case(Geometry(dtype=torch.float64), [1], seq_lens=[5], generator=torch.Generator().manual_seed(0))
    backend = CpuBackend()
    with pytest.raises(InvalidRequestError, match="float64"):
        backend.attend(case.query, case.storage.layers[0], backend.plan(case.batch), AttendOptions(Mask.causal(), 0.25))


def test_attend_step_of_another_backend_is_refused() -> None:
    case = make_case(Geometry(), [1], seq_lens=[5], generator=torch.Generator().manual_seed(0))
    step = get_backend("reference", device="cpu").plan(case.batch)
    with pytest.raises(InvalidRequestError, match="another backend"):
        CpuBackend().attend(case.query, case.storage.layers[0], step, AttendOptions(Mask.causal(), 0.25))


def test_get_backend_auto_passes_over_the_kernel_for_what_it_does_not_know() -> None:
    spec = AttentionSpec(4, 2, 8, 8, block_size=4, dtype=torch.float64, device_type="cpu", mask=Mask.causal())
    assert get_backend("auto", device="cpu", specs=[spec]).name == "torch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"device_type": "cuda"}, "runs on the CPU"),
        ({"key_dim": 2048}, "1024"),
        ({"num_heads": 5}, "multiple"),
    ],
)
def test_supports_what_it_cannot_run_says_why(change: dict[str, object], words: str) -> None:
    fields: dict[str, object] = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "block_size": 4}
    fields |= {"dtype": torch.float32, "device_type": "cpu", "mask": Mask.causal(), **change}
    assert words in (CpuBackend().supports(AttentionSpec(**fields)) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", RUNNABLE)
def test_attend_joined_is_rotation_write_and_attend_to_the_bit(build: str, dtype: torch.dtype) -> None:
    library_of_build = load_library(build).library
    assert library_of_build is not None
    operations, generator = Operations(library_of_build), torch.Generator().manual_seed(7)
    options = AttendOptions(Mask.sliding(9), 0.2, softcap=3.0)
    for heads, kv_heads, width in ((4, 2, 16), (9, 3, 64), (2, 2, 40)):
        storages = [
            KVStorage([LayerSpec(kv_heads, width, width)] * 2, num_blocks=20, block_size=4, dtype=dtype, device="cpu") for _ in "ab"
        ]
        backends = [CpuBackend(build=build) for _ in "ab"]
        for query_lens, seq_lens in (([5, 11], [5, 11]), ([1, 3], [6, 14])):
            batches = [BatchBuilder("cpu", 4).build(make_plan(query_lens, seq_lens, block_tables=TABLES, block_size=4)) for _ in "ab"]
            cosines, sines = (torch.randn(sum(query_lens), width, generator=generator).to(dtype) for _ in "ab")
            steps = [backend.plan(batch) for backend, batch in zip(backends, batches, strict=True)]
            for layer in range(2):
                rows = torch.randn(sum(query_lens), (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
                parts = rows.clone().view(len(rows), -1, width)
                joined = backends[0].attend_joined(rows, cosines, sines, storages[0].layers[layer], steps[0], options, num_heads=heads)
                operations.rotate_in_place(parts[:, : heads + kv_heads].transpose(0, 1), cosines, sines)
                query, key, value = parts.split([heads, kv_heads, kv_heads], 1)
                backends[1].write(storages[1].layers[layer], key, value, steps[1])
                apart = backends[1].attend(query, storages[1].layers[layer], steps[1], options)
                assert torch.equal(joined, apart.flatten(1))
                assert torch.equal(storages[0].layers[layer].key, storages[1].layers[layer].key)
                assert torch.equal(storages[0].layers[layer].value, storages[1].layers[layer].value)


def test_attend_joined_what_does_not_fit_is_refused_and_nothing_stored() -> None:
    backend, batch = CpuBackend(), BatchBuilder("cpu", 4).build(make_plan([3], [3], block_tables=[[2]], block_size=4))
    step, options, turns = backend.plan(batch), AttendOptions(Mask.causal(), 1.0), torch.ones(3, 16)

    def attend(rows: torch.Tensor, spec: LayerSpec, step: object = step) -> None:
        pool = KVStorage([spec], num_blocks=4, block_size=4, dtype=torch.float32, device="cpu").layers[0]
        try:
            backend.attend_joined(rows, turns, turns, pool, step, options, num_heads=4)  # type: ignore[arg-type]
        finally:
            assert not pool.key.any()

    right = LayerSpec(2, 16, 16)
    attend_right = torch.ones(3, 128)
    with pytest.raises(AssertionError):
        attend(attend_right, right)
    for rows in (torch.ones(2, 128), torch.ones(3, 127), torch.ones(3, 128).bfloat16(), torch.ones(128, 3).T):
        with pytest.raises(InvalidRequestError, match="is needed"):
            attend(rows, right)
    with pytest.raises(InvalidRequestError, match="16 and 8 wide"):
        attend(attend_right, LayerSpec(2, 16, 8))
    with pytest.raises(InvalidRequestError, match="planned by another backend"):
        attend(attend_right, right, get_backend("reference", device="cpu").plan(batch))


def test_backend_no_thread_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_threads is 0"):
        CpuBackend(num_threads=0)


def test_load_library_corrupt_missing_or_foreign_says_why_and_auto_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert all("was not built" in reason or "lacks" in reason or "not for" in reason for reason in load_library().reasons)
    for build in BUILDS:
        build.path.write_bytes(b"no library")
    loaded = load_library()
    assert loaded.library is None
    assert any("cannot be loaded" in reason for reason in loaded.reasons)
    with pytest.raises(UnsupportedBackendError, match="portable: cannot be loaded"):
        CpuBackend()
    assert get_backend("auto", device="cpu").name == "torch"
    (tmp_path / "libpagedkv_portable.so").unlink()
    shutil.copy(_ctypes.__file__, tmp_path / "libpagedkv_portable.so")  # a library, but not ours
    assert "reinstall" in load_library("portable").reasons[0]


def test_load_library_processor_without_the_instructions_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor_flags", lambda: frozenset({"sse2"}))
    loaded = load_library()
    assert loaded.library is None or loaded.library.build.name == "portable"
    assert any("lacks" in reason for reason in loaded.reasons)


def test_load_library_permission_refused_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = replace(BUILDS[[build.name for build in BUILDS].index(RUNNABLE[0])], permission="pagedkv_lanes")  # is never 0
    monkeypatch.setattr(library, "BUILDS", (refused, *(build for build in BUILDS if build.name in RUNNABLE[1:])))
    loaded = load_library()
    assert loaded.reasons[0] == f"{RUNNABLE[0]}: the system does not let this process use its instructions"
    assert (None if loaded.library is None else loaded.library.build.name) == (RUNNABLE[1] if len(RUNNABLE) > 1 else None)


def test_load_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_ABI", library._ABI + 1)
    assert "another version" in load_library(RUNNABLE[0]).reasons[0]


def test_load_library_unknown_build_lists_those_there_are() -> None:
    assert "avx2" in load_library("mmx").reasons[0]


@pytest.mark.slow
def test_attend_pool_beyond_int32_elements_reads_the_right_block() -> None:
    """4.3 GB of zeros, of which the system hands out only the pages that are touched."""
    num_blocks = 2**31 // (2 * 8 * 16 * 128) + 16
    storage = KVStorage([LayerSpec(8, 128, 128)], num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16, device="cpu")
    tables = torch.tensor([[num_blocks - 1, num_blocks - 2, 1]]).numpy()
    backend, oracle = CpuBackend(), get_backend("reference", device="cpu")
    batch = BatchBuilder("cpu", 16).build(make_plan([40], [40], block_tables=tables, block_size=16))
    generator = torch.Generator().manual_seed(1)
    pool, options = storage.layers[0], AttendOptions(Mask.causal(), 0.1)
    key, value, query = (torch.randn(40, heads, 128, generator=generator).bfloat16() for heads in (8, 8, 16))
    backend.write(pool, key, value, backend.plan(batch))
    actual = backend.attend(query, pool, backend.plan(batch), options)
    torch.testing.assert_close(actual, oracle.attend(query, pool, oracle.plan(batch), options), rtol=3e-2, atol=3e-2)
