"""A byte-level tokenizer made on the spot, a tiny model that fits it, and what ``generate`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pagedkv import LLM, SamplingParams
from pagedkv.testing.models import tiny_model
from pagedkv.testing.poison import PoisonBackend

VOCAB_SIZE = 320
TEXTS = ("one two", "a", "the quick brown fox jumps over the lazy dog", "ünï ☃", "one two three")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and a few pairs; ids as the tiny models' configs say: 0 pads, 1 begins, 2 ends."""
    pieces = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("o", "n"), ("on", "e"), ("Ġ", "t")]
    vocab = {piece: index for index, piece in enumerate(pieces + ["".join(merge) for merge in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(pieces[:6])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(**overrides: Any) -> PreTrainedModel:
    # The last embeddings belong to ids that the tokenizer does not know, as in many a checkpoint.
    return tiny_model("llama", seed=5, vocab_size=VOCAB_SIZE, **overrides)


def make_llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, **options: Any) -> LLM:
    return LLM(model, tokenizer, **{"block_size": 4, "attention_backend": PoisonBackend(), **options})


def greedy(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **options})


def generate(model: PreTrainedModel, prompt: Sequence[int], max_new: int = 8) -> tuple[int, ...]:
    """transformers' own greedy tokens, without an end of sequence."""
    ids = torch.tensor([list(prompt)])
    loop: Callable[..., Any] = model.generate
    result = loop(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new, eos_token_id=None, pad_token_id=0)
    return tuple(result[0, len(prompt) :].tolist())


def assert_all_mentioned(message: str, words: Iterable[str]) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in the message: {message}"


def assert_idle(llm: LLM) -> None:
    """Nothing runs, nothing waits, no block is held."""
    statistics = llm.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.cache.groups[0].num_in_use) == (0, 0, 0)
