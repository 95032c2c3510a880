"""Logits to tokens, tokens to text: parameters, sampler, detokenizer, stop strings.

It owns what a request may ask of sampling and how a token is drawn. It does not own when a request runs, nor token-level
stops (end-of-sequence, stop ids, length), which scheduling decides with arrays. Names load on first use, so that
`SamplingParams` costs scheduling no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedkv.sampling.badwords import encode_bad_words
    from pagedkv.sampling.detokenizer import IncrementalDetokenizer, Tokenizer
    from pagedkv.sampling.logprobs import prompt_logprobs, token_logprobs
    from pagedkv.sampling.params import SamplingParams
    from pagedkv.sampling.random import stream, uniforms
    from pagedkv.sampling.sampler import SampledTokens, Sampler, TokenHistories
    from pagedkv.sampling.stop import StopStrings
    from pagedkv.sampling.values import Logprob, TokenLogprobs

_HOMES = {
    "IncrementalDetokenizer": "detokenizer",
    "Logprob": "values",
    "SampledTokens": "sampler",
    "Sampler": "sampler",
    "SamplingParams": "params",
    "StopStrings": "stop",
    "TokenHistories": "sampler",
    "TokenLogprobs": "values",
    "Tokenizer": "detokenizer",
    "encode_bad_words": "badwords",
    "prompt_logprobs": "logprobs",
    "stream": "random",
    "token_logprobs": "logprobs",
    "uniforms": "random",
}

__all__ = [
    "IncrementalDetokenizer",
    "Logprob",
    "SampledTokens",
    "Sampler",
    "SamplingParams",
    "StopStrings",
    "TokenHistories",
    "TokenLogprobs",
    "Tokenizer",
    "encode_bad_words",
    "prompt_logprobs",
    "stream",
    "token_logprobs",
    "uniforms",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return list(__all__)
