"""Which row of the table belongs to which response, and what sampler, recurrent state and encoder have to know of it.

Owns the rows' owners and their registration with the sampler. Does not own rows (``Scheduler``) and does not sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pagedkv.errors import InvalidRequestError
from pagedkv.models import ModelRunner, build_processors, split_options
from pagedkv.plan import BoolArray, Int32Array, Int64Array
from pagedkv.responses import Response
from pagedkv.sampling import Sampler, SamplingParams, encode_bad_words
from pagedkv.scheduling import Assignment, Scheduler
from pagedkv.storage import Source, StateStorage

_UINT64 = 2**64


class Seating:
    """Follows the scheduler's assignments, row by row.

    Args:
        runner: whose model makes logits processors.
        sampler: where rows are registered; written by nobody else.
        tokenizer: for words that are not to be written; None for token ids only.
        seed: for requests that bring none.
        num_rows: rows there are.
    """

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, *, tokenizer: PreTrainedTokenizerBase | None, seed: int, num_rows: int
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._seed = seed
        self._has_encoder = runner.encoder is not None
        self._owners: dict[int, tuple[Response, int]] = {}
        self._followed: Assignment | None = None
        self._watched = np.zeros(num_rows, dtype=np.bool_)
        self._begins = np.zeros(num_rows, dtype=np.int32)

    @property
    def watched(self) -> BoolArray:
        """``[R]`` whether the row's response looks at every token as it comes; to read."""
        return self._watched

    @property
    def begins(self) -> Int32Array | None:
        """``[R]`` where each row's tokens begin that its outputs go on from, behind those of an encoder; None where all are at 0."""
        return self._begins if self._has_encoder else None

    def owner(self, row: int) -> tuple[Response, int]:
        """The response that the row belongs to, and the index of its sample."""
        return self._owners[row]

    def sources(self, rows: Int64Array) -> Sequence[Source]:
        """What the sequences in these rows give to the encoder, one each; nothing where there is none."""
        if not self._has_encoder:
            return ()
        return [source for row in rows.tolist() if (source := self._owners[row][0].source) is not None]

    def check(self, params: SamplingParams, num_prompt_tokens: int) -> None:
        """Raise ``InvalidRequestError`` for parameters that could not be registered."""
        for options in split_options(params.generation_kwargs):
            self._processors(options, num_prompt_tokens)
        beyond = [token for word in self._bad_words(params) for token in word if token >= self._runner.vocab_size]
        if beyond:
            raise InvalidRequestError(f"bad_words has token {beyond[0]}, the model's vocabulary ends at {self._runner.vocab_size - 1}")

    def assign(self, scheduler: Scheduler, responses: Mapping[str, Response], state: StateStorage | None) -> None:
        """Register the rows that changed hands, and take them from the scheduler; if one fails, the next call tries all again.

        Args:
            scheduler: says which.
            responses: of live requests.
            state: goes along with the rows, once with each; None where there is none.
        """
        pending = scheduler.assignments
        if state is not None:
            self._follow(pending, state)
        for assignment in pending:
            response = responses.get(assignment.request_id)
            if response is not None:
                self._register(response, assignment)
        scheduler.take_assignments()

    def clear(self) -> None:
        """Forget all owners."""
        self._owners.clear()

    def _follow(self, pending: Sequence[Assignment], state: StateStorage) -> None:
        """Copying state twice would not be the same as once: what a step that failed has done already is left out."""
        done = next((place + 1 for place, each in enumerate(pending) if each is self._followed), 0)
        for each in pending[done:]:
            state.follow(each.row, each.source_row)
            self._followed = each

    def _register(self, response: Response, assignment: Assignment) -> None:
        request, params, row = response.record.request, response.params, assignment.row
        if self._sampler.is_registered(row):
            self._sampler.remove(row)
        plain, warping = split_options(params.generation_kwargs)
        self._sampler.add(
            row,
            params,
            prompt_token_ids=response.begins_with,
            seed=self._seed_of(response),
            index=assignment.index,
            processors=self._processors(plain, len(response.begins_with)),
            warpers=self._processors(warping, len(response.begins_with)),
            eos_token_ids=request.eos_token_ids,
            bad_words_token_ids=self._bad_words(params),
        )
        self._owners[row] = (response, assignment.index)
        self._watched[row] = response.watched
        self._begins[row] = response.num_source_tokens

    def _processors(self, options: dict[str, object], num_prompt_tokens: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
        return build_processors(self._runner.model, options, num_prompt_tokens=num_prompt_tokens) if options else []

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words or self._tokenizer is None:
            return ()
        tokenizer = self._tokenizer
        return encode_bad_words(params.bad_words, lambda text: tokenizer.encode(text, add_special_tokens=False))

    def _seed_of(self, response: Response) -> int:
        given = response.params.seed
        if given is not None:
            return given
        # Far apart for neighbours, and a function of the engine's seed and the order of submission alone.
        return (self._seed * 0x9E3779B97F4A7C15 + response.record.arrival * 0xD1B54A32D192ED03 + 1) % _UINT64
