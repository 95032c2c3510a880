from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pagedkv.errors import InvalidRequestError
from pagedkv.models import PROCESSOR_OPTIONS, build_processors
from pagedkv.testing.models import tiny_model

PROMPT = [5, 9, 11, 5, 9]
CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 5},
    {"min_length": 9},
    {"suppress_tokens": [3, 4, 5, 60]},
    {"begin_suppress_tokens": [7, 8]},
    {"bad_words_ids": [[9, 11], [20]]},
    {"sequence_bias": {(9, 11): -4.0, (33,): 2.0}},
    {"exponential_decay_length_penalty": (1, 1.5)},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "suppress_tokens": [50]},
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def _greedy(model: PreTrainedModel, options: dict[str, Any], *, num_new: int) -> list[int]:
    processors = build_processors(model, options, num_prompt_tokens=len(PROMPT))
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(num_new):
            scores = model(input_ids=ids).logits[:, -1].float()
            for processor in processors:
                scores = processor(ids, scores)
            token = scores.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if int(token) == 2:
                break
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("options", CASES, ids=["+".join(case) for case in CASES])
def test_greedy_tokens_with_processors_equal_generate(model: PreTrainedModel, options: dict[str, Any]) -> None:
    prompt = torch.tensor([PROMPT])
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, pad_token_id=0, **options)
    assert _greedy(model, options, num_new=12) == want[0, len(PROMPT) :].tolist()


def test_warpers_imply_sampling_and_come_in_the_order_of_transformers(model: PreTrainedModel) -> None:
    options = {"typical_p": 0.8, "temperature": 0.7, "epsilon_cutoff": 1e-3, "repetition_penalty": 1.2}
    names = [type(processor).__name__ for processor in build_processors(model, options)]
    assert names == ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper"]
    greedy = build_processors(model, {"do_sample": False, "repetition_penalty": 1.2})
    assert [type(processor).__name__ for processor in greedy] == names[:1]


def test_no_options_give_no_processors_whatever_the_model_defaults_to() -> None:
    model = tiny_model("llama")
    model.generation_config.repetition_penalty = 1.5
    assert build_processors(model, {}) == []


def test_prefix_function_constrains_tokens(model: PreTrainedModel) -> None:
    (processor,) = build_processors(model, {"prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1]) + 1]})
    scores = processor(torch.tensor([PROMPT]), torch.zeros(1, 97))
    assert torch.nonzero(scores.isfinite()).tolist() == [[0, 10]]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"max_new_tokens": 3}, {"temprature": 1.0}, {"repetition_penalty": -1.0}])
def test_unknown_options_and_bad_values_are_refused(model: PreTrainedModel, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        build_processors(model, options)
    assert "num_beams" not in PROCESSOR_OPTIONS
