from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from pagedkv.attention import AttendOptions, AttentionSpec, StepAttention
from pagedkv.attention.reference import ReferenceBackend
from pagedkv.errors import UnsupportedBackendError, UnsupportedModelError
from pagedkv.models import ModelRunner, plan_memory
from pagedkv.storage import LayerPool
from pagedkv.testing.models import randomised, tiny_config, tiny_model

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("openai-gpt", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "no cache"),
    ("doge", BASE, "keep_window_size"),
]


@pytest.mark.parametrize(("model_type", "arguments", "reason"), REFUSED, ids=[entry[0] for entry in REFUSED])
def test_model_that_cannot_be_run_exactly_is_refused_with_its_reason(model_type: str, arguments: dict[str, Any], reason: str) -> None:
    model = randomised(AutoConfig.for_model(model_type, **arguments))
    with pytest.raises(UnsupportedModelError, match=reason):
        ModelRunner(model, block_size=4)
    with pytest.raises(UnsupportedModelError):
        plan_memory(AutoConfig.for_model(model_type, **arguments))


def test_model_that_counts_positions_its_own_way_is_refused_because_transformers_has_two_answers() -> None:
    model = randomised(AutoConfig.for_model("roberta", **{**BASE, "is_decoder": True}))
    with pytest.raises(UnsupportedModelError, match=r"With position_ids 0, 1, \.\.\., which generate\(\) gives it"):
        ModelRunner(model, block_size=4)


def test_objects_that_are_no_causal_language_model_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not a transformers PreTrainedModel"):
        ModelRunner(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no causal language model head"):
        ModelRunner(tiny_model("llama").model)
    classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama")).eval()
    with pytest.raises(UnsupportedModelError, match="no causal language model head"):
        ModelRunner(classifier)


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"training mode.*eval"):
        ModelRunner(tiny_model("llama").train())


def test_model_on_several_devices_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta"):
        ModelRunner(model)


def test_model_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no weights"):
        ModelRunner(tiny_model("llama").to("meta"))


class _Shy(ReferenceBackend):
    """Runs no soft cap."""

    @property
    def name(self) -> str:
        return "shy"

    def supports(self, spec: AttentionSpec) -> str | None:
        return "no soft cap here" if spec.softcap is not None else None


class _Wrong(ReferenceBackend):
    """Ignores the mask."""

    @property
    def name(self) -> str:
        return "wrong"

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        from pagedkv.attention import Mask

        return super().attend(query, pool, step, AttendOptions(mask=Mask.causal(), scale=options.scale))


class _Dropping(ReferenceBackend):
    """Forgets every write, so that it reads poison."""

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        pass


class _Careless(ReferenceBackend):
    """Gives one row of NaN, in half precision and in steps of decodes alone."""

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        output = super().attend(query, pool, step, options)
        if query.dtype == torch.bfloat16 and len(query) == 2:
            output[1] = float("nan")
        return output


def test_backend_that_declines_a_layer_is_named_with_its_reason() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"'shy'.*no soft cap here"):
        ModelRunner(tiny_model("gemma2"), backend=_Shy())
    assert ModelRunner(tiny_model("llama"), backend=_Shy()).backend_name == "shy"


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_self_check_finds_a_wrong_mask_and_gives_the_figures(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"self-check failed.*of the largest logit.*'wrong' attention"):
        ModelRunner(tiny_model(name), backend=_Wrong(), block_size=4)


def test_self_check_finds_k_and_v_that_were_never_written() -> None:
    with pytest.raises(UnsupportedModelError, match="self-check failed"):
        ModelRunner(tiny_model("llama"), backend=_Dropping(), block_size=4)


def test_self_check_takes_no_nan_for_a_rounding() -> None:
    with pytest.raises(UnsupportedModelError, match=r"self-check failed.*by nan"):
        ModelRunner(tiny_model("llama").to(torch.bfloat16), backend=_Careless(), block_size=4)


def test_self_check_of_a_model_that_gives_nan_says_so() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UnsupportedModelError, match="NaN"):
        ModelRunner(model, block_size=4)
