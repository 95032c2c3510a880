"""Names under which an engine keeps prefixes: no salt leads to what is not its own, and each is found again to be purged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pagedkv.namespaces import namespace_of, salt_of
from pagedkv.prompts import ParsedPrompt

SALTS = ["", "a", "7", "far", "\0", "\0\0", "\x007", "\0far", "\0source", "\0source0000\0"]


def names_of(salt: str) -> list[str]:
    """Of prompts that others may find: of a decoder, of one that is rotated as a long one, and of two inputs of an encoder."""
    prompt = ParsedPrompt(None, np.array([7, 8], dtype=np.int32), salt)
    paired = replace(prompt, decoder_token_ids=np.array([2], dtype=np.int32))
    other = replace(paired, token_ids=np.array([7, 9], dtype=np.int32))
    alone = [namespace_of(prompt, is_far=is_far, number=7) for is_far in (False, True)]
    return alone + [namespace_of(each, is_far=False, number=7) for each in (paired, other)]


@pytest.mark.parametrize("salt", SALTS)
def test_salt_is_read_from_every_name_that_is_made_of_it(salt: str) -> None:
    assert [salt_of(name) for name in names_of(salt)] == [salt] * 4


def test_names_of_different_prompts_and_salts_differ() -> None:
    embeds = ParsedPrompt(None, np.zeros(2, dtype=np.int32), "a", embeds=object())
    private = [namespace_of(embeds, is_far=is_far, number=number) for number, is_far in ((7, False), (8, True))]
    assert [salt_of(name) for name in private] == [None, None]
    names = [name for salt in SALTS for name in names_of(salt)] + private
    assert len(set(names)) == len(names)
