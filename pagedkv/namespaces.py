"""Names under which prefixes are kept: who may find what was computed for a prompt.

A salt names itself. Names that are made here begin with a zero character and a letter or digit, and a salt that begins with one gets
another before it, so that nobody can ask for those. Owns how they are made and read.
"""

from __future__ import annotations

from pagedkv.prompts import ParsedPrompt

_ZERO, _FAR, _SOURCE = "\0", "\0far", "\0source"


def namespace_of(prompt: ParsedPrompt, *, is_far: bool, number: int) -> str:
    """The name of what is computed for a prompt.

    Args:
        prompt: with its salt.
        is_far: whether the model rotates all of it at other frequencies: its K/V are of no use to others.
        number: of the request, no other's.
    """
    if prompt.embeds is not None:
        # What came as embeddings is named by no tokens: nobody else may find it by those that stand in their place.
        return f"{_ZERO}{number}"
    salt = prompt.cache_salt
    if prompt.decoder_token_ids is not None:
        # What is stored for a token of the encoder depends on all of them, so only who has them all may find it.
        return f"{_SOURCE}{prompt.token_ids.tobytes().hex()}{_ZERO}{salt}"
    if is_far:
        return f"{_FAR}{salt}"
    return f"{_ZERO}{salt}" if salt.startswith(_ZERO) else salt


def salt_of(namespace: str) -> str | None:
    """The salt of the prompts that a name is of; None for embeddings, which nobody can find."""
    if not namespace.startswith(_ZERO):
        return namespace
    if namespace.startswith(_SOURCE):
        return namespace.removeprefix(_SOURCE).partition(_ZERO)[2]
    if namespace.startswith(_FAR):
        return namespace.removeprefix(_FAR)
    return namespace.removeprefix(_ZERO) if namespace.startswith(_ZERO * 2) else None
