"""Decoder layers as one native call, of every build that has it: to the bit what its parts give one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, Mask, get_backend
from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native.decoder import DecoderLayer, DecoderRun, NormWeights
from pagedkv.attention.native.library import BUILDS, Library, load_library
from pagedkv.attention.native.operations import Operations
from pagedkv.attention.native.products import Int8Product, PairProduct
from pagedkv.attention.protocol import StepAttention
from pagedkv.errors import InvalidRequestError
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec
from pagedkv.testing.plans import make_plan

LIBRARIES = {build.name: loaded for build in BUILDS if (loaded := load_library(build.name).library) is not None}
PAIRED = [name for name, loaded in LIBRARIES.items() if PairProduct.fits(torch.zeros(1, 32, dtype=torch.bfloat16), loaded)]
HEADS, KV_HEADS, WIDTH, HIDDEN, INNER = 4, 2, 16, 64, 96
TABLES = [[3, 1, 7, 9], [2, 5, 12, 4]]
MOST_FEW = 4
STEPS = (([5, 11], [5, 11]), ([1, 3], [6, 14]), ([1, 1], [7, 15]))

pytestmark = pytest.mark.skipif(not PAIRED, reason="no build that multiplies pairs runs here")


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=generator) / 4).bfloat16()


def layer_of(
    library: Library, generator: torch.Generator, *, forms: tuple[int, int] = (0, 0), inner: int = INNER, most_few: int = 0
) -> DecoderLayer:
    norms = [NormWeights(random(generator, HIDDEN), 1e-5, forms[0]) for _ in range(2)]
    joined = (HEADS + 2 * KV_HEADS) * WIDTH
    shapes = ((joined, HIDDEN), (HIDDEN, HEADS * WIDTH), (2 * inner, HIDDEN), (HIDDEN, inner))
    products = [
        PairProduct(random(generator, *shape), random(generator, shape[0]), library, in_halves=place == 2)
        for place, shape in enumerate(shapes)
    ]
    few = [bytes_of(library, generator, *shape) for shape in shapes] if most_few else []
    return DecoderLayer((norms[0], norms[1]), products, forms[1], few=few, most_few=most_few)


def bytes_of(library: Library, generator: torch.Generator, outputs: int, inputs: int) -> Int8Product:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    return Int8Product(weight, torch.rand(outputs, generator=generator) / 500, torch.randn(outputs, generator=generator), library)


def narrow_output(library: Library, generator: torch.Generator) -> PairProduct:
    return PairProduct(random(generator, HIDDEN, 96), None, library)


def storage_of(num_layers: int, dtype: torch.dtype = torch.bfloat16) -> KVStorage:
    return KVStorage([LayerSpec(KV_HEADS, WIDTH, WIDTH)] * num_layers, num_blocks=20, block_size=4, dtype=dtype, device="cpu")


def by_parts(
    layer: DecoderLayer,
    forms: tuple[int, int],
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    storage: KVStorage,
    place: int,
    step: StepAttention,
) -> Tensor:
    """What one layer makes of ``x``, by a call for each of its parts."""
    backend, operations = CpuBackend(build=layer.build), Operations(LIBRARIES[layer.build])
    qkv, output, gated, down = layer.few if layer.few and len(x) <= MOST_FEW else layer.products
    first, second = (lambda rows, norm=norm: operations.norm(rows, norm.weight, norm.epsilon, forms[0]) for norm in layer.norms)
    attended = backend.attend_joined(qkv(first(x)), *angles, storage.layers[place], step, OPTIONS, num_heads=HEADS)
    middle = output(attended, x)
    both = gated(second(middle))
    inner = both.shape[1] // 2
    return down(operations.gate(both[:, :inner], both[:, inner:], forms[1]), middle)


OPTIONS = AttendOptions(Mask.sliding(9), 0.2, softcap=3.0)


@pytest.mark.parametrize(("forms", "most_few"), [((0, 0), 0), ((1, 1), 0), ((2, 0), 0), ((0, 0), 4), ((0, 1), 4)])
@pytest.mark.parametrize("build", PAIRED)
def test_run_decoders_is_its_parts_to_the_bit(build: str, forms: tuple[int, int], most_few: int) -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [layer_of(LIBRARIES[build], generator, forms=forms, most_few=most_few) for _ in range(3)]
    ours, theirs, backend = storage_of(3), storage_of(3), CpuBackend(build=build, num_threads=2)
    run = DecoderRun(layers, ours.layers)
    for query_lens, seq_lens in STEPS:
        batch = BatchBuilder("cpu", 4).build(make_plan(query_lens, seq_lens, block_tables=TABLES, block_size=4))
        x, cosines, sines = (random(generator, sum(query_lens), width) for width in (HIDDEN, WIDTH, WIDTH))
        got = backend.run_decoders(run, x, cosines, sines, backend.plan(batch), OPTIONS, num_heads=HEADS)
        (last,) = backend.run_decoders(run, x, cosines, sines, backend.plan(batch), OPTIONS, num_heads=HEADS, keeps_all=False)
        assert torch.equal(last, got[-1])
        step = CpuBackend(build=build).plan(batch)
        for place, layer in enumerate(layers):
            x = by_parts(layer, forms, x, (cosines, sines), theirs, place, step)
            assert torch.isfinite(x).all()
            assert torch.equal(got[place], x), f"layer {place} of {query_lens}"
            assert torch.equal(ours.layers[place].key, theirs.layers[place].key)
            assert torch.equal(ours.layers[place].value, theirs.layers[place].value)


@pytest.mark.parametrize("build", PAIRED)
def test_run_decoders_many_rows_do_not_depend_on_threads_nor_on_memory_used_before(build: str) -> None:
    generator = torch.Generator().manual_seed(6)
    # Large enough that threads are used at all, and that each of two takes rows of its own.
    layers, lens = [layer_of(LIBRARIES[build], generator, inner=480) for _ in range(2)], [301, 280]
    tables = [list(range(1, 77)), list(range(80, 150))]
    batch = BatchBuilder("cpu", 4).build(make_plan(lens, lens, block_tables=tables, block_size=4))
    x, cosines, sines = (random(generator, sum(lens), width) for width in (HIDDEN, WIDTH, WIDTH))
    results = []
    for num_threads, dirty in ((1, False), (2, False), (3, True), (16, False)):  # the last with more than there are processors
        storage = KVStorage([LayerSpec(KV_HEADS, WIDTH, WIDTH)] * 2, num_blocks=160, block_size=4, dtype=torch.bfloat16, device="cpu")
        backend = CpuBackend(build=build, num_threads=num_threads)
        run, step = DecoderRun(layers, storage.layers), backend.plan(batch)
        if dirty:
            backend.run_decoders(run, torch.full_like(x, float("nan")), cosines, sines, step, OPTIONS, num_heads=HEADS)
        results.append(backend.run_decoders(run, x, cosines, sines, step, OPTIONS, num_heads=HEADS))
        (last,) = backend.run_decoders(run, x, cosines, sines, step, OPTIONS, num_heads=HEADS, keeps_all=False)
        assert torch.equal(last, results[-1][-1])
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    assert all(torch.equal(results[0], other) for other in results[2:])


def test_run_decoders_what_does_not_fit_is_refused() -> None:
    library, generator = LIBRARIES[PAIRED[0]], torch.Generator().manual_seed(7)
    layer, backend = layer_of(library, generator), CpuBackend(build=PAIRED[0])
    batch = BatchBuilder("cpu", 4).build(make_plan([3], [3], block_tables=[[2]], block_size=4))
    x, angles = random(generator, 3, HIDDEN), [random(generator, 3, WIDTH) for _ in range(2)]
    storage, half = storage_of(1), storage_of(1, torch.float16)
    run, step = DecoderRun([layer], storage.layers), backend.plan(batch)
    for rows in (x[:2], x[:, :32], x.float(), random(generator, HIDDEN, 3).T):
        with pytest.raises(InvalidRequestError, match="is needed"):
            backend.run_decoders(run, rows, *angles, step, OPTIONS, num_heads=HEADS)
    for wrong in (DecoderRun([layer], half.layers), run):
        with pytest.raises(InvalidRequestError, match="numbers a token"):
            backend.run_decoders(wrong, x, *angles, step, OPTIONS, num_heads=HEADS if wrong is not run else 2 * HEADS)
    narrow = DecoderLayer(layer.norms, [layer.products[0], narrow_output(library, generator), *layer.products[2:]], 0)
    with pytest.raises(InvalidRequestError, match="and takes 96"):
        backend.run_decoders(DecoderRun([narrow], storage.layers), x, *angles, step, OPTIONS, num_heads=HEADS)
    with pytest.raises(InvalidRequestError, match="planned by another backend"):
        backend.run_decoders(run, x, *angles, get_backend("reference", device="cpu").plan(batch), OPTIONS, num_heads=HEADS)


def test_run_decoders_of_another_build_are_refused() -> None:
    if len(PAIRED) < 2:
        pytest.skip("one build alone multiplies pairs here")
    generator = torch.Generator().manual_seed(8)
    layer, backend = layer_of(LIBRARIES[PAIRED[0]], generator), CpuBackend(build=PAIRED[1])
    batch = BatchBuilder("cpu", 4).build(make_plan([3], [3], block_tables=[[2]], block_size=4))
    x, cosines, sines = (random(generator, 3, width) for width in (HIDDEN, WIDTH, WIDTH))
    storage = storage_of(1)
    with pytest.raises(InvalidRequestError, match=f"by the build '{PAIRED[0]}'"):
        backend.run_decoders(DecoderRun([layer], storage.layers), x, cosines, sines, backend.plan(batch), OPTIONS, num_heads=HEADS)


def test_decoder_layers_that_do_not_go_together_are_refused() -> None:
    library, generator = LIBRARIES[PAIRED[0]], torch.Generator().manual_seed(9)
    layer = layer_of(library, generator)
    with pytest.raises(InvalidRequestError, match="do not fit together"):
        DecoderLayer(layer.norms, [*layer.products[:3], layer.products[1]], 0)
    few = layer_of(library, generator, inner=64, most_few=4).few
    with pytest.raises(InvalidRequestError, match="not those of many"):
        DecoderLayer(layer.norms, layer.products, 0, few=few, most_few=4)
    two, other = storage_of(2), KVStorage([LayerSpec(1, WIDTH, WIDTH)], num_blocks=4, block_size=4, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(InvalidRequestError, match="one geometry"):
        DecoderRun([layer, layer], [two.layers[0], other.layers[0]])


def test_run_decoders_whose_pools_are_gone_is_refused() -> None:
    library, generator = LIBRARIES[PAIRED[0]], torch.Generator().manual_seed(10)
    layer, backend, storage = layer_of(library, generator), CpuBackend(build=PAIRED[0]), storage_of(2)
    batch = BatchBuilder("cpu", 4).build(make_plan([3], [3], block_tables=[[2]], block_size=4))
    x, angles = random(generator, 3, HIDDEN), [random(generator, 3, WIDTH) for _ in range(2)]
    run, kept = DecoderRun([layer, layer], storage.layers), storage.layers[0]
    assert run.is_of([layer, layer], list(storage.layers))
    assert not run.is_of([layer, layer], list(storage_of(2).layers))
    del storage
    with pytest.raises(InvalidRequestError, match="gone"):
        backend.run_decoders(run, x, *angles, backend.plan(batch), OPTIONS, num_heads=HEADS)
    assert kept.key.isfinite().all()
