"""Bad words as texts to bad words as token ids. It owns which spellings count; matching them is the part of `penalties`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagedkv.errors import InvalidRequestError


def encode_bad_words(words: Sequence[str], encode: Callable[[str], Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids of every word, at the start of a text and after a space, because most tokenizers spell these differently.

    Args:
        words: texts that are not to be written, each with at least one visible character.
        encode: text to token ids, without special tokens.

    Returns:
        Distinct token id sequences in a fixed order.

    Raises:
        InvalidRequestError: a word that has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        spellings = [tuple(int(token) for token in encode(text)) for text in (bare, " " + bare)]
        if not bare or not spellings[0]:
            raise InvalidRequestError(f"bad_words has {word!r}, which has no tokens: leave it out of SamplingParams(bad_words=...)")
        found.update(dict.fromkeys(spellings))
    return tuple(found)
