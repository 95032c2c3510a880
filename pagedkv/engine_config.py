"""An engine's sizes. Owns nothing; valid once constructed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv import checks
from pagedkv.core import CheckLevel
from pagedkv.core.guard import parse_check_level
from pagedkv.scheduling import SchedulerConfig


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's sizes.

    Args:
        num_blocks: blocks of the pool, the null block included; exactly so many are allocated. Where layers have windows, so many for those
            that have none, and for the others what ``max_num_seqs`` sequences can need, if that is less; or one number for each layer
            group, in the order of ``ModelRunner.windows``.
        windowed_groups: whether layers with a sliding or chunked window give back the blocks behind it.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens computed in one step, and so sequences running at once. ``measure_token_budget`` finds how many a
            step may have that is not to take longer than running sequences shall wait.
        max_model_len: tokens of prompt and output together, what an encoder reads included; the model's positions when not given, or
            4,096 with an encoder and no limit.
        enable_prefix_caching: whether full blocks are kept to be found again; never with a model that has recurrent layers, whose state
            no block holds. Behind an encoder they are found by requests of the very same input.
        seed: for requests that bring none.
        watermark: share of the blocks kept free when a request is admitted beside others.
        check: how closely blocks, tables and queues are watched: ``"off"``, ``"step"`` (conservation laws) or ``"audit"`` (everything, and
            before each forward pass all blocks that hold nothing valid are NaN); see ``pagedkv.core.CheckLevel``.

    Raises:
        ConfigError: names the setting.
    """

    num_blocks: int | Sequence[int]
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0
    watermark: float = 0.01
    check: CheckLevel = "off"
    windowed_groups: bool = True

    def __post_init__(self) -> None:
        parse_check_level(self.check)
        for count in self.num_blocks if isinstance(self.num_blocks, list | tuple) else [self.num_blocks]:
            checks.integer("num_blocks", count, least=2, most=2**31 - 1)  # the null block and one to use; ids are int32
        checks.flag("windowed_groups", self.windowed_groups)
        if self.max_model_len is not None:
            checks.integer("max_model_len", self.max_model_len, least=2)  # one token in and one out
        checks.flag("enable_prefix_caching", self.enable_prefix_caching)
        checks.integer("seed", self.seed, least=-(2**63), most=2**64 - 1)
        self.limits()  # which knows what they may be

    def limits(self) -> SchedulerConfig:
        """The scheduler's part of it; raises ``ConfigError`` naming the setting."""
        return SchedulerConfig(max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens, watermark=self.watermark)
