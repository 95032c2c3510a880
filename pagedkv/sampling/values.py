"""The small values that sampling hands out. It owns no rule and imports nothing heavy, so that outputs can share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found one token, before temperature, penalties and filters.

    Attributes:
        logprob: natural logarithm of the token's probability.
        rank: 1 for the most likely token; equally likely tokens are ranked by their id.
        decoded_token: the token as text, ``None`` where there is no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = Mapping[int, Logprob]
"""One position: token id to its `Logprob`, the sampled token first, then by rank."""
