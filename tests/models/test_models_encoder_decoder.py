"""Which encoder-decoders are run and how, what they take, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_models import alone, pair_model, random_prompts
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, PreTrainedModel

from pagedkv import LLM, ModelRunner, SamplingParams, plan_memory
from pagedkv.core import KVCacheManager
from pagedkv.errors import ConfigError, InvalidRequestError, InvariantError, UnsupportedModelError
from pagedkv.models import load_model
from pagedkv.plan import StepPlan
from pagedkv.storage import BatchBuilder, Source
from pagedkv.testing.architectures import encoder_decoder_architectures, shrunk_config, shrunk_seq2seq_model
from pagedkv.testing.models import tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


@pytest.fixture(scope="module")
def t5() -> PreTrainedModel:
    return pair_model("t5")


def test_learned_positions_are_read_for_each_row_at_its_own() -> None:
    model = pair_model("bart")
    runner = ModelRunner(model, block_size=4)
    assert (runner.tier.name, dict(runner.tier.rejected), runner.backend_name) == ("encoder-decoder", {}, "own")
    assert "forward" not in vars(model.model.decoder.embed_positions)
    assert runner.encoder is not None
    assert (runner.encoder.max_source_tokens, runner.encoder.max_decoder_tokens, runner.max_positions) == (128, 128, 256)
    assert runner.encoder.start_token_id == 2


def test_positions_that_no_table_holds_are_counted_for_rows_of_one_length() -> None:
    # M2M100 makes its positions from tokens, without a lookup in a table.
    runner = ModelRunner(shrunk_seq2seq_model("m2m_100"), block_size=4)
    assert runner.tier.name == "encoder-decoder-equal"
    assert "self-check failed" in runner.tier.rejected["encoder-decoder"]


def test_memory_of_both_parts_is_told_before_anything_is_allocated(t5: PreTrainedModel) -> None:
    for source in (t5, t5.config):
        plan = plan_memory(source, block_size=4, memory_bytes=2**16, max_model_len=40)
        # 2 layers with 4 heads of 8 numbers, K and V; a slot holds either kind.
        assert plan.nbytes_per_token == plan.nbytes_per_source_token == 2 * 2 * 4 * 8 * 4
        assert (plan.nbytes_per_block, plan.num_blocks, plan.nbytes_per_sequence) == (4 * 512, 32, 40 * 512)
        assert "512 B per token of the decoder, 512 B per token of the encoder, 2.0 KiB per block of 4" in str(plan)
    runner = ModelRunner(t5, block_size=4)
    assert runner.group_nbytes == (plan.nbytes_per_block,)
    assert runner.encoder is not None
    assert (runner.encoder.nbytes_per_token, runner.encoder.nbytes_per_source_token, runner.max_positions) == (512, 512, None)


def test_decoder_may_have_another_number_of_layers_than_the_encoder() -> None:
    runner = ModelRunner(pair_model("bart", encoder_layers=1, decoder_layers=3), block_size=4)
    assert len(runner.layers) == 3
    assert len(ModelRunner(pair_model("t5", num_layers=1, num_decoder_layers=3), block_size=4).layers) == 3


def test_generate_takes_the_prompts_for_the_encoder(t5: PreTrainedModel) -> None:
    prompts = random_prompts(9, 4, 17, seed=1)
    with LLM(t5, block_size=4, check="audit") as llm:
        for output, prompt in zip(llm.generate(prompts, GREEDY, use_tqdm=False), prompts, strict=True):
            assert output.outputs[0].token_ids == alone(t5, prompt, 7)
        assert llm.engine.max_model_len == 4096
        assert llm.engine.num_blocks_in_use == 0
        heard: list[int] = []

        class Streamer:
            def put(self, value: torch.Tensor) -> None:
                heard.extend(value.tolist())

            def end(self) -> None:
                heard.append(-1)

        llm.generate(prompts[0], GREEDY, use_tqdm=False, streamer=Streamer())
        assert heard == [0, *alone(t5, prompts[0], 7), -1]  # what generate() itself would put
        with pytest.raises(UnsupportedModelError, match="encoder-decoder model: hidden states"):
            llm.embed(prompts, use_tqdm=False)


def test_step_takes_an_input_with_its_first_token_and_keeps_it_until_all_is_stored(t5: PreTrainedModel) -> None:
    runner = ModelRunner(t5, block_size=4)
    (tokens,) = random_prompts(13, seed=6)
    known = np.array([*tokens, 0], dtype=np.int32)  # and what the decoder begins with
    source = Source(known[:-1])
    storage, manager = runner.new_storage(9), KVCacheManager(num_blocks=9, block_size=4)
    builder = BatchBuilder("cpu", 4)
    seqs = manager.open([known]).seqs
    with pytest.raises(InvariantError, match="0 sources are known of 1 sequences"):
        runner.forward(builder.build(plan_of(manager, seqs, 5)), storage)
    manager.cancel(seqs)
    for count, is_kept in ((5, True), (7, True), (2, False)):  # the last with the token of the decoder
        logits = runner.forward(builder.build(plan_of(manager, seqs, count), [source]), storage)
        assert (source.unstored is not None) == is_kept
        assert len(logits) == (not is_kept)
        manager.complete(seqs)
    assert int(logits.argmax()) == alone(t5, tokens, 1)[0]
    storage.close()


def plan_of(manager: KVCacheManager, seqs: Any, count: int) -> StepPlan:
    """The next tokens of one sequence; logits where they are its last."""
    slots, table, (row,) = manager.extend(seqs, [count]).slot_mapping, manager.table, manager.rows_of(seqs).tolist()
    end, known = int(table.num_reserved[row]), int(table.num_tokens[row])
    last = np.arange(count - 1, count) if end == known else np.zeros(0, dtype=np.int64)
    return StepPlan(
        step=0,
        seqs=seqs,
        rows=np.array([row]),
        token_ids=table.token_ids[row, end - count : end],
        positions=np.arange(end - count, end, dtype=np.int32),
        query_lens=np.array([count], dtype=np.int32),
        seq_lens=np.array([end], dtype=np.int32),
        cu_seqlens_q=np.array([0, count], dtype=np.int32),
        slot_mapping=slots,
        block_tables=table.block_tables,
        copies=(np.zeros((0, 2), dtype=np.int32),),
        num_decodes=0,
        logits_indices=last,
        sampling_seqs=np.arange(len(last)),
        sampling_logits=np.arange(len(last)),
    )


def test_model_is_loaded_from_a_folder_as_what_it_is(t5: PreTrainedModel, tmp_path: Path) -> None:
    t5.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(t5)
    (prompt,) = random_prompts(9, seed=2)
    with LLM(tmp_path, block_size=4) as llm:
        assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == alone(t5, prompt, 7)


@pytest.mark.parametrize("options", [{"pack_linears": True}, {"fuse": False}], ids=str)
def test_repacked_weights_and_fused_parts_change_no_token(t5: PreTrainedModel, options: dict[str, Any]) -> None:
    prompts = random_prompts(9, 14, seed=3)
    with LLM(t5, block_size=4, **options) as llm:
        assert bool(llm.runner.packing.packed) == ("pack_linears" in options)
        assert [one.outputs[0].token_ids for one in llm.generate(prompts, GREEDY, use_tqdm=False)] == [alone(t5, one, 7) for one in prompts]


def test_half_precision_is_judged_on_a_float32_copy() -> None:
    runner = ModelRunner(pair_model("t5").to(torch.bfloat16), block_size=4)
    assert runner.report.copy is not None
    assert runner.report.copy.max_relative_error < 1e-4


def test_model_without_a_token_to_begin_with_needs_one_in_the_prompt() -> None:
    model = pair_model("t5", decoder_start_token_id=None, bos_token_id=None)
    (prompt,) = random_prompts(9, seed=4)
    with LLM(model, block_size=4) as llm:
        with pytest.raises(InvalidRequestError, match="decoder_prompt_token_ids"):
            llm.generate(prompt, use_tqdm=False)
        begins = {"prompt_token_ids": prompt, "decoder_prompt_token_ids": [0]}
        assert llm.generate(begins, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == alone(model, prompt, 7, decoder_start_token_id=0)


def test_model_whose_encoder_reads_no_tokens_is_refused() -> None:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), 2
    )
    config = AutoConfig.for_model(
        "whisper", vocab_size=97, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, decoder_start_token_id=1, **sizes
    )
    model = AutoModelForSpeechSeq2Seq.from_config(config).eval()
    for refuse in (ModelRunner, plan_memory, LLM):
        with pytest.raises(UnsupportedModelError, match="images or sound"):
            refuse(model)
    with pytest.raises(UnsupportedModelError, match="images or sound"):
        plan_memory(config)


def test_model_that_its_own_forward_changes_is_refused() -> None:
    # Its encoder turns to full attention for good when an input is short.
    with pytest.raises(UnsupportedModelError, match="exchange modules of it for good"):
        ModelRunner(shrunk_seq2seq_model("bigbird_pegasus"), block_size=4)


def test_tiers_of_other_models_and_named_backends_are_refused_by_name(t5: PreTrainedModel) -> None:
    for tier in ("packed", "dense", "dense-equal"):
        with pytest.raises(ConfigError, match="encoder-decoder"):
            ModelRunner(t5, tier=tier)
    with pytest.raises(ConfigError, match="no encoder-decoder"):
        ModelRunner(tiny_model("llama"), tier="encoder-decoder")
    with pytest.raises(ConfigError, match="leave the backend"):
        ModelRunner(t5, backend="torch")
    with LLM(tiny_model("llama"), block_size=4) as llm, pytest.raises(InvalidRequestError, match="no encoder"):
        llm.generate({"prompt_token_ids": [5], "decoder_prompt_token_ids": [5]}, use_tqdm=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", encoder_decoder_architectures())
def test_every_architecture_is_right_or_refused(name: str) -> None:
    if not shrunk_config(name, is_decoder=False).is_encoder_decoder:
        pytest.skip("a decoder that hears, on text")
    try:
        model = shrunk_seq2seq_model(name)
        runner = ModelRunner(model, block_size=4)
    except UnsupportedModelError:
        return
    prompts = random_prompts(9, 14, 5, seed=5)
    with LLM(model, block_size=4, max_num_batched_tokens=6, check="audit") as llm:
        assert llm.runner.tier.name == runner.tier.name
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert got == [alone(model, prompt, 7) for prompt in prompts]
