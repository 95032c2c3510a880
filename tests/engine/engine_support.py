"""One tiny model, an engine over it, and what ``generate`` says: shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.attention import AttendOptions, AttentionBackend, AttentionSpec, StepAttention, get_backend
from pagedkv.engine import Engine, EngineConfig
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams
from pagedkv.storage import LayerPool, StepBatch

Prompt = tuple[int, ...]

PROMPTS: tuple[Prompt, ...] = ((11, 23, 5, 42, 77, 8, 30), (64, 3, 51), tuple(range(20, 40)), (9,), (80, 12, 80, 12, 80, 33, 71, 6, 5))


def generate(model: PreTrainedModel, prompt: Sequence[int], max_new: int) -> tuple[int, ...]:
    """transformers' own greedy tokens, without an end of sequence."""
    ids = torch.tensor([list(prompt)])
    loop: Callable[..., Any] = model.generate
    result = loop(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new, eos_token_id=None, pad_token_id=0)
    return tuple(result[0, len(prompt) :].tolist())


def greedy(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **options})


def new_engine(runner: ModelRunner, num_blocks: int = 60, **options: Any) -> Engine:
    engine = Engine(runner, EngineConfig(num_blocks=num_blocks, **options))
    engine.fill_free_blocks(float("nan"))
    return engine


def step(engine: Engine) -> list[RequestOutput]:
    """A step after which every invariant holds and freed blocks are NaN."""
    outputs = engine.step()
    engine.check()
    engine.fill_free_blocks(float("nan"))
    return outputs


def run_all(engine: Engine) -> dict[str, RequestOutput]:
    ended: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in step(engine) if output.finished)
    return ended


def tokens_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in output.outputs]


class FailingBackend:
    """Runs another backend until it is armed; then its ``write`` or ``attend`` raises at the given call, once."""

    def __init__(self, error: BaseException, inner: AttentionBackend | None = None) -> None:
        self._inner = get_backend("auto", device="cpu") if inner is None else inner
        self._error = error
        self._calls_left: int | None = None

    @property
    def name(self) -> str:
        return "failing"

    @property
    def armed(self) -> bool:
        return self._calls_left is not None

    def arm(self, calls: int) -> None:
        """Let so many calls pass, then raise."""
        self._calls_left = calls

    def disarm(self) -> None:
        self._calls_left = None

    def supports(self, spec: AttentionSpec) -> str | None:
        return self._inner.supports(spec)

    def plan(self, batch: StepBatch) -> StepAttention:
        return self._inner.plan(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        self._count()
        self._inner.write(pool, key, value, step)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        self._count()
        return self._inner.attend(query, pool, step, options)

    def _count(self) -> None:
        if self._calls_left is None:
            return
        self._calls_left -= 1
        if self._calls_left < 0:
            self._calls_left = None
            raise self._error


def assert_all_mentioned(message: str, words: Iterable[str]) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in the message: {message}"
