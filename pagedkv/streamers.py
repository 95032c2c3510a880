"""transformers' streamers, which are handed tokens as they come. Owns how far one request's have been handed over."""

from __future__ import annotations

from typing import Protocol

import torch

from pagedkv.checks import shown
from pagedkv.errors import InvalidRequestError
from pagedkv.outputs import RequestOutput


class Streamer(Protocol):
    """transformers' streamer protocol, ``TextStreamer`` for one."""

    def put(self, value: torch.Tensor) -> None:
        """Take token ids: first the prompt's, then the output's."""

    def end(self) -> None:
        """The output is complete."""


class StreamerFeed:
    """Passes one request's tokens on to a streamer.

    Args:
        streamer: given the prompt first.

    Raises:
        InvalidRequestError: it is no streamer.
    """

    def __init__(self, streamer: Streamer) -> None:
        if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
            raise InvalidRequestError(f"streamer is {shown(streamer)}: it needs put() and end(), as transformers' TextStreamer has")
        self._streamer = streamer
        self._sent: int | None = None

    def take(self, output: RequestOutput) -> None:
        """Pass on what this output of the request has more than the one before."""
        if self._sent is None:
            begins = output.prompt_token_ids if output.decoder_prompt_token_ids is None else output.decoder_prompt_token_ids
            self._streamer.put(torch.tensor(begins))
            self._sent = 0
        tokens = output.outputs[0].token_ids
        for token in tokens[self._sent :]:
            self._streamer.put(torch.tensor([token]))
        self._sent = len(tokens)
        if output.finished:
            self._streamer.end()
