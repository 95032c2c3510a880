"""Bad input: an error that names the value, the limit and the setting, and nothing else disturbed."""

from __future__ import annotations

from typing import Any

import pytest
from engine_support import PROMPTS, Prompt, assert_all_mentioned, greedy, new_engine, run_all, step

from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    PoolAllocationError,
    RequestTooLargeError,
    UnsupportedBackendError,
    UnsupportedModelError,
)
from pagedkv.models import ModelRunner
from pagedkv.sampling import SamplingParams
from pagedkv.testing.models import tiny_model

NAN = float("nan")

BAD_PROMPTS: list[tuple[object, type[InvalidRequestError], list[str]]] = [
    ([], InvalidRequestError, ["empty", "at least one token"]),
    ((), InvalidRequestError, ["empty"]),
    ([5, -1], InvalidRequestError, ["-1", "0 to 96", "vocabulary"]),
    ([5, 97], InvalidRequestError, ["97", "0 to 96", "vocabulary"]),
    ([5, 2**40], InvalidRequestError, [str(2**40), "0 to 96"]),
    ([1.5, 2.0], InvalidRequestError, ["1.5", "flat list of integers"]),
    ([[1, 2], [3]], InvalidRequestError, ["[[1, 2], [3]]", "flat list of integers"]),
    (None, InvalidRequestError, ["None", "flat list of integers"]),
    ([True, False], InvalidRequestError, ["True", "flat list of integers"]),
    ("a text", InvalidRequestError, ["text", "tokenizer"]),
    ([3] * 256, InvalidRequestError, ["256", "max_model_len"]),
    ([3] * 1000, InvalidRequestError, ["1000", "max_model_len", "256"]),
    ({"prompt_token_ids": [3], "cache_slat": "x"}, InvalidRequestError, ["cache_slat", "cache_salt"]),
    ({}, InvalidRequestError, ["exactly one", "prompt", "prompt_token_ids"]),
    ({"prompt": "x", "prompt_token_ids": [3]}, InvalidRequestError, ["exactly one"]),
    ({"prompt_token_ids": [3], "cache_salt": 7}, InvalidRequestError, ["cache_salt", "int"]),
    ({"prompt_token_ids": [3], "priority": 1.5}, InvalidRequestError, ["priority", "1.5", "integer"]),
    ({"prompt_token_ids": [3] * 200}, RequestTooLargeError, ["208", "tokens", "156", "num_blocks"]),
]

BAD_PARAMS: list[tuple[dict[str, Any], type[InvalidRequestError], list[str]]] = [
    ({"n": 9}, RequestTooLargeError, ["9", "8", "(n)", "max_num_seqs"]),
    ({"n": 8, "max_tokens": 100}, RequestTooLargeError, ["blocks", "39", "num_blocks", "max_tokens"]),
    ({"max_tokens": 160}, RequestTooLargeError, ["163", "156", "tokens", "max_tokens"]),
    ({"logprobs": 98}, InvalidRequestError, ["logprobs", "98", "97"]),
    ({"stop_token_ids": [97]}, InvalidRequestError, ["stop_token_ids", "97"]),
    ({"allowed_token_ids": [500]}, InvalidRequestError, ["allowed_token_ids", "500"]),
    ({"logit_bias": {99: 1.0}}, InvalidRequestError, ["logit_bias", "99"]),
    ({"bad_words_token_ids": [[5, 97]]}, InvalidRequestError, ["bad_words_token_ids", "97"]),
    ({"stop": ["x"]}, InvalidRequestError, ["stop", "tokenizer"]),
    ({"bad_words": ["x"]}, InvalidRequestError, ["bad_words", "tokenizer"]),
    ({"generation_kwargs": {"no_such_option": 1}}, InvalidRequestError, ["no_such_option"]),
    ({"generation_kwargs": {"sequence_bias": {}}}, InvalidRequestError, ["sequence_bias", "{}"]),
]

IMPOSSIBLE_PARAMS: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_tokens": 0}, ["max_tokens", "0", "at least 1"]),
    ({"max_tokens": -4}, ["max_tokens", "-4", "at least 1"]),
    ({"n": 0}, ["n is 0", "at least 1"]),
    ({"temperature": -0.1}, ["temperature", "-0.1", "at least 0"]),
    ({"temperature": NAN}, ["temperature", "nan"]),
    ({"temperature": float("inf")}, ["temperature", "inf", "finite"]),
    ({"top_p": 0.0}, ["top_p", "0.0", "(0, 1]"]),
    ({"top_p": 1.5}, ["top_p", "1.5", "(0, 1]"]),
    ({"top_p": NAN}, ["top_p", "nan"]),
    ({"min_p": -0.5}, ["min_p", "-0.5", "[0, 1]"]),
    ({"min_p": 2.0}, ["min_p", "2.0", "[0, 1]"]),
    ({"min_p": NAN}, ["min_p", "nan"]),
    ({"typical_p": 0}, ["typical_p", "0", "(0, 1]"]),
    ({"top_k": -2}, ["top_k", "-2"]),
    ({"repetition_penalty": 0.0}, ["repetition_penalty", "0.0", "above 0"]),
    ({"repetition_penalty": NAN}, ["repetition_penalty", "nan"]),
    ({"presence_penalty": 2.1}, ["presence_penalty", "2.1", "[-2, 2]"]),
    ({"frequency_penalty": -3}, ["frequency_penalty", "-3", "[-2, 2]"]),
    ({"frequency_penalty": NAN}, ["frequency_penalty", "nan"]),
    ({"min_tokens": 9, "max_tokens": 4}, ["min_tokens", "9", "max_tokens", "4"]),
    ({"seed": 2**64}, ["seed", str(2**64)]),
    ({"stop": [""]}, ["stop"]),
]

BAD_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_blocks": 1}, ["num_blocks", "1", "at least 2"]),
    ({"num_blocks": 0}, ["num_blocks", "0", "at least 2"]),
    ({"num_blocks": -5}, ["num_blocks", "-5"]),
    ({"num_blocks": 2.5}, ["num_blocks", "2.5", "integer"]),
    ({"num_blocks": 9, "max_num_seqs": 0}, ["max_num_seqs", "0", "at least 1"]),
    ({"num_blocks": 9, "max_num_batched_tokens": 0}, ["max_num_batched_tokens", "0", "at least 1"]),
    ({"num_blocks": 9, "max_model_len": 1}, ["max_model_len", "1", "at least 2"]),
    ({"num_blocks": 9, "max_model_len": 257}, ["max_model_len", "257", "256"]),
    ({"num_blocks": 9, "watermark": 1.0}, ["watermark", "1.0"]),
    ({"num_blocks": 9, "watermark": NAN}, ["watermark", "nan"]),
    ({"num_blocks": 9, "seed": "x"}, ["seed", "'x'", "integer"]),
]


def _short(value: object) -> str:
    return str(value)[:40]


@pytest.fixture
def busy(runner: ModelRunner) -> Engine:
    """39 usable blocks of 4 tokens, up to 8 sequences; one request has begun."""
    engine = new_engine(runner, 40, max_num_seqs=8)
    engine.add_request("neighbour", PROMPTS[0], greedy())
    step(engine)
    step(engine)
    return engine


def _assert_undisturbed(engine: Engine, references: dict[Prompt, tuple[int, ...]]) -> None:
    (output,) = run_all(engine).values()
    assert output.request_id == "neighbour"
    assert output.outputs[0].token_ids == references[PROMPTS[0]][:8]
    assert engine.statistics().cache.groups[0].num_in_use == 0


@pytest.mark.parametrize(("prompt", "kind", "words"), BAD_PROMPTS, ids=[_short(prompt) for prompt, _, _ in BAD_PROMPTS])
def test_add_request_with_a_bad_prompt_is_refused_and_nothing_is_disturbed(
    busy: Engine, references: dict[Prompt, tuple[int, ...]], prompt: Any, kind: type[InvalidRequestError], words: list[str]
) -> None:
    before = busy.statistics()
    with pytest.raises(kind) as caught:
        busy.add_request("bad", prompt, greedy())
    assert_all_mentioned(str(caught.value), words)
    assert type(caught.value) is kind
    assert busy.statistics() == before
    _assert_undisturbed(busy, references)


@pytest.mark.parametrize(("options", "kind", "words"), BAD_PARAMS, ids=[_short(options) for options, _, _ in BAD_PARAMS])
def test_add_request_with_parameters_for_another_model_is_refused_and_nothing_is_disturbed(
    busy: Engine, references: dict[Prompt, tuple[int, ...]], options: dict[str, Any], kind: type[InvalidRequestError], words: list[str]
) -> None:
    before = busy.statistics()
    with pytest.raises(kind) as caught:
        busy.add_request("bad", PROMPTS[1], SamplingParams(**options))
    assert_all_mentioned(str(caught.value), words)
    assert busy.statistics() == before
    _assert_undisturbed(busy, references)


@pytest.mark.parametrize(("options", "words"), IMPOSSIBLE_PARAMS, ids=[_short(options) for options, _ in IMPOSSIBLE_PARAMS])
def test_sampling_params_out_of_range_cannot_be_made(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**options)
    assert_all_mentioned(str(caught.value), [*words, "SamplingParams("])


def test_unknown_sampling_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        SamplingParams(no_such_option=1)  # type: ignore[call-arg]


def test_add_request_with_what_is_no_sampling_params_is_refused(busy: Engine, references: dict[Prompt, tuple[int, ...]]) -> None:
    with pytest.raises(InvalidRequestError, match=r"dict.*SamplingParams"):
        busy.add_request("bad", PROMPTS[1], {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"request id is 7"):
        busy.add_request(7, PROMPTS[1], greedy())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"priority is 'high'"):
        busy.add_request("bad", PROMPTS[1], greedy(), priority="high")  # type: ignore[arg-type]
    _assert_undisturbed(busy, references)


def test_add_request_with_an_id_in_use_is_refused_until_it_has_ended(busy: Engine, references: dict[Prompt, tuple[int, ...]]) -> None:
    with pytest.raises(DuplicateRequestError, match="'neighbour' is in use"):
        busy.add_request("neighbour", PROMPTS[1], greedy())
    _assert_undisturbed(busy, references)
    busy.add_request("neighbour", PROMPTS[1], greedy())
    assert run_all(busy)["neighbour"].outputs[0].token_ids == references[PROMPTS[1]][:8]


def test_abort_of_an_unknown_or_ended_request_does_nothing_and_says_so(busy: Engine, references: dict[Prompt, tuple[int, ...]]) -> None:
    before = busy.statistics()
    assert busy.abort("nobody") is False
    assert busy.preempt("nobody") is False
    assert busy.statistics() == before
    _assert_undisturbed(busy, references)
    assert busy.abort("neighbour") is False
    assert not busy.has_unfinished


def test_explain_of_an_unknown_request_is_refused(busy: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="'nobody' is not known"):
        busy.explain("nobody")


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS, ids=[_short(settings) for settings, _ in BAD_SETTINGS])
def test_engine_setting_that_cannot_work_is_refused(runner: ModelRunner, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(runner, EngineConfig(**settings))
    assert_all_mentioned(str(caught.value), words)


def test_pool_larger_than_the_machine_is_refused_with_its_size_and_nothing_is_kept(
    runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]
) -> None:
    with pytest.raises(PoolAllocationError) as caught:
        Engine(runner, EngineConfig(num_blocks=2**31 - 2, max_num_seqs=4))
    assert_all_mentioned(str(caught.value), ["bytes", str(2**31 - 2), "num_blocks"])
    engine = new_engine(runner)
    engine.add_request("after", PROMPTS[0], greedy())
    assert run_all(engine)["after"].outputs[0].token_ids == references[PROMPTS[0]][:8]


@pytest.mark.parametrize("block_size", [0, -4])
def test_block_size_below_one_is_refused(block_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelRunner(tiny_model("llama"), block_size=block_size)
    assert_all_mentioned(str(caught.value), ["block_size", str(block_size), "at least 1"])


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedBackendError) as caught:
        ModelRunner(tiny_model("llama"), backend="flash-attention-9")
    assert_all_mentioned(str(caught.value), ["flash-attention-9", "auto", "reference", "torch"])


def test_model_in_training_mode_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelRunner(tiny_model("llama").train())
    assert_all_mentioned(str(caught.value), ["training mode", "inference", "model.eval()"])


def test_parameters_in_a_list_of_one_are_those_of_the_request(runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    engine = new_engine(runner)
    engine.add_request("one", PROMPTS[0], [greedy(5)])  # type: ignore[arg-type]
    (output,) = run_all(engine).values()
    assert output.outputs[0].token_ids == references[PROMPTS[0]][:5]
