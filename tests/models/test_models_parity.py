from __future__ import annotations

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens

from pagedkv.attention import Mask
from pagedkv.models import ModelRunner
from pagedkv.testing.models import TINY_MODELS, WINDOW, randomised, tiny_config, tiny_model

LENS = (17, 33, 6, 25)
SLIDING = ("mistral", "gemma2", "gemma3", "gpt_oss")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_paged_logits_ragged_chunked_and_decoding_equal_the_plain_forward(name: str, backend: str) -> None:
    model = tiny_model(name)
    runner = ModelRunner(model, backend=backend, block_size=4)
    for seed, chunk in ((1, 1), (2, 5), (3, 40)):
        tokens = random_tokens(LENS, seed=seed)
        got = paged_logits(runner, tokens, mixed_schedule(LENS, chunk=chunk, num_decodes=4), seed=seed)
        assert got[0].dtype == torch.float32
        assert_close(got, plain_logits(model, tokens), relative=1e-4, what=f"{name}, {backend}, chunk {chunk}, seed {seed}")


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_paged_logits_equal_the_plain_forward_for_every_block_size(name: str, block_size: int) -> None:
    model = tiny_model(name, seed=3)
    runner = ModelRunner(model, block_size=block_size)
    tokens = random_tokens(LENS, seed=4)
    got = paged_logits(runner, tokens, mixed_schedule(LENS, chunk=7, num_decodes=2))
    assert_close(got, plain_logits(model, tokens), relative=1e-4, what=f"{name}, block size {block_size}, seed 4")


@pytest.mark.parametrize("name", SLIDING)
def test_self_check_crosses_small_windows_and_says_so(name: str) -> None:
    report = ModelRunner(tiny_model(name), block_size=4).report
    assert report.windows == (Mask.sliding(WINDOW),)
    assert report.windows_not_crossed == ()
    assert max(report.sequence_lens) > WINDOW
    assert 0 <= report.max_relative_error < report.bound == 1e-3


def test_self_check_names_windows_that_it_did_not_cross() -> None:
    report = ModelRunner(tiny_model("mistral", sliding_window=128), block_size=4).report
    assert report.windows == ()
    assert report.windows_not_crossed == (Mask.sliding(128),)


def test_chunked_attention_is_run_exactly() -> None:
    from transformers import AutoConfig

    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("llama4_text", **shape, **heads, attention_chunk_size=8, no_rope_layers=[1, 0])
    model = randomised(config)
    runner = ModelRunner(model, block_size=4)
    assert Mask.chunked(8) in runner.report.windows
    tokens = random_tokens(LENS, seed=5)
    got = paged_logits(runner, tokens, mixed_schedule(LENS, chunk=5, num_decodes=3))
    assert_close(got, plain_logits(model, tokens), relative=1e-4, what="llama4_text, seed 5")


def test_only_the_rows_asked_for_are_returned_and_none_may_be() -> None:
    import dataclasses

    import numpy as np

    from pagedkv.storage import BatchBuilder
    from pagedkv.testing.plans import make_plan

    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4)
    (tokens,) = random_tokens((9,), seed=6)
    plan = make_plan([9], [9], block_tables=[[3, 1, 2]], block_size=4, token_ids=tokens.numpy())
    want = plain_logits(model, [tokens])[0]
    for rows in ([8], [0, 5], []):
        batch = BatchBuilder("cpu", 4).build(dataclasses.replace(plan, logits_indices=np.array(rows, dtype=np.int64)))
        got = runner.forward(batch, runner.new_storage(4))
        assert got.shape == (len(rows), 97)
        assert torch.allclose(got, want[rows], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass_their_self_check(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    runner = ModelRunner(model, block_size=4)
    assert runner.dtype == dtype
    assert runner.report.argmax_agreement >= 0.75


def test_runner_states_the_limits_of_its_model() -> None:
    runner = ModelRunner(tiny_model("gpt2"), block_size=4)
    assert (runner.vocab_size, runner.num_token_ids, runner.max_positions, runner.eos_token_ids) == (97, 97, 256, (2,))
    assert runner.backend_name == runner.report.backend
    assert runner.device == torch.device("cpu")
    assert tiny_config("gpt2").n_positions == 256
    assert [layer.num_kv_heads for layer in runner.layers] == [4, 4]
