"""Models that read images as well: their text part is served, images are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from pagedkv import LLM, SamplingParams, plan_memory
from pagedkv.errors import InvalidRequestError, UnsupportedModelError
from pagedkv.models import load_model

TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7, 8, 9, 10], [40, 41, 3]]


def llava() -> PreTrainedModel:
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**SEES), image_token_index=96)
    return LlavaForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    text = Gemma3TextConfig(**TEXT, **layers, head_dim=16, query_pre_attn_scalar=16)
    tokens = {"image_token_index": 96, "boi_token_index": 94, "eoi_token_index": 95, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**SEES), **tokens))


def qwen2_vl() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    sees = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    tokens = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=sees, **tokens))


def paligemma() -> PreTrainedModel:
    text, sees = GemmaConfig(**TEXT, head_dim=16), SiglipVisionConfig(**SEES, projection_dim=32)
    config = PaliGemmaConfig(text_config=text, vision_config=sees, image_token_index=96, projection_dim=32, hidden_size=32)
    return PaliGemmaForConditionalGeneration(config)


def with_weights(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def alone(model: Any) -> list[list[int]]:
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl])
def test_text_only_use_equals_generate_alone(make: Callable[[], PreTrainedModel]) -> None:
    model = with_weights(make)
    wanted = alone(model)
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with LLM(model, block_size=4, num_blocks=16, max_num_batched_tokens=8, check="audit") as llm:
        for _ in range(2):
            assert [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, greedy, use_tqdm=False)] == wanted
        assert len(llm.runner.layers) == 2, "the layers that see images store nothing"


def test_model_that_reads_the_prompt_in_both_directions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="PaliGemmaForConditionalGeneration cannot be run exactly"):
        LLM(with_weights(paligemma), block_size=4)


def test_images_are_refused_with_the_reason() -> None:
    prompt: Any = {"prompt_token_ids": [5, 96, 6], "multi_modal_data": {"image": torch.zeros(3, 28, 28)}}
    with (
        LLM(with_weights(llava), block_size=4, num_blocks=16) as llm,
        pytest.raises(InvalidRequestError, match="images, audio and video are"),
    ):
        llm.generate([prompt])


def test_folder_of_a_model_that_has_no_other_class_is_loaded_and_planned(tmp_path: Path) -> None:
    model = with_weights(llava)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model)
    assert alone(loaded) == alone(model)
    assert plan_memory(tmp_path, block_size=4) == plan_memory(model, block_size=4)
