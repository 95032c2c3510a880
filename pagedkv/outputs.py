"""What a request gives back: frozen values in vLLM's names.

It owns no rule and imports nothing heavy; whoever fills these values owns what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.errors import PagedKVError
from pagedkv.sampling.values import Logprob, TokenLogprobs

Float32Array = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length", "abort", "error"]


class Event(Protocol):
    """Why something happened to a request: a wait, miss, preemption or refusal."""

    @property
    def kind(self) -> object:
        """What happened, machine-readable."""
        ...

    @property
    def step(self) -> int:
        """The step in which it happened."""
        ...

    @property
    def detail(self) -> object:
        """The numbers behind it."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request, as far as it has come.

    Attributes:
        index: which of the request's ``n`` samples, from 0.
        text: the output as text, a stop string taken off unless asked for; empty without a tokenizer.
        token_ids: the output's tokens, the one that ended it included.
        logprobs: one entry per token when ``SamplingParams.logprobs`` was given.
        cumulative_logprob: sum over the chosen tokens when ``logprobs`` was given.
        finish_reason: ``None`` while it runs; ``"stop"`` (end-of-sequence, stop id or stop string), ``"length"``, ``"abort"``
            or ``"error"``.
        stop_reason: the stop string or stop token id that ended it; ``None`` for end-of-sequence and all else.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether this sample has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock; ``None`` for what has not happened.

    Attributes:
        arrival_time: it was submitted.
        first_scheduled_time: a step first computed some of it.
        first_token_time: its first token was drawn.
        finished_time: its last sample ended.
        num_preemptions: how often its blocks were taken away.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue_s(self) -> float | None:
        """Seconds from submission to the first step."""
        return _since(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from submission to the first token."""
        return _since(self.arrival_time, self.first_token_time)

    @property
    def total_time_s(self) -> float | None:
        """Seconds from submission to the end."""
        return _since(self.arrival_time, self.finished_time)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All that is known of a request, as far as it has come.

    Attributes:
        request_id: the id it was submitted under.
        prompt: the prompt as text, ``None`` when it came as token ids.
        prompt_token_ids: the prompt as token ids.
        outputs: its samples, by index.
        num_cached_tokens: prompt tokens that the prefix cache served.
        metrics: when things happened.
        events: why: waits, misses, preemptions, refusals, oldest first.
        finished: whether every sample has ended.
        prompt_logprobs: one entry per prompt token when asked for, the first ``None`` because nothing comes before it.
        error: what ended the request, when its finish reason is ``"error"``.
        embedding: ``[H]`` float32, or ``[P, H]``, read-only; of a request for hidden states that ended well, which has no ``outputs``.
        decoder_prompt_token_ids: of an encoder-decoder, whose prompt is what its encoder reads, what the outputs go on from.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    metrics: RequestMetrics
    events: tuple[Event, ...] = ()
    finished: bool = False
    prompt_logprobs: tuple[Mapping[int, Logprob] | None, ...] | None = None
    error: PagedKVError | None = field(default=None, compare=False)  # errors compare by identity
    embedding: Float32Array | None = field(default=None, compare=False)  # arrays do not compare to one answer
    decoder_prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingOutput:
    """The hidden states of a prompt, pooled.

    Attributes:
        embedding: ``[H]`` float32, or ``[P, H]`` where those of all tokens were wanted; read-only.
    """

    embedding: Float32Array


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRequestOutput:
    """What ``LLM.embed`` gives for one prompt.

    Attributes:
        request_id: the id it was submitted under.
        prompt: the prompt as text, ``None`` when it came as token ids.
        prompt_token_ids: the prompt as token ids.
        outputs: the embedding; None where an error ended the request.
        num_cached_tokens: prompt tokens that the prefix cache served.
        metrics: when things happened.
        error: what ended the request, if anything did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: EmbeddingOutput | None
    num_cached_tokens: int
    metrics: RequestMetrics
    error: PagedKVError | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> EmbeddingRequestOutput:
        """What an engine delivered for a request for hidden states."""
        return cls(
            request_id=output.request_id,
            prompt=output.prompt,
            prompt_token_ids=output.prompt_token_ids,
            outputs=None if output.embedding is None else EmbeddingOutput(output.embedding),
            num_cached_tokens=output.num_cached_tokens,
            metrics=output.metrics,
            error=output.error,
        )


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
