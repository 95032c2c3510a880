"""Logits processors for sampling options that only transformers has.

Owns the translation from option names to transformers' own processors, so that their order and meaning are its. It does
not own sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pagedkv.errors import InvalidRequestError
from pagedkv.models.limits import decoder_start_token_id, eos_token_ids

Processor = Callable[[Tensor, Tensor], Tensor]

_WARPERS = frozenset({"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"})
_PROCESSORS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "suppress_tokens",
    }
)
PROCESSOR_OPTIONS = tuple(sorted(_WARPERS | _PROCESSORS | {"do_sample", "prefix_allowed_tokens_fn"}))
"""The option names that ``build_processors`` takes."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by when their processors run: before temperature, and after the filters of a random draw."""
    plain = {name: value for name, value in options.items() if name not in _WARPERS}
    return plain, {name: value for name, value in options.items() if name in _WARPERS}


def build_processors(
    model: PreTrainedModel,
    generation_kwargs: Mapping[str, Any],
    *,
    num_prompt_tokens: int = 1,
) -> list[Processor]:
    """transformers' processors for one request, in transformers' order.

    Only what is asked for applies: the defaults of the model's ``generation_config`` do not.

    Args:
        model: whose end-of-sequence ids and processor factory are used.
        generation_kwargs: options by transformers' names, of ``PROCESSOR_OPTIONS``. A warper (temperature, top_p, ...)
            implies sampling unless ``do_sample`` says otherwise.
        num_prompt_tokens: length of the prompt, from which new tokens are counted.

    Returns:
        callables ``(ids [1, len] int64, scores [1, V] float32) -> scores [1, V]``; ``ids`` is the request's prompt and
        output so far, unpadded. Some change ``scores`` in place.

    Raises:
        InvalidRequestError: an unknown option, or a value that transformers refuses.
    """
    options = dict(generation_kwargs)
    unknown = sorted(set(options) - set(PROCESSOR_OPTIONS))
    if unknown:
        raise InvalidRequestError(f"sampling options {', '.join(unknown)} are unknown: use {', '.join(PROCESSOR_OPTIONS)}")
    if num_prompt_tokens < 1:
        raise InvalidRequestError(f"num_prompt_tokens is {num_prompt_tokens}: at least 1 is needed")
    prefix_allowed = options.pop("prefix_allowed_tokens_fn", None)
    options.setdefault("do_sample", bool(_WARPERS & options.keys()))
    eos = list(eos_token_ids(model)) or None
    factory: Any = model  # these methods come from GenerationMixin, which a PreTrainedModel need not have
    try:
        # The token that a decoder begins with is only asked for: no processor looks at it.
        begins = {"decoder_start_token_id": decoder_start_token_id(model) or 0} if model.config.is_encoder_decoder else {}
        config = GenerationConfig(**options, **begins, eos_token_id=eos, num_beams=1, num_return_sequences=1)  # type: ignore[no-untyped-call]
        factory._prepare_special_tokens(config, device=model.device)
        return list(
            factory._get_logits_processor(
                config,
                input_ids_seq_length=num_prompt_tokens,
                prefix_allowed_tokens_fn=prefix_allowed,
                device=str(model.device),
            )
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"sampling options {dict(generation_kwargs)}: {error}") from error
