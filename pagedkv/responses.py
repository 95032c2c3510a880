"""From tokens to what the user sees: text, stop strings, log-probabilities, and the outputs themselves.

Owns the text and log-probabilities of every request that has not been delivered in full. Does not own tokens or status (``Scheduler``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from pagedkv.errors import InvalidRequestError
from pagedkv.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pagedkv.plan import Int32Array
from pagedkv.pooling import Pooler
from pagedkv.sampling import IncrementalDetokenizer, Logprob, SamplingParams, StopStrings, Tokenizer, TokenLogprobs
from pagedkv.scheduling import Branch, FinishReason, RequestRecord
from pagedkv.storage import Source


@dataclass(slots=True, eq=False)
class Completion:
    """One continuation as it grows.

    Args:
        params: how its text is made.
        tokenizer: None for token ids only.
        prompt_token_ids: the tokens before it.

    Attributes:
        failure: what the tokenizer raised, if it did; there is no more text from then on.
    """

    params: SamplingParams
    tokenizer: Tokenizer | None
    prompt_token_ids: Sequence[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    failure: InvalidRequestError | None = None
    _detokenizer: IncrementalDetokenizer | None = None
    _stops: StopStrings | None = None
    _stopped_by: str | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.params.detokenize:
            skip = self.params.skip_special_tokens
            try:
                self._detokenizer = IncrementalDetokenizer(self.tokenizer, self.prompt_token_ids, skip_special_tokens=skip)
            except Exception as error:
                self._fail(error)
            self._stops = StopStrings(self.params.stop_strings, include=self.params.include_stop_str_in_output)

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Take new tokens; returns the stop string that they completed, if any."""
        for token in token_ids:
            self.token_ids.append(token)
            if self._detokenizer is None or self._stops is None:
                continue
            try:
                text = self._detokenizer.append([token])
            except Exception as error:
                self._fail(error)
                continue
            # Below min_tokens a stop string is text like any other.
            self.text += self._stops.feed(text, search=len(self.token_ids) >= self.params.min_tokens)
            if self._stops.matched is not None:
                return self._stops.matched
        return None

    def with_texts(self, entry: TokenLogprobs) -> TokenLogprobs:
        """The same log-probabilities with each token as text, where there is a tokenizer that can."""
        try:
            return entry if self.tokenizer is None else _with_texts(entry, self.tokenizer)
        except Exception as error:
            self._fail(error)
            return entry

    def append_silently(self, token_id: int) -> None:
        """Take the token that ended it, which is no part of the text."""
        self.token_ids.append(token_id)

    def finish(self, *, by_length: bool) -> None:
        """Flush what was held back; a stop string that only the last token allowed completed is what ended it."""
        if self._detokenizer is not None and self._stops is not None:
            try:
                text = self._detokenizer.finish()
            except Exception as error:
                self._fail(error)
                return
            self.text += self._stops.feed(text) + self._stops.finish()
            self._stopped_by = self._stops.matched if by_length else None
            self._detokenizer = self._stops = None

    def output(self, branch: Branch) -> CompletionOutput:
        """A frozen copy."""
        asked = self.params.logprobs is not None
        chosen = [entry[token].logprob for token, entry in zip(self.token_ids, self.logprobs, strict=False)] if asked else []
        return CompletionOutput(
            index=branch.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs) if asked else None,
            cumulative_logprob=sum(chosen) if asked else None,
            finish_reason=self._finish_reason(branch),
            stop_reason=branch.stop_reason if self._stopped_by is None else self._stopped_by,
        )

    def _finish_reason(self, branch: Branch) -> FinishReason | None:
        if self.failure is not None and branch.finish_reason is not None:
            return "error"
        return "stop" if self._stopped_by is not None else branch.finish_reason

    def _fail(self, error: Exception) -> None:
        self._detokenizer = None
        self.failure = InvalidRequestError(f"the tokenizer could not turn tokens into text: {type(error).__name__}: {error}")
        self.failure.__cause__ = error


@dataclass(slots=True, eq=False)
class Response:
    """All that one request gives back, as it grows.

    Attributes:
        text: the prompt as text, if it came so.
        stream: whether an output is wanted for every step.
        pooler: takes the prompt's hidden states, where they and not a continuation are wanted.
        embeds: ``[P, H]`` the prompt, where it came as embeddings: its token ids mean nothing.
        is_far: whether the prompt is longer than ``ModelRunner.max_positions``.
        source: of an encoder-decoder, what its encoder reads: the first tokens of the sequence.
    """

    record: RequestRecord
    params: SamplingParams
    tokenizer: Tokenizer | None
    text: str | None
    stream: bool
    pooler: Pooler | None = None
    embeds: Tensor | None = None
    is_far: bool = False
    source: Source | None = None
    completions: dict[int, Completion] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])  # nothing comes before the first token
    _shown: tuple[tuple[int, ...], tuple[int, ...] | None] | None = None

    @property
    def num_source_tokens(self) -> int:
        """Tokens of the sequence that are the encoder's."""
        return 0 if self.source is None else len(self.source)

    @property
    def begins_with(self) -> Int32Array:
        """``[P]`` what the outputs go on from: the prompt, or that of the decoder."""
        return self.record.request.prompt_token_ids[self.num_source_tokens :]

    @property
    def watched(self) -> bool:
        """Whether every token has to be looked at as it comes, not only at the end."""
        return self.stream or bool(self.params.stop_strings) or self.params.logprobs is not None

    def completion(self, index: int) -> Completion:
        """The continuation of this index, begun on first use."""
        completion = self.completions.get(index)
        if completion is None:
            prompt = [] if self.embeds is not None else self.begins_with.tolist()
            completion = self.completions[index] = Completion(self.params, self.tokenizer, prompt)
        return completion

    def end(self, branch: Branch) -> None:
        """Bring an ended branch's continuation up to date with its tokens, and close its text."""
        completion = self.completion(branch.index)
        missing = branch.output_token_ids[len(completion.token_ids) :].tolist()
        by_token = branch.finish_reason == "stop" and not isinstance(branch.stop_reason, str)
        if missing and by_token and not self.params.include_stop_str_in_output:
            completion.append(missing[:-1])
            completion.append_silently(missing[-1])
        else:
            completion.append(missing)
        completion.finish(by_length=branch.finish_reason == "length")

    def output(self) -> RequestOutput:
        """A frozen copy of everything so far."""
        record = self.record
        prompt_logprobs = tuple(self.prompt_logprobs) if self.params.prompt_logprobs is not None else None
        branches = sorted(record.branches, key=lambda one: one.index) if self.pooler is None else []
        pooled = self.pooler is not None and record.finished and all(branch.finish_reason == "length" for branch in record.branches)
        prompt_token_ids, decoder_prompt_token_ids = self._prompts()
        return RequestOutput(
            request_id=record.request.request_id,
            prompt=self.text,
            prompt_token_ids=prompt_token_ids,
            outputs=tuple(self.completion(branch.index).output(branch) for branch in branches),
            num_cached_tokens=record.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=record.arrival_time,
                first_scheduled_time=record.first_scheduled_time,
                first_token_time=record.first_token_time,
                finished_time=record.finished_time,
                num_preemptions=record.num_preemptions,
            ),
            events=record.events,
            finished=record.finished,
            prompt_logprobs=prompt_logprobs,
            error=record.error or next((each.failure for each in self.completions.values() if each.failure), None),
            embedding=self.pooler.result() if self.pooler is not None and pooled else None,
            decoder_prompt_token_ids=decoder_prompt_token_ids,
        )

    def _prompts(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """The prompt, and that of a decoder behind an encoder, as all outputs share them: a stream has one for each of its tokens."""
        if self._shown is None:
            begins = () if self.embeds is not None else tuple(self.begins_with.tolist())
            self._shown = (begins, None) if self.source is None else (tuple(self.source.token_ids.tolist()), begins)
        return self._shown


def _with_texts(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprobs:
    decode: Callable[..., str] = tokenizer.decode
    texts: dict[int, Logprob] = {
        token: replace(logprob, decoded_token=decode([token], skip_special_tokens=False)) for token, logprob in entry.items()
    }
    return texts
