"""Does an attention backend do what the protocol says? For people with a kernel of their own.

Owns the verdict. A step is written and attended by the reference backend, then, over the same bytes as before, by the backend under test;
pools and outputs must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionBackend, Mask, get_backend
from pagedkv.attention.reference import ReferenceBackend
from pagedkv.errors import InvalidRequestError
from pagedkv.storage import LayerPool
from pagedkv.testing.attention_cases import Case, make_case
from pagedkv.testing.conformance_cases import StepCase, draw_case, simpler_cases
from pagedkv.testing.violations import ViolationError

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_LARGE_SCORE = 60.0  # as usual as 1 is otherwise: some are twice what exp can hold in float32
_MAX_SHRINK_RUNS = 400


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """What a backend was tried on; it is there only if every step was right.

    Attributes:
        backend: its name.
        num_cases: steps drawn.
        num_run: of those, steps run; the others were refused by ``supports``.
        refused: how many were refused, by the reason given.
        num_tokens: tokens attended from.
        worst_errors: by dtype, the largest difference from the reference, ``|got - expected| / (1 + |expected|)``.
    """

    backend: str
    num_cases: int
    num_run: int
    refused: Mapping[str, int]
    num_tokens: int
    worst_errors: Mapping[str, float]

    def __str__(self) -> str:
        lines = [f"backend {self.backend!r}: {self.num_run} of {self.num_cases} random steps run, {self.num_tokens} tokens, all right"]
        lines += [f"  {dtype}: off by at most {error:.1e}" for dtype, error in self.worst_errors.items()]
        lines += [f"  refused {count} times: {reason}" for reason, count in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is wrong with a step: a word for the kind, and the finding."""

    kind: str
    text: str


def check_attention_backend(
    backend: AttentionBackend | str, *, num_cases: int = 200, seed: int = 0, device: torch.device | str = "cpu"
) -> ConformanceReport:
    """Compare a backend with the reference over random ragged steps.

    Prefill chunks and decodes are mixed, with one query head per K/V head or many, blocks of 1 to 64 tokens, causal, sliding and chunked
    masks, soft cap, sinks, ALiBi slopes, any scale, scores beyond what ``exp`` can hold, K and V of different widths, strided Q, K and V,
    and every floating dtype. Whatever no sequence stored is NaN, in blocks of nobody, in half-full blocks and behind windows; tables go on
    behind their sequences with such blocks. The null block holds zeros, as it always does. Beside the output, what ``write`` stores is
    compared slot by slot, and ``attend`` must change neither pool nor query.

    Args:
        backend: the object under test, or a name that ``get_backend`` knows.
        num_cases: steps to draw; case ``i`` is drawn from ``seed + i``.
        seed: of the first case.
        device: where pools and queries live.

    Returns:
        the account; reaching the end means that every step that was run was right. How many were is up to ``supports``.

    Raises:
        ViolationError: a step went wrong; the message describes the simplest step found on which it still does, and ``case`` is that
            ``StepCase``. Its kind is ``"raised"``, ``"write"``, ``"result"`` (shape, dtype), ``"changed"``, ``"finite"`` or ``"value"``.
        InvalidRequestError: ``num_cases`` is below 1.

    Cost: some 15 milliseconds a case on a CPU.
    """
    if num_cases < 1:
        raise InvalidRequestError(f"num_cases is {num_cases}: it must be at least 1")
    place = torch.device(device)
    trial = _Trial(get_backend(backend, device=place), place)
    for number in range(num_cases):
        case = draw_case(seed + number)
        problem = trial.run(case)
        if problem is not None:
            raise _violation(trial, case, problem, number)
    return trial.report(num_cases)


class _Trial:
    """Runs cases and keeps the account."""

    def __init__(self, backend: AttentionBackend, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self._reference = ReferenceBackend()
        self._refused: Counter[str] = Counter()
        self._num_run = self._num_tokens = 0
        self._worst: dict[str, float] = {}

    def report(self, num_cases: int) -> ConformanceReport:
        return ConformanceReport(self.backend.name, num_cases, self._num_run, dict(self._refused), self._num_tokens, dict(self._worst))

    def run(self, case: StepCase) -> _Problem | None:
        """Try one case; None when all is right, or the backend does not support it."""
        reason = self.backend.supports(case.spec(self.device))
        if reason is not None:
            self._refused[reason] += 1
            return None
        self._num_run += 1
        self._num_tokens += sum(case.query_lens)
        with torch.no_grad():
            return self._problem(case)

    def _problem(self, case: StepCase) -> _Problem | None:
        subject, options = self._make(case)
        before = _contents(subject.pool)
        expected = subject.attend(self._reference, options)
        stored = _contents(subject.pool)
        for tensor, content in zip((subject.pool.key, subject.pool.value), before, strict=True):
            tensor.copy_(content)
        query = subject.query.clone()
        try:
            step = self.backend.plan(subject.batch)
            self.backend.write(subject.pool, subject.key, subject.value, step)
            if (text := _first_difference(subject.pool, stored)) is not None:
                return _Problem("write", text)
            if case.mixed_layers:
                self.backend.attend(subject.query, subject.pool, step, AttendOptions(Mask.causal(), options.scale))
            actual = self.backend.attend(subject.query, subject.pool, step, options)
        except Exception as error:
            return _Problem("raised", f"{type(error).__name__}: {error}")
        if not isinstance(actual, Tensor):
            return _Problem("result", f"{type(actual).__name__}, not a tensor")
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return _Problem("result", f"{actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}")
        if (text := _first_difference(subject.pool, stored)) is not None:
            return _Problem("changed", f"attend changed the pool: {text}")
        if not torch.equal(subject.query, query):
            return _Problem("changed", "attend changed the query")
        return self._compare(case, actual, expected)

    def _make(self, case: StepCase) -> tuple[Case, AttendOptions]:
        generator = torch.Generator().manual_seed(case.seed)
        options = case.variant.options(case.geometry, generator, self.device)
        # A layer that attends first with the plain causal mask needs what the other's mask hides.
        drop = case.variant.mask if case.drop_behind and not case.mixed_layers else None
        made = make_case(
            case.geometry,
            case.query_lens,
            seq_lens=case.seq_lens,
            generator=generator,
            device=self.device,
            drop_behind=drop,
            garbage=case.garbage,
            magnitude=_LARGE_SCORE / (options.scale * case.geometry.key_dim**0.5) if case.large else 1.0,
        )
        return made, options

    def _compare(self, case: StepCase, actual: Tensor, expected: Tensor) -> _Problem | None:
        got, want = actual.double(), expected.double()
        error = (got - want).abs() / (1 + want.abs())
        finite = got.isfinite()
        kind = "value" if bool(finite.all()) else "finite"
        worst = torch.where(finite, error, torch.inf).flatten().argmax()
        size, tolerance = float(error.flatten()[worst]), _tolerance(case)
        if kind == "value" and size <= tolerance:
            name = str(case.geometry.dtype).removeprefix("torch.")
            self._worst[name] = max(size, self._worst.get(name, 0.0))
            return None
        token, head, place = np.unravel_index(int(worst), tuple(got.shape))
        seq = int(np.searchsorted(np.cumsum(case.query_lens), token, side="right"))
        position = case.seq_lens[seq] - sum(case.query_lens[: seq + 1]) + int(token)
        return _Problem(
            kind,
            f"sequence {seq} at position {position}, query head {head}, element {place}: {float(got[token, head, place]):.6g}, "
            f"the reference has {float(want[token, head, place]):.6g} (tolerance {tolerance:g})",
        )


def _tolerance(case: StepCase) -> float:
    """A large score is rounded as coarsely as it is large, and a weight is off by as much as its score."""
    return _TOLERANCES[case.geometry.dtype] * (10 if case.large else 1)


def _contents(pool: LayerPool) -> tuple[Tensor, Tensor]:
    return pool.key.clone(), pool.value.clone()


def _first_difference(pool: LayerPool, stored: tuple[Tensor, Tensor]) -> str | None:
    """The first slot that does not hold what should be stored; NaN is like NaN."""
    for name, got, want in zip("KV", (pool.key, pool.value), stored, strict=True):
        wrong = (got != want) & ~(got.isnan() & want.isnan())
        if bool(wrong.any()):
            block, head, offset, _ = (int(index) for index in wrong.nonzero()[0])
            there = (
                "is not what the step stores there" if bool(want[block, head, offset].isfinite().all()) else "is not for the step to write"
            )
            return f"{name} of block {block}, offset {offset}, K/V head {head} {there}"
    return None


def _violation(trial: _Trial, case: StepCase, problem: _Problem, number: int) -> ViolationError:
    """The same kind of problem on the simplest case that shows it."""
    simplest, found, runs, shrinking = case, problem, 0, True
    while shrinking:
        shrinking = False
        for simpler in simpler_cases(simplest):
            runs += 1
            if runs > _MAX_SHRINK_RUNS:
                break
            again = trial.run(simpler)
            if again is not None and again.kind == problem.kind:
                simplest, found, shrinking = simpler, again, True
                break
    error = ViolationError(problem.kind, f"backend {trial.backend.name!r}: {found.text}; the step: {simplest}")
    error.case = simplest
    error.add_note(f"found at case {number}, {case}")
    return error
