"""The check for backends: what it draws, what it says, and that our own backends pass it. Its bugs are in ``tests/planted``."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionSpec, StepAttention
from pagedkv.attention.native.library import load_library
from pagedkv.attention.reference import ReferenceBackend
from pagedkv.attention.torch_backend import TorchBackend
from pagedkv.errors import InvalidRequestError, UnsupportedBackendError
from pagedkv.storage import LayerPool
from pagedkv.testing.conformance import check_attention_backend
from pagedkv.testing.conformance_cases import StepCase, draw_case, simpler_cases
from pagedkv.testing.violations import ViolationError

needs_kernel = pytest.mark.skipif(load_library().library is None, reason=f"no build of the kernel runs here: {load_library().reasons}")
BACKENDS = ["reference", "torch", pytest.param("cpu", marks=needs_kernel)]


@pytest.mark.parametrize("name", BACKENDS)
def test_check_attention_backend_own_backends_pass(name: str) -> None:
    report = check_attention_backend(name, num_cases=30)
    assert report.backend == name
    assert report.num_cases == 30 == report.num_run + sum(report.refused.values())
    assert {"float32", "bfloat16", "float16"} <= set(report.worst_errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seed", range(1_000, 9_000, 1_000))
def test_check_attention_backend_own_backends_pass_many(name: str, seed: int) -> None:
    check_attention_backend(name, num_cases=1_000, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_check_attention_backend_on_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is visible")
    check_attention_backend(name, num_cases=200, device="cuda")


def test_draw_case_reaches_what_it_is_for() -> None:
    cases = [draw_case(seed) for seed in range(400)]
    seen: Counter[str] = Counter()
    for case in cases:
        layer, variant = case.geometry, case.variant
        seen.update([f"mask {variant.mask.kind}", f"{layer.dtype}", f"blocks of {layer.block_size}"])
        facts = {
            "soft cap": variant.softcap,
            "sinks": variant.sinks,
            "slopes": variant.alibi,
            "slopes and sinks": variant.alibi and variant.sinks,
            "grouped heads": layer.group > 1 < layer.num_kv_heads,
            "one K/V head": layer.num_kv_heads == 1 < layer.group,
            "unequal widths": layer.key_dim != layer.value_dim,
            "decodes and chunks": 1 in case.query_lens and max(case.query_lens) > 1,
            "chunk with a past": any(1 < query < length for query, length in zip(case.query_lens, case.seq_lens, strict=True)),
            "garbage": case.garbage,
            "mixed layers": case.mixed_layers,
            "large scores": case.large and variant.softcap is None,
            "blocks given back": case.drop_behind and 0 < variant.mask.size < max(case.seq_lens) - 64,
        }
        seen.update(name for name, fact in facts.items() if fact)
    assert {f"blocks of {size}" for size in (1, 2, 3, 4, 8, 16, 32, 64)} <= set(seen)
    assert len([name for name in seen if name.startswith(("mask", "torch."))]) == 7
    assert min(seen.values()) >= 12, seen


def test_draw_case_same_seed_gives_the_same_case_and_its_words() -> None:
    assert draw_case(17) == draw_case(17) != draw_case(18)
    case = draw_case(17)
    words = str(case)
    assert words.endswith("(seed 17)")
    assert f"blocks of {case.geometry.block_size}" in words


def test_simpler_cases_of_any_case_end_and_differ() -> None:
    for seed in range(60):
        case, steps = draw_case(seed), 0
        while (simpler := next(simpler_cases(case), None)) is not None:
            assert simpler != case
            case, steps = simpler, steps + 1
            assert steps < 200, f"seed {seed}"
        assert (case.query_lens, case.seq_lens) == ((1,), (1,))


class Picky(ReferenceBackend):
    """Wants float32 without a soft cap."""

    def supports(self, spec: AttentionSpec) -> str | None:
        if spec.dtype != torch.float32:
            return "float32 only"
        return "no soft cap" if spec.softcap is not None else super().supports(spec)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        if query.dtype != torch.float32 or options.softcap is not None:
            raise RuntimeError("this was not supported")
        return super().attend(query, pool, step, options)


def test_check_attention_backend_what_is_not_supported_is_counted_and_not_run() -> None:
    report = check_attention_backend(Picky(), num_cases=40)
    assert set(report.refused) == {"float32 only", "no soft cap"}
    assert report.num_run == 40 - sum(report.refused.values()) > 5
    assert set(report.worst_errors) == {"float32"}
    assert report.num_tokens > report.num_run
    lines = str(report).split("\n")
    assert lines[0] == f"backend 'reference': {report.num_run} of 40 random steps run, {report.num_tokens} tokens, all right"
    assert f"  refused {report.refused['no soft cap']} times: no soft cap" in lines


class Raising(TorchBackend):
    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        if options.sinks is not None and query.shape[0] > 1:
            raise ZeroDivisionError("no sinks for two")
        return super().attend(query, pool, step, options)


def test_check_attention_backend_failure_is_shrunk_and_said_in_words() -> None:
    with pytest.raises(ViolationError) as caught:
        check_attention_backend(Raising(), num_cases=60)
    error = caught.value
    assert error.kind == "raised"
    case = error.case
    assert isinstance(case, StepCase)
    assert (case.variant.sinks, sum(case.query_lens)) == (True, 2)
    assert (case.variant.alibi, case.variant.softcap, case.garbage, case.mixed_layers) == (False, None, False, False)
    assert (case.geometry.num_heads, case.geometry.block_size, case.geometry.dtype) == (1, 1, torch.float32)
    assert "backend 'torch': ZeroDivisionError: no sinks for two; the step: 1 query head over 1 K/V head" in str(error)
    (note,) = error.__notes__
    assert note.startswith("found at case ")


def test_check_attention_backend_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="num_cases is 0"):
        check_attention_backend("torch", num_cases=0)
    with pytest.raises(UnsupportedBackendError, match="neither a name"):
        check_attention_backend(7, num_cases=1)  # type: ignore[arg-type]
