from __future__ import annotations

from collections.abc import Iterator

import pytest
from llm_support import make_llm, make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pagedkv import LLM


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[LLM]:
    with make_llm(model, tokenizer, num_blocks=100) as llm:
        yield llm
