from __future__ import annotations

import pytest
from engine_support import PROMPTS, Prompt, generate
from transformers import PreTrainedModel

from pagedkv.models import ModelRunner
from pagedkv.testing.models import tiny_model
from pagedkv.testing.poison import PoisonBackend


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def runner(model: PreTrainedModel) -> ModelRunner:
    return ModelRunner(model, backend=PoisonBackend(), block_size=4)


@pytest.fixture(scope="session")
def references(model: PreTrainedModel) -> dict[Prompt, tuple[int, ...]]:
    return {prompt: generate(model, prompt, 16) for prompt in PROMPTS}
