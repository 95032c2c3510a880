"""The scheduler's limits. Owns nothing; valid once constructed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pagedkv.checks import integer, number, shown
from pagedkv.errors import ConfigError

RecurrentState = Literal["none", "chunked", "whole"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much one step may hold.

    Args:
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens computed in one step; also bounds the running sequences, so that each can decode in every step.
        watermark: share of the blocks kept free when a request is admitted beside others, so that it is not preempted at once.
        max_preemptions: after so many, a request is admitted only when all running ones are sure to fit to their end.
        num_ended_kept: ended requests that ``explain`` still knows.
        recurrent_state: what sequences have beside their blocks. ``"none"``: nothing. ``"chunked"``: the state of recurrent layers, which
            cannot go back to an earlier position: who loses a part of what is computed starts again, and no prefix is found. ``"whole"``:
            besides, the model goes on from a state by one token only, so a prompt is computed in one step, where
            ``max_num_batched_tokens`` counts prompts alone; what is longer than that follows token by token, which takes long.

    Raises:
        ConfigError: names the setting.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    watermark: float = 0.01
    max_preemptions: int = 3
    num_ended_kept: int = 1024
    recurrent_state: RecurrentState = "none"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_num_seqs", self.max_num_seqs, 1),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1),
            ("max_preemptions", self.max_preemptions, 0),
            ("num_ended_kept", self.num_ended_kept, 0),
        ):
            integer(name, value, least=least)
        if not 0 <= number("watermark", self.watermark, limit="from 0 to below 1") < 1:
            raise ConfigError(f"watermark is {self.watermark}: it must be from 0 to below 1")
        if self.recurrent_state not in get_args(RecurrentState):
            raise ConfigError(f"recurrent_state is {shown(self.recurrent_state)}: it must be one of {', '.join(get_args(RecurrentState))}")

    @property
    def max_running(self) -> int:
        """Sequences that may run at once under both limits."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def has_state(self) -> bool:
        """Whether sequences have recurrent state."""
        return self.recurrent_state != "none"
