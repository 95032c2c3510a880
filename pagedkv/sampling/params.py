"""`SamplingParams`: what one request asks of sampling, valid once constructed.

It owns the options' names (vLLM's), defaults and limits. It does not sample and never imports torch, because scheduling
shares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pagedkv.errors import InvalidRequestError
from pagedkv.sampling import checks
from pagedkv.sampling.checks import FrozenMapping

GREEDY_BELOW = 1e-5  # as vLLM: a smaller temperature overflows float32 logits and means greedy anyway
_MAX_SEED = 2**64

# transformers' words for what has an option of its own here: accepting both would leave open which one holds
_OWN_OPTION = FrozenMapping(
    {
        "do_sample": "temperature",
        "temperature": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "typical_p": "typical_p",
        "repetition_penalty": "repetition_penalty",
        "bad_words_ids": "bad_words_token_ids",
        "min_length": "min_tokens",
        "min_new_tokens": "min_tokens",
        "max_length": "max_tokens",
        "max_new_tokens": "max_tokens",
        "stop_strings": "stop",
        "eos_token_id": "stop_token_ids",
        "num_return_sequences": "n",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end; a frozen, comparable value.

    Lists are kept as tuples and mappings read-only, so a value that was checked stays checked.

    Attributes:
        n: samples to draw for the prompt, at least 1.
        temperature: 0 (or below 1e-5) is greedy; divides the logits otherwise.
        top_k: keep the k most likely tokens and those equal to the last of them; 0 or -1 is off.
        top_p: keep the most likely tokens until their mass reaches it, in (0, 1]. Among equals the lower id goes first.
        min_p: keep tokens at least this share as likely as the most likely one, in [0, 1].
        typical_p: keep the most typical tokens up to this mass (transformers' rule), in (0, 1].
        repetition_penalty: divides positive and multiplies negative logits of every token in prompt or output; above 0.
        presence_penalty: taken once from the logit of each token in the output (not the prompt, as vLLM and OpenAI), [-2, 2].
        frequency_penalty: taken per occurrence in the output (not the prompt), [-2, 2].
        logit_bias: token id to a finite number added to its logit.
        bad_words: texts that are not to be written; only the token that would complete one is forbidden.
        bad_words_token_ids: the same as token ids. A word begun in the prompt counts, as in transformers.
        allowed_token_ids: only these can be chosen.
        min_tokens: end-of-sequence and stop ids are forbidden, stop strings ignored, before so many tokens.
        max_tokens: the output's length at most, at least 1; ``None`` is up to the model's positions.
        stop: texts that end the output when they appear.
        stop_token_ids: token ids that end it; they stay in ``token_ids``.
        ignore_eos: go on after an end-of-sequence token.
        include_stop_str_in_output: keep the matched stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text at all; needed by ``stop`` and ``bad_words`` only as far as text is.
        logprobs: return this many most likely tokens and the chosen one per position, from the raw logits; -1 is the vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        seed: draws the same numbers whatever else is in the batch; ``None`` (or -1, as in vLLM) lets the engine choose.
        generation_kwargs: anything else in the words of transformers' ``GenerationConfig`` (``no_repeat_ngram_size``), run by
            transformers' own processors row by row.

    Raises:
        InvalidRequestError: a value out of range; names the value, the limit and the option.
        TypeError: an option that does not exist.

    Example:
        >>> SamplingParams(temperature=0, stop=["."]).stop
        ('.',)
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    bad_words_token_ids: Sequence[Sequence[int]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    # left out of the hash because its values may be lists; equal values still have equal hashes
    generation_kwargs: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._check_tokens()
        self._check_texts()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            checks.flag(name, getattr(self, name))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken and no random number is used."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty when there is none."""
        return tuple(self.stop or ())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that this vocabulary does not have.

        Args:
            vocab_size: number of logits the model gives.

        Raises:
            InvalidRequestError: names the option, the id and the vocabulary's size.

        Cost: one pass over the ids named by the options.
        """
        named: dict[str, Sequence[int]] = {
            "logit_bias": tuple(self.logit_bias or ()),
            "bad_words_token_ids": tuple(token for word in self.bad_words_token_ids or () for token in word),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids or (),
        }
        for name, ids in named.items():
            beyond = [token for token in ids if token >= vocab_size]
            if beyond:
                raise checks.refuse(name, beyond[0], f"a token id below the vocabulary's size {vocab_size}")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and asked > vocab_size:
                raise checks.refuse(name, asked, f"at most the vocabulary's size {vocab_size}, or -1 for all of it")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        limits: dict[str, tuple[str, float, float, bool]] = {  # name: words, least, most, whether the least itself is allowed
            "temperature": ("a finite number of at least 0", 0.0, float("inf"), True),
            "top_p": ("in (0, 1]", 0.0, 1.0, False),
            "min_p": ("in [0, 1]", 0.0, 1.0, True),
            "typical_p": ("in (0, 1]", 0.0, 1.0, False),
            "repetition_penalty": ("a finite number above 0", 0.0, float("inf"), False),
            "presence_penalty": ("in [-2, 2]", -2.0, 2.0, True),
            "frequency_penalty": ("in [-2, 2]", -2.0, 2.0, True),
        }
        for name, (limit, least, most, closed) in limits.items():
            value = getattr(self, name)
            checked = checks.number(name, value, limit)
            if checked > most or checked < least or (checked == least and not closed):
                raise checks.refuse(name, value, limit)
            self._set(name, checked)
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)

    def _check_counts(self) -> None:
        self._set("n", checks.integer("n", self.n, least=1, limit="an integer of at least 1"))
        top_k = checks.integer("top_k", self.top_k, least=-1, limit="an integer of at least 1, or 0 or -1 for off")
        self._set("top_k", max(top_k, 0))
        self._set("min_tokens", checks.integer("min_tokens", self.min_tokens, least=0, limit="an integer of at least 0"))
        if self.max_tokens is not None:
            limit = "an integer of at least 1, or None for as many as the model has positions"
            self._set("max_tokens", checks.integer("max_tokens", self.max_tokens, least=1, limit=limit))
            if self.min_tokens > self.max_tokens:
                raise checks.refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                limit = "an integer of at least 0, -1 for the whole vocabulary, or None"
                self._set(name, checks.integer(name, value, least=-1, limit=limit))
        if self.seed is not None:
            limit = f"an integer from 0 to {_MAX_SEED - 1}, or None"
            seed = checks.integer("seed", self.seed, least=-1, limit=limit)
            if seed >= _MAX_SEED:
                raise checks.refuse("seed", self.seed, limit)
            self._set("seed", None if seed == -1 else seed)

    def _check_tokens(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise checks.refuse("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
            limit = "a mapping of token ids to finite numbers"
            bias = {checks.token_id("logit_bias", t, limit): checks.number("logit_bias", b, limit) for t, b in self.logit_bias.items()}
            self._set("logit_bias", FrozenMapping(bias))
        for name in ("allowed_token_ids", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, checks.token_ids(name, value))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise checks.refuse("allowed_token_ids", self.allowed_token_ids, "at least one token id, or None for all")
        if self.bad_words_token_ids is not None:
            limit = "a sequence of non-empty sequences of token ids"
            if isinstance(self.bad_words_token_ids, str | bytes) or not isinstance(self.bad_words_token_ids, Sequence):
                raise checks.refuse("bad_words_token_ids", self.bad_words_token_ids, limit)
            words = tuple(self._bad_word(word, limit) for word in self.bad_words_token_ids)
            self._set("bad_words_token_ids", words)

    @staticmethod
    def _bad_word(word: object, limit: str) -> tuple[int, ...]:
        if isinstance(word, str | bytes) or not isinstance(word, Sequence) or not len(word):
            raise checks.refuse("bad_words_token_ids", word, limit)
        return tuple(checks.token_id("bad_words_token_ids", token, limit) for token in word)  # repeats matter inside a word

    def _check_texts(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, checks.strings(name, value))
        if self.stop and self.detokenize is False:
            raise InvalidRequestError(
                f"stop is {self.stop!r} and detokenize is False: text that is not made cannot stop; set detokenize=True"
            )
        if not isinstance(self.generation_kwargs, Mapping) or not all(isinstance(key, str) for key in self.generation_kwargs):
            raise checks.refuse("generation_kwargs", self.generation_kwargs, "a mapping of GenerationConfig's names to values")
        for key in self.generation_kwargs:
            if key in _OWN_OPTION:
                raise InvalidRequestError(
                    f"generation_kwargs has {key!r}={self.generation_kwargs[key]!r}: give it as SamplingParams({_OWN_OPTION[key]}=...)"
                )
        self._set("generation_kwargs", FrozenMapping(self.generation_kwargs))
