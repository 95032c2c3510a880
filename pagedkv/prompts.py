"""Prompts as users write them, made into checked token ids.

Owns the forms that are understood; encodes through a tokenizer that it is lent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from pagedkv.checks import integers, shown, text
from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int32Array
from pagedkv.sampling import SamplingParams


class PromptDict(TypedDict, total=False):
    """A prompt with more to say: one of ``prompt``, ``prompt_token_ids`` and ``prompt_embeds``, and any of the others.

    ``prompt_embeds`` is a float tensor ``[P, H]`` of what the model's input embedding would give; no cached prefix is used for it,
    because no tokens name it. ``cache_salt`` keeps cached prefixes apart from those of other salts. ``priority``: lower goes first,
    under the policy that looks at it. ``decoder_prompt_token_ids``: for an encoder-decoder, whose encoder reads the prompt, the tokens
    that the output goes on from; the token that its decoder begins with is put before them where it is not their first.
    """

    prompt: str
    prompt_token_ids: Sequence[int]
    prompt_embeds: object
    decoder_prompt_token_ids: Sequence[int]
    cache_salt: str
    priority: int


_CONTENTS = ("prompt", "prompt_token_ids", "prompt_embeds")
_MEDIA = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids")  # vLLM's names

Prompt = str | Sequence[int] | PromptDict


class Encoder(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text, special tokens as the model expects them."""


@dataclass(frozen=True, slots=True, eq=False)
class ParsedPrompt:
    """A prompt in one form: ``text`` if it came as text, ``token_ids [P]`` int32, salt and priority.

    ``embeds`` is what came as ``prompt_embeds``; then the token ids are zeros, in the place of tokens that nobody knows.
    ``decoder_token_ids [D]``: of an encoder-decoder, what its decoder begins with; the other tokens are the encoder's.
    """

    text: str | None
    token_ids: Int32Array
    cache_salt: str = ""
    priority: int = 0
    embeds: object | None = None
    decoder_token_ids: Int32Array | None = None

    @property
    def sequence(self) -> Int32Array:
        """``[P + D]`` int32, as the books know it."""
        return self.token_ids if self.decoder_token_ids is None else np.concatenate([self.token_ids, self.decoder_token_ids])

    @property
    def num_tokens(self) -> int:
        """Of both."""
        return len(self.token_ids) + (0 if self.decoder_token_ids is None else len(self.decoder_token_ids))


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """What prompts of an encoder-decoder have to keep to.

    Attributes:
        start_token_id: what its decoder begins with; None where the model states nothing.
        num_token_ids: ids that the decoder can read, from 0.
        max_source_tokens: that the encoder can read; None for no limit.
        max_tokens: that the decoder can, one of them for the output; None for no limit.
    """

    start_token_id: int | None
    num_token_ids: int
    max_source_tokens: int | None
    max_tokens: int | None

    def room(self, parsed: ParsedPrompt) -> int | None:
        """Tokens that the output of a prompt can have; None for no limit."""
        if self.max_tokens is None or parsed.decoder_token_ids is None:
            return None
        return self.max_tokens - len(parsed.decoder_token_ids)


def parse_prompt(
    prompt: Prompt | ParsedPrompt,
    *,
    tokenizer: Encoder | None,
    num_token_ids: int,
    max_model_len: int,
    limit_reason: str | None = None,
    decoder: DecoderRules | None = None,
) -> ParsedPrompt:
    """Check a prompt and encode it if it is text.

    Args:
        prompt: a text, token ids, or a ``PromptDict``; or one that was parsed before, which is checked again but not encoded again.
        tokenizer: for texts; None if there is none.
        num_token_ids: ids that the model can read, from 0.
        max_model_len: tokens of prompt and output together; at least one is left for the output.
        limit_reason: why ``max_model_len`` cannot be raised, if it cannot.
        decoder: of an encoder-decoder; None for others.

    Raises:
        InvalidRequestError: names what is wrong, the limit and the setting to change.
    """
    fields = _as_fields(prompt)
    words, ids = (prompt.text, prompt.token_ids) if isinstance(prompt, ParsedPrompt) else _encoded(fields, tokenizer)
    token_ids = _checked_ids("prompt_token_ids", ids, num_token_ids)
    salt = text("cache_salt", fields.get("cache_salt", ""), error=InvalidRequestError)
    priority = check_priority(fields.get("priority", 0))
    begins = _decoder_ids(fields, token_ids, decoder)
    parsed = ParsedPrompt(words, token_ids, salt, priority, fields.get("prompt_embeds"), begins)
    if parsed.num_tokens >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {parsed.num_tokens} tokens{'' if begins is None else f', {len(begins)} of them of the decoder,'} "
            f"and max_model_len is {max_model_len}, one of them for the output: shorten it" + (f" ({limit_reason})" if limit_reason else "")
        )
    return parsed


def check_priority(priority: object) -> int:
    """The same integer; raises ``InvalidRequestError`` for anything else."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise InvalidRequestError(f"priority is {priority!r}: it must be an integer")
    return priority


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of several; raises ``InvalidRequestError`` for what is neither."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    scalar = isinstance(prompts, np.ndarray) and prompts.ndim == 0
    if scalar or not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, bytes | bytearray):
        raise InvalidRequestError(f"prompts is a {type(prompts).__name__}: give a text, token ids, a dict, or a list of those")
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Sampling parameters for ``count`` prompts: one for all, or one each; raises ``InvalidRequestError`` for anything else."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    several = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else [params]
    for given in several:
        if not isinstance(given, SamplingParams):
            raise InvalidRequestError(f"sampling_params has a {type(given).__name__}: give SamplingParams(...), one for all or one each")
    if len(several) != count:
        raise InvalidRequestError(f"{len(several)} sampling_params were given for {count} prompts: give one, or one each")
    return several


def _as_fields(prompt: Prompt | ParsedPrompt) -> Mapping[str, object]:
    if isinstance(prompt, ParsedPrompt):
        tokens = {"prompt_token_ids": prompt.token_ids} if prompt.embeds is None else {"prompt_embeds": prompt.embeds}
        begins = {} if prompt.decoder_token_ids is None else {"decoder_prompt_token_ids": prompt.decoder_token_ids}
        return {**tokens, **begins, "cache_salt": prompt.cache_salt, "priority": prompt.priority}
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": prompt}
    media = [field for field in prompt if field in _MEDIA]
    if media:
        raise InvalidRequestError(f"prompt field {media[0]}: images, audio and video are not served, only the text part of a model is run")
    unknown = [field for field in prompt if field not in PromptDict.__annotations__]
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise InvalidRequestError(f"prompt fields {names} are unknown: use {', '.join(PromptDict.__annotations__)}")
    if sum(field in prompt for field in _CONTENTS) != 1:
        raise InvalidRequestError(f"a prompt dict needs exactly one of {', '.join(_CONTENTS)}")
    return prompt


def _encoded(fields: Mapping[str, object], tokenizer: Encoder | None) -> tuple[str | None, object]:
    """The prompt's text, if it has one, and its token ids as they come."""
    if "prompt_embeds" in fields:
        shape = tuple(getattr(fields["prompt_embeds"], "shape", ()))
        if len(shape) != 2:
            raise InvalidRequestError(f"prompt_embeds is {shown(fields['prompt_embeds'])}: it must be a tensor of two dimensions, [P, H]")
        return None, np.zeros(shape[0], dtype=np.int32)
    if "prompt" not in fields:
        return None, fields["prompt_token_ids"]
    words = text("prompt", fields["prompt"], error=InvalidRequestError)
    if tokenizer is None:
        raise InvalidRequestError("the prompt is a text and there is no tokenizer: give token ids, or a tokenizer")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the prompt is no text that can be encoded: {error}") from error
    return words, tokenizer.encode(words)


def _decoder_ids(fields: Mapping[str, object], source: Int32Array, rules: DecoderRules | None) -> Int32Array | None:
    """What the decoder of an encoder-decoder begins with, as ``generate`` would have it."""
    given = fields.get("decoder_prompt_token_ids")
    if rules is None:
        if given is not None:
            raise InvalidRequestError("decoder_prompt_token_ids were given, and the model has no encoder: use prompt_token_ids")
        return None
    if "prompt_embeds" in fields:
        raise InvalidRequestError("prompt_embeds are served for decoders only, and the model is an encoder-decoder: give tokens")
    if rules.max_source_tokens is not None and len(source) > rules.max_source_tokens:
        raise InvalidRequestError(f"the prompt has {len(source)} tokens and the encoder {rules.max_source_tokens} positions: shorten it")
    if given is None and rules.start_token_id is None:
        raise InvalidRequestError("the model states no decoder_start_token_id: give decoder_prompt_token_ids")
    name = "decoder_prompt_token_ids"
    ids = _checked_ids(name, [rules.start_token_id] if given is None else given, rules.num_token_ids)
    if rules.start_token_id is not None and ids[0] != rules.start_token_id:
        ids = np.concatenate([_checked_ids(name, [rules.start_token_id], rules.num_token_ids), ids])
    if rules.max_tokens is not None and len(ids) >= rules.max_tokens:
        raise InvalidRequestError(
            f"decoder_prompt_token_ids are {len(ids)} tokens and the decoder has {rules.max_tokens} positions, one of them for the output"
        )
    return ids


def _checked_ids(name: str, ids: object, num_token_ids: int) -> Int32Array:
    wide = integers(name, ids)
    if not len(wide):
        raise InvalidRequestError(f"{'the prompt is' if name == 'prompt_token_ids' else f'{name} are'} empty: it needs at least one token")
    least, most = int(wide.min()), int(wide.max())
    if least < 0 or most >= num_token_ids:
        raise InvalidRequestError(
            f"token id {least if least < 0 else most} is not from 0 to {num_token_ids - 1}, which the model's vocabulary has"
        )
    return wide.astype(np.int32)
