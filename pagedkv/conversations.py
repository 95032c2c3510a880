"""Conversations as users write them. Owns the forms that are understood; a tokenizer's chat template makes prompts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagedkv.checks import shown
from pagedkv.errors import InvalidRequestError

Message = Mapping[str, object]


def as_conversations(messages: object) -> list[Sequence[Message]]:
    """One conversation or several, as a list of several, each of them of messages with a role and a content.

    Raises:
        InvalidRequestError: it is neither, or has content that is no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequestError(
            f"messages is {shown(messages)}: it must be a list of dicts with role and content, or a list of such lists"
        )
    several = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for conversation in several:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes):
            raise InvalidRequestError(f"a conversation is {shown(conversation)}: it must be a list of dicts with role and content")
        if not conversation:
            raise InvalidRequestError("a conversation is empty: it needs at least one message")
        for message in conversation:
            if not isinstance(message, Mapping) or "role" not in message:
                raise InvalidRequestError(f"a message is {shown(message)}: it must be a dict with role and content")
            content = message.get("content")
            parts = content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else []
            media = [part["type"] for part in parts if isinstance(part, Mapping) and part.get("type", "text") != "text"]
            if media:  # a template would leave a mark in its place, and the model would answer to that
                raise InvalidRequestError(f"a message has content of type {media[0]!r}: only text is served, no images, audio or video")
    return several
