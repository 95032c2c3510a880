"""Token ids to text, piece by piece.

It owns which part of the text is certain. It does not own the tokenizer, nor stop strings (`stop`).

A token is often no character: byte-level BPE cuts an emoji into several, and sentencepiece decides about a space by what stands
before it. So a short window of earlier tokens is decoded with and without the new ones and the difference is the new text, the
method of two offsets (prefix and read) that Hugging Face's text-generation-inference introduced and vLLM uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HALF = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
_CONTEXT = 6  # tokens of the prompt that the first window looks back on
_MAX_HELD = 8  # a character has at most 4 bytes and so 4 tokens: twice as many held ones are not waiting for each other


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' fit as they are."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of the ids."""
        ...


class IncrementalDetokenizer:
    """The text of an output that grows, for byte-level BPE and sentencepiece tokenizers alike.

    What `append` and `finish` return adds up to what the tokenizer decodes for the whole output behind its prompt, and no piece ends
    in half a character. Bytes that never become a character may count as another number of U+FFFD.

    Args:
        tokenizer: decodes ids; not changed.
        prompt_token_ids: the tokens before the output; only the last few are looked at. May be empty.
        skip_special_tokens: leave special tokens out.
    """

    __slots__ = ("_known", "_parts", "_read", "_skip", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        start = max(0, len(prompt_token_ids) - _CONTEXT)
        self._window = [int(token) for token in prompt_token_ids[start:]]  # tokens read already, then tokens held
        self._read = len(self._window)
        self._known = self._decode(self._window)  # text of the tokens read
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the text that is certain now.

        Args:
            token_ids: any number of ids, in order.

        Returns:
            New text, empty while a character is incomplete.

        Cost: decodes the new tokens and a window of a few; nothing that was returned is decoded again.
        """
        if not len(token_ids):
            return ""
        self._window.extend(int(token) for token in token_ids)
        text = self._decode(self._window)
        new = self._behind(text)
        if new and not new.endswith(HALF):
            return self._advance(len(self._window), new)
        if len(self._window) - self._read > _MAX_HELD:
            if not new:  # nothing to see, as in a run of special tokens: forget them, so that the window stays short
                del self._window[self._read :]
            else:
                return self._release(text)
        return ""

    def finish(self) -> str:
        """The output has ended: return what was held back, half characters as U+FFFD."""
        if self._read == len(self._window):
            return ""
        return self._advance(len(self._window), self._behind(self._decode(self._window)))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip) if token_ids else ""

    def _behind(self, text: str) -> str:
        """What ``text`` adds to the known text, whose half character at the end, if any, may have become a whole one."""
        if text.startswith(self._known):
            return text[len(self._known) :]
        return text[len(self._known.rstrip(HALF)) :]

    def _advance(self, end: int, new: str) -> str:
        """Count the window's first ``end`` tokens as read and keep the newest of those as the next context."""
        del self._window[: self._read]
        self._read = end - self._read
        self._known = self._decode(self._window[: self._read])
        if new:
            self._parts.append(new)
        return new

    def _release(self, text: str) -> str:
        """Return the part of a long hold that no later token can change: all but the last tokens, cut between characters."""
        newest = len(self._window) - _MAX_HELD // 2
        for end in range(newest, max(self._read, newest - _MAX_HELD // 2), -1):
            part = self._decode(self._window[:end])
            if text.startswith(part):  # a character cut in two would decode as U+FFFD here and as itself in the whole
                return self._advance(end, self._behind(part))
        return ""
