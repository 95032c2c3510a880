"""How long a sequence may be, prompt and output together, and why no longer.

Owns the longest length that is served. What the model's positions allow is the runner's to say.
"""

from __future__ import annotations

from pagedkv.errors import ConfigError
from pagedkv.models import ModelRunner

_WITHOUT_LIMIT = 4096  # of an encoder-decoder whose positions nothing limits, both parts together


class Lengths:
    """The lengths that sequences of one model may have.

    Args:
        runner: the model.
        asked: the longest that is wanted; all that the model has positions for when not given.

    Raises:
        ConfigError: more is asked than the model has positions, or the model states none and nothing is asked.

    Attributes:
        max_model_len: the longest, of any prompt.
    """

    def __init__(self, runner: ModelRunner, asked: int | None) -> None:
        self._runner = runner
        self.max_model_len = self._resolved(asked)

    @property
    def reason(self) -> str | None:
        """Why no longer sequence is served, where the model states more positions than that."""
        return self._reason(self.max_model_len)

    def is_far(self, num_prompt_tokens: int) -> bool:
        """Whether a prompt is so long that the model rotates all of it at other frequencies, see ``ModelRunner.far_positions``."""
        far, near = self._runner.far_positions, self._runner.max_positions
        return far is not None and near is not None and num_prompt_tokens > near

    def longest(self, *, is_far: bool) -> int:
        """Tokens of prompt and output together. A prompt that is not far must not become so: the last token is never read."""
        near = self._runner.max_positions
        if is_far or near is None:
            return self.max_model_len
        return min(self.max_model_len, near + 1)

    def why_ends_at(self, num_tokens: int) -> str | None:
        """Why a request ends at so many tokens that is not far, although longer ones are served; None where this is not what ends it."""
        if self._runner.far_positions is None or not num_tokens == self.longest(is_far=False) < self.max_model_len:
            return None
        return self._runner.max_positions_reason

    def _resolved(self, asked: int | None) -> int:
        runner = self._runner
        positions = runner.max_positions if runner.far_positions is None else runner.far_positions
        if asked is None:
            if positions is None and runner.encoder is not None:
                return _WITHOUT_LIMIT
            if positions is None:
                raise ConfigError("the model states no longest length: give max_model_len")
            return positions
        if positions is not None and asked > positions:
            reason = self._reason(positions)
            served = (
                f"the model has {positions} positions" if reason is None else f"{positions} positions of this model are served: {reason}"
            )
            raise ConfigError(f"max_model_len is {asked}, {served}")
        return asked

    def _reason(self, length: int) -> str | None:
        return self._runner.max_positions_reason if length == self._runner.max_positions else None
