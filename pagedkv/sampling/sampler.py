"""`Sampler`: one token for each row of logits.

It owns the order of the stages and the rows' registered parameters. It does not own the rules of each stage (`penalties`, `filters`,
`logprobs`, `random`), nor token histories, which the caller lends, nor when a sequence ends.

Order, as in transformers: repetition, presence and frequency penalties; logit bias; bad words; min tokens; allowed ids; the request's
own processors; temperature; top-k; top-p; min-p; typical; the request's own warpers; the draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.errors import InvalidRequestError, InvariantError, PagedKVError
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.sampling import dense, filters, penalties
from pagedkv.sampling.dense import Float32Array
from pagedkv.sampling.logprobs import token_logprobs
from pagedkv.sampling.params import SamplingParams
from pagedkv.sampling.random import uniforms
from pagedkv.sampling.rows import EDITED, LOGPROBS, RANDOM, WARPED, Processor, RowTable, make_extras
from pagedkv.sampling.values import TokenLogprobs

_HOST_CHUNK = 2**20  # logits handled at once on the host: temporaries stay near the caches, and small
_DEVICE_CHUNK = 2**26


@dataclass(frozen=True, slots=True, eq=False)
class TokenHistories:
    """The tokens known of every row, lent by the caller and only read.

    Attributes:
        tokens: ``[R, cap]`` int32, prompt first, what lies behind ``num_tokens`` is ignored.
        num_tokens: ``[R]`` int32, which is also the position of the token to draw.
        begins: ``[R]`` int32 tokens before the prompt, which are an encoder's and no part of what is looked at; None for none.
    """

    tokens: Int32Array
    num_tokens: Int32Array
    begins: Int32Array | None = None

    def row(self, row: int) -> Int32Array:
        """The tokens of one row, a view."""
        return self.tokens[row, 0 if self.begins is None else self.begins[row] : self.num_tokens[row]]


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What one call drew.

    Attributes:
        token_ids: ``[Q]`` int64, -1 where the row failed.
        logprobs: per row its log-probabilities or ``None``; ``None`` as a whole when no row asked.
        errors: index into the call's rows to what went wrong with that row alone.
    """

    token_ids: Int64Array
    logprobs: tuple[TokenLogprobs | None, ...] | None
    errors: Mapping[int, PagedKVError]


class Sampler:
    """Draws tokens for registered rows; apart from those it remembers nothing between calls.

    The token of a row is a function of its logits, its parameters, its history and its seed. Other rows of the call, their number
    and their order do not enter.

    Args:
        vocab_size: ``V``, logits per row.
        device: where the logits are.
        max_rows: rows to make room for at first; more are made as rows come.
    """

    def __init__(self, vocab_size: int, device: torch.device | str, *, max_rows: int = 64) -> None:
        if vocab_size < 1:
            raise InvalidRequestError(f"vocab_size is {vocab_size}, it has to be at least 1")
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._table = RowTable(max_rows)

    @property
    def num_rows(self) -> int:
        """Rows registered now."""
        return len(self._table)

    def is_registered(self, row: int) -> bool:
        """Whether a row has been added and not been removed since."""
        return row in self._table

    def add(
        self,
        row: int,
        params: SamplingParams,
        *,
        prompt_token_ids: npt.NDArray[np.integer] | Sequence[int],
        seed: int,
        index: int,
        processors: Sequence[Processor] = (),
        warpers: Sequence[Processor] = (),
        eos_token_ids: Sequence[int] = (),
        bad_words_token_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        """Register a row.

        Args:
            row: a small integer that is not registered.
            params: how its tokens are drawn.
            prompt_token_ids: ``[P]``; where the output begins, for penalties and min tokens. The tokens come from the histories.
            seed: the request's seed, taken modulo 2**64; ``params.seed`` is not looked at, the caller resolves ``None``.
            index: which of the request's samples this is, from 0.
            processors: ``(ids [1, L], scores [1, V]) -> scores``, run before temperature.
            warpers: the same, run after the filters on rows that draw at random (transformers' epsilon and eta cut-offs).
            eos_token_ids: forbidden, as ``params.stop_token_ids``, before ``params.min_tokens``.
            bad_words_token_ids: added to those of ``params``; needed when ``params.bad_words`` has texts.

        Raises:
            InvalidRequestError: the row is taken, an id is beyond the vocabulary, or bad words came without token ids.

        Cost: O(length of the lists given).
        """
        params.check_vocabulary(self._vocab_size)
        beyond = [token for word in bad_words_token_ids for token in word if not 0 <= token < self._vocab_size]
        if beyond:
            raise InvalidRequestError(f"bad_words_token_ids has {beyond[0]}, it has to be below the vocabulary's size {self._vocab_size}")
        if params.bad_words and not bad_words_token_ids:
            raise InvalidRequestError(
                f"bad_words {params.bad_words!r} need a tokenizer: give bad_words_token_ids, or a tokenizer to the LLM"
            )
        extras = make_extras(
            params, processors=processors, warpers=warpers, eos_token_ids=eos_token_ids, bad_words_token_ids=bad_words_token_ids
        )
        self._table.put(row, params, extras, num_prompt_tokens=len(prompt_token_ids), stream_of=(seed, index))

    def remove(self, row: int) -> None:
        """Forget a row. Raises `UnknownHandleError` when it is not registered."""
        self._table.drop(row)

    def sample(self, logits: Tensor, rows: Int64Array, histories: TokenHistories) -> SampledTokens:
        """Draw the next token of each row.

        Args:
            logits: ``[Q, V]`` float32 on the sampler's device; not changed.
            rows: ``[Q]`` int64 registered rows.
            histories: the tokens known so far, by row.

        Returns:
            Tokens on the host, with the failures of single rows: logits that are not finite, no token left to choose, a
            processor that raised.

        Raises:
            InvalidRequestError: wrong shape or dtype. UnknownHandleError: a row that is not registered. Nothing is drawn.

        Cost: all rows plain greedy: one argmax. Otherwise a few passes over the rows that need them; never a sort of the vocabulary,
        unless a nearly flat distribution leaves all of it within top-p, or for typical-p.
        """
        logits = self._checked(logits, rows)
        flags = self._table.flags[rows]
        errors: dict[int, PagedKVError] = {}
        if not (flags & (RANDOM | EDITED)).any():
            tokens, best = dense.argmax(logits) if len(rows) else (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
            tokens = self._without_failures(tokens, best, errors)
        else:
            tokens = np.full(len(rows), -1, dtype=np.int64)
            for start in range(0, len(rows), self._chunk):
                part = slice(start, start + self._chunk)
                tokens[part], failed = self._sample_chunk(logits[part], rows[part], histories)
                errors.update((start + index, error) for index, error in failed.items())
        return SampledTokens(token_ids=tokens, logprobs=self._logprobs(logits, rows, tokens), errors=errors)

    def scores(self, logits: Tensor, rows: Int64Array, histories: TokenHistories) -> Tensor:
        """The scores that `sample` would draw from, as transformers' processors and warpers would leave them.

        Args and raises as `sample`; a failed row raises here.

        Returns:
            ``[Q, V]`` float32, a new tensor: minus infinity for every token that cannot be drawn. Greedy rows are edited only.
        """
        logits = self._checked(logits, rows)
        scores, errors = self._edited(logits, rows, histories)
        for error in errors.values():
            raise error
        scores = scores.clone() if scores is logits else scores
        for index in np.flatnonzero(self._table.flags[rows] & RANDOM):
            scores[int(index)] = self._filtered(scores[int(index)], int(rows[index]), histories)
        return scores

    @property
    def _chunk(self) -> int:
        size = _HOST_CHUNK if self._device.type == "cpu" else _DEVICE_CHUNK
        return max(1, size // self._vocab_size)

    def _checked(self, logits: Tensor, rows: Int64Array) -> Tensor:
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            wanted = (len(rows), self._vocab_size)
            raise InvalidRequestError(
                f"logits are {tuple(logits.shape)} {logits.dtype}, they have to be {wanted} float32, a row for each of rows"
            )
        self._table.check(rows)
        return logits.detach()

    def _edited(self, logits: Tensor, rows: Int64Array, histories: TokenHistories) -> tuple[Tensor, dict[int, PagedKVError]]:
        picks = np.flatnonzero(self._table.flags[rows] & EDITED)
        if not picks.size:
            return logits, {}
        scores = logits.clone(memory_format=torch.contiguous_format)
        return scores, penalties.edit(scores, rows, picks, table=self._table, history=histories.row)

    def _sample_chunk(self, logits: Tensor, rows: Int64Array, histories: TokenHistories) -> tuple[Int64Array, dict[int, PagedKVError]]:
        scores, errors = self._edited(logits, rows, histories)
        tokens, best = dense.argmax(scores)
        tokens = self._without_failures(tokens, best, errors)
        flags = self._table.flags[rows]
        alive = np.flatnonzero((flags & RANDOM).astype(bool) & (tokens >= 0))
        warped = (flags[alive] & WARPED).astype(bool)
        for index in alive[warped]:
            tokens[index] = self._draw_warped(scores[int(index)], int(rows[index]), histories, errors=errors, index=int(index))
        plain = alive[~warped]
        if plain.size:
            x = scores if plain.size == len(rows) else scores[dense.to_device(plain, scores.device)]
            temperature = self._table.temperature[rows[plain]]
            x = x / dense.to_device(temperature, scores.device)[:, None]
            numbers = self._uniforms(rows[plain], histories)
            # division keeps the order, so the maximum divides along
            tokens[plain] = filters.draw(x, best[plain] / temperature, self._table.filters(rows[plain]), numbers)
        return tokens, errors

    def _uniforms(self, rows: Int64Array, histories: TokenHistories) -> npt.NDArray[np.float64]:
        return uniforms(self._table.streams[rows], histories.num_tokens[rows])

    def _filtered(self, scores: Tensor, row: int, histories: TokenHistories) -> Tensor:
        """One row ``[V]`` after temperature, filters and warpers."""
        rows = np.asarray([row], dtype=np.int64)
        x = scores[None] / float(self._table.temperature[row])
        settings = self._table.filters(rows)
        if settings.active()[0]:
            ids = dense.to_device(filters.survivors_of(x, dense.maxima(x), settings)[0][0], x.device)
            kept = torch.full_like(x, -torch.inf)
            kept[0, ids] = x[0, ids]
            x = kept
        return penalties.call_processors(self._table.extras(row).warpers, histories.row(row), x[0])

    def _draw_warped(self, scores: Tensor, row: int, histories: TokenHistories, *, errors: dict[int, PagedKVError], index: int) -> int:
        rows = np.asarray([row], dtype=np.int64)
        try:
            x = self._filtered(scores, row, histories)[None].contiguous()
        except InvalidRequestError as error:
            errors[index] = error
            return -1
        failed: dict[int, PagedKVError] = {}
        tokens, best = dense.argmax(x)
        if self._without_failures(tokens, best, failed)[0] < 0:
            errors[index] = failed[0]
            return -1
        off = filters.Filters(np.zeros(1, dtype=np.int64), np.ones(1), np.zeros(1), np.ones(1))
        return int(filters.draw(x, best, off, self._uniforms(rows, histories))[0])

    @staticmethod
    def _without_failures(tokens: Int64Array, best: Float32Array, errors: dict[int, PagedKVError]) -> Int64Array:
        """Put -1 where the best score is not finite (NaN wins every maximum) and say why, unless an error is known already."""
        for index in np.flatnonzero(~np.isfinite(best)):
            masked = best[index] == -np.inf
            errors.setdefault(
                int(index),
                InvalidRequestError("no token is left to choose: loosen allowed_token_ids, bad_words, min_tokens or the processors")
                if masked
                else InvariantError(f"logits are finite: the best of them is {best[index]}"),
            )
        if errors:
            tokens[list(errors)] = -1
        return tokens

    def _logprobs(self, logits: Tensor, rows: Int64Array, tokens: Int64Array) -> tuple[TokenLogprobs | None, ...] | None:
        wanted = np.flatnonzero(self._table.flags[rows] & LOGPROBS)
        if not wanted.size:
            return None
        found: list[TokenLogprobs | None] = [None] * len(rows)
        for index in wanted[tokens[wanted] >= 0]:
            found[index] = token_logprobs(logits[int(index)], int(tokens[index]), int(self._table.logprobs[rows[index]]))
        return tuple(found)
