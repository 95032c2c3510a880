"""What neither settings nor an engine nor an LLM take. Afterwards the same object gives a healthy request the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from malformed_support import Case, Unprintable, named, table

from pagedkv import LLM, Engine, EngineConfig, ModelRunner, SamplingParams, plan_memory
from pagedkv.errors import (
    ConfigError,
    InvalidRequestError,
    RequestTooLargeError,
    UnsupportedBackendError,
    UnsupportedModelError,
)
from pagedkv.testing.models import tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"num_blocks": 9, **options})


VALUES = table(
    *(
        (f"{name} is {value!r}", ConfigError, name, lambda _, n=name, v=value: config(**{n: v}))
        for name, values in {
            "num_blocks": (0, -1, 2**31, 1.5, "9", None, True),
            "max_num_seqs": (0, 1.0, "a", None, True),
            "max_num_batched_tokens": (0, 2.0, "a", None),
            "max_model_len": (1, 2.5, "a", True),
            "enable_prefix_caching": (1, "yes", None),
            "seed": (1.5, "a", None, 2**64),
            "check": ("all", 5, None),
            "watermark": (1, -0.1, float("nan"), float("inf"), "a", None),
        }.items()
        for value in values
    ),
    *(
        (f"sampling {name} is {value!r}", InvalidRequestError, name, lambda _, n=name, v=value: SamplingParams(**{n: v}))
        for name, values in {
            "temperature": (-1, float("nan"), float("inf"), "hot", None, True),
            "top_k": (-2, 1.5, "a", True),
            "top_p": (0, 1.1, float("nan"), None),
            "min_p": (-0.1, 2, "a"),
            "n": (0, 1.5, None, True),
            "max_tokens": (0, -5, 1.5, "a", True),
            "min_tokens": (-1, None, 17),
            "seed": (-2, 2**64, 1.5, "a"),
            "logprobs": (-2, 1.5, True),
            "stop": ("", [""], [5], 5, b"a"),
            "stop_token_ids": (5, "a", [-1], [1.5], [True], [2**31]),
            "allowed_token_ids": ([], [None]),
            "logit_bias": ([1], {1: "a"}, {-1: 1.0}, {1: float("inf")}, {1.5: 1.0}),
            "bad_words_token_ids": ([[]], [1], "a"),
            "ignore_eos": (1, None),
            "generation_kwargs": ([], {1: 2}, {"top_k": 5}, None),
        }.items()
        for value in values
    ),
)


@named(VALUES)
def test_value_that_cannot_be_is_refused_by_name(case: Case) -> None:
    case.hold(None)


PROMPTS: list[tuple[str, object, str]] = [
    ("None", None, "prompt_token_ids must be"),
    ("a number", 5, "prompt_token_ids must be"),
    ("nothing", [], "the prompt is empty"),
    ("a float", [5.5], "prompt_token_ids must be"),
    ("bools", [True], "prompt_token_ids must be"),
    ("a bool among them", [5, True], "prompt_token_ids must be"),
    ("texts", ["a"], "prompt_token_ids must be"),
    ("lists", [[5]], "prompt_token_ids must be"),
    ("ragged lists", [[5], [5, 6]], "prompt_token_ids must be"),
    ("negative", [5, -1], "token id -1"),
    ("beyond the vocabulary", [97], "token id 97 is not from 0 to 96"),
    ("beyond int64", [2**70], "prompt_token_ids must be"),
    ("too long", [5] * 16, "max_model_len is 16"),
    ("an unprintable object", Unprintable(), "Unprintable"),
    ("text without a tokenizer", "hello", "there is no tokenizer"),
    ("an empty dict", {}, "exactly one of prompt, prompt_token_ids, prompt_embeds"),
    ("a dict of both", {"prompt": "a", "prompt_token_ids": [5]}, "exactly one"),
    ("a dict with prompt None", {"prompt": None}, "prompt is None"),
    ("a dict with prompt number", {"prompt": 5}, "prompt is 5"),
    ("a dict with ids None", {"prompt_token_ids": None}, "prompt_token_ids must be"),
    ("a dict of unknown fields", {"prompt_token_ids": [5], "salt": "a"}, "prompt fields salt are unknown"),
    ("a dict of mixed fields", {"prompt_token_ids": [5], 3: 1, "b": 2}, "prompt fields 3, b are unknown"),
    ("salt number", {"prompt_token_ids": [5], "cache_salt": 5}, "cache_salt is 5"),
    ("salt None", {"prompt_token_ids": [5], "cache_salt": None}, "cache_salt is None"),
    ("salt bytes", {"prompt_token_ids": [5], "cache_salt": b"a"}, "cache_salt is b'a'"),
    ("priority text", {"prompt_token_ids": [5], "priority": "high"}, "priority is 'high'"),
    ("priority float", {"prompt_token_ids": [5], "priority": 1.5}, "priority is 1.5"),
    ("priority bool", {"prompt_token_ids": [5], "priority": True}, "priority is True"),
]

ENGINE = table(
    *(
        (f"prompt is {name}", InvalidRequestError, words, lambda e, v=value: e.add_request("x", v, GREEDY))
        for name, value, words in PROMPTS
    ),
    *((f"id is {v!r}", InvalidRequestError, "request id", lambda e, v=v: e.add_request(v, [5])) for v in (5, None, b"a", ["a"])),
    ("params a dict", InvalidRequestError, "sampling_params has a dict", lambda e: e.add_request("x", [5], {"n": 1})),
    ("params a number", InvalidRequestError, "sampling_params has a int", lambda e: e.add_request("x", [5], 5)),
    ("stream 1", InvalidRequestError, "stream is 1", lambda e: e.add_request("x", [5], stream=1)),
    ("priority float", InvalidRequestError, "priority is 0.5", lambda e: e.add_request("x", [5], priority=0.5)),
    ("stop without text", InvalidRequestError, "stop need text", lambda e: e.add_request("x", [5], SamplingParams(stop="a"))),
    ("token beyond", InvalidRequestError, "stop_token_ids is 97", lambda e: e.add_request("x", [5], SamplingParams(stop_token_ids=[97]))),
    ("bias beyond", InvalidRequestError, "logit_bias is 99", lambda e: e.add_request("x", [5], SamplingParams(logit_bias={99: 1}))),
    (
        "option unknown",
        InvalidRequestError,
        "nonsense",
        lambda e: e.add_request("x", [5], SamplingParams(generation_kwargs={"nonsense": 1})),
    ),
    ("n too wide", RequestTooLargeError, "lower n", lambda e: e.add_request("x", [5], SamplingParams(n=5))),
    *((f"abort {v!r}", InvalidRequestError, "request id", lambda e, v=v: e.abort(v)) for v in (5, None, [])),
    *((f"preempt {v!r}", InvalidRequestError, "request id", lambda e, v=v: e.preempt(v)) for v in (5, None, {})),
    *((f"explain {v!r}", InvalidRequestError, "request id", lambda e, v=v: e.explain(v)) for v in (5, None, [], "nobody")),
    *((f"sequence_of {v!r}", InvalidRequestError, "request", lambda e, v=v: e.sequence_of(v)) for v in (5, None, "nobody")),
    *((f"purge {v!r}", InvalidRequestError, "cache_salt", lambda e, v=v: e.purge_cache(v)) for v in (5, None, [])),
    ("fill with text", InvalidRequestError, "value is 'a'", lambda e: e.fill_free_blocks("a")),
    ("fill with None", InvalidRequestError, "value is None", lambda e: e.fill_free_blocks(None)),
    ("config None", ConfigError, "config is None", lambda e: Engine(e.runner, None)),  # type: ignore[arg-type]
    ("config dict", ConfigError, "config is {'num_blocks': 9}", lambda e: Engine(e.runner, {"num_blocks": 9})),  # type: ignore[arg-type]
    ("length beyond the model's", ConfigError, "max_model_len is 9999", lambda e: Engine(e.runner, config(max_model_len=9999))),
)


class Served(Engine):
    """An engine that shows its runner."""

    runner: Any = None


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    runner = ModelRunner(tiny_model("llama", num_hidden_layers=1), block_size=4)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def engine(runner: ModelRunner) -> Served:
    engine = Served(runner, config(max_num_seqs=4, max_model_len=16))
    engine.runner = runner
    return engine


def serve(engine: Engine) -> tuple[int, ...]:
    engine.add_request("healthy", [11, 23, 5, 42, 77], GREEDY)
    while True:
        for output in engine.step():
            if output.finished:
                assert not engine.has_unfinished
                return output.outputs[0].token_ids


@named(ENGINE)
def test_engine_with_malformed_input_serves_on(case: Case, engine: Served) -> None:
    want, before = serve(engine), engine.snapshot()
    case.hold(engine)
    assert engine.snapshot() == before
    assert not engine.has_unfinished
    engine.check()
    assert serve(engine) == want


LLMS = table(
    *(
        (f"prompt is {name}", InvalidRequestError, words, lambda llm, v=value: llm.generate([v, [5]], GREEDY))
        for name, value, words in PROMPTS
    ),
    ("prompts None", InvalidRequestError, "prompts is a NoneType", lambda llm: llm.generate(None)),
    ("prompts a number", InvalidRequestError, "prompts is a int", lambda llm: llm.generate(5)),
    ("prompts bytes", InvalidRequestError, "prompts is a bytes", lambda llm: llm.generate(b"abc")),
    ("prompts a set", InvalidRequestError, "prompts is a set", lambda llm: llm.generate({5})),
    ("prompts a scalar array", InvalidRequestError, "prompts is a ndarray", lambda llm: llm.generate(np.array(5))),
    ("no prompts", InvalidRequestError, "the list of prompts is empty", lambda llm: llm.generate([])),
    ("one bad of two", InvalidRequestError, "token id -1", lambda llm: llm.generate([[5], [-1]], GREEDY)),
    ("params of another number", InvalidRequestError, "2 sampling_params were given for 1", lambda llm: llm.generate([[5]], [GREEDY] * 2)),
    ("params text", InvalidRequestError, "sampling_params has a str", lambda llm: llm.generate([[5]], "greedy")),
    ("use_tqdm text", InvalidRequestError, "use_tqdm is 'no'", lambda llm: llm.generate([[5]], GREEDY, use_tqdm="no")),
    ("streamer text", InvalidRequestError, "streamer is 's'", lambda llm: llm.generate([[5]], GREEDY, streamer="s")),
    ("stream None", InvalidRequestError, "prompts is a NoneType", lambda llm: llm.stream(None)),
    ("stream of a float", InvalidRequestError, "prompt_token_ids must be", lambda llm: llm.stream([[1.5]])),
    ("chat without a tokenizer", InvalidRequestError, "chat needs a tokenizer", lambda llm: llm.chat([{"role": "user", "content": "a"}])),
)


class Asked(LLM):
    """An LLM that knows what a healthy request gave before anything was asked of it."""

    want: tuple[int, ...]


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    with Asked(tiny_model("llama", num_hidden_layers=1), block_size=4, num_blocks=9, max_model_len=16) as llm:
        llm.want = answer(llm, [11, 23, 5, 42, 77])
        yield llm


def answer(llm: LLM, prompt: Any) -> tuple[int, ...]:
    return llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@named(LLMS)
def test_llm_with_malformed_input_serves_on(case: Case, asked: Asked) -> None:
    case.hold(asked)
    asked.engine.check()
    assert asked.statistics().cache.groups[0].num_in_use == 0
    assert answer(asked, [11, 23, 5, 42, 77]) == asked.want


CONSTRUCTED = table(
    *(
        (f"{name} is {value!r}", error, words, lambda llm, n=name, v=value: LLM(llm.runner.model, **{n: v}))
        for name, error, words, values in (
            ("block_size", ConfigError, "block_size", (0, 1.5, "16", None, True)),
            ("num_blocks", ConfigError, "num_blocks", (1, 2**31, 1.5, "9", True)),
            ("kv_cache_memory_bytes", ConfigError, "kv_cache_memory_bytes", (0, -1, 1.5, "1G", True)),
            ("memory_share", ConfigError, "memory_share", (0, 1.1, float("nan"), "half", None, True)),
            ("max_num_seqs", ConfigError, "max_num_seqs", (0, 1.5, None)),
            ("max_num_batched_tokens", ConfigError, "max_num_batched_tokens", (0, "a")),
            ("max_model_len", ConfigError, "max_model_len", (0, 2.5, "a", 10**6)),
            ("enable_prefix_caching", ConfigError, "enable_prefix_caching", (1, None)),
            ("scheduling_policy", ConfigError, "scheduling_policy", ("lifo", 5, None)),
            ("attention_backend", UnsupportedBackendError, "attention backend 'nonsense' is unknown", ("nonsense",)),
            ("attention_backend", UnsupportedBackendError, "5 is neither a name nor", (5,)),
            ("dtype", ConfigError, "dtype", ("int8", 5, torch.int32)),
            ("device", ConfigError, "device", ("nonsense", 1.5, "meta")),
            ("seed", ConfigError, "seed", (1.5, "a", None)),
            ("pack_linears", ConfigError, "pack_linears", ("always",)),
            ("tokenizer", ConfigError, "tokenizer", (5, ["a"])),
        )
        for value in values
    ),
    ("model None", UnsupportedModelError, "NoneType is neither a name", lambda _: LLM(None)),  # type: ignore[arg-type]
    ("model number", UnsupportedModelError, "int is neither a name", lambda _: LLM(5)),  # type: ignore[arg-type]
    ("model a module", UnsupportedModelError, "Linear is neither a name", lambda _: LLM(torch.nn.Linear(2, 2))),  # type: ignore[arg-type]
    ("runner of a text", UnsupportedModelError, "str is not a transformers", lambda _: ModelRunner("model")),  # type: ignore[arg-type]
    ("plan_memory of None", UnsupportedModelError, "NoneType is not", lambda _: plan_memory(None)),  # type: ignore[arg-type]
    *(
        (f"plan_memory {name} {value!r}", ConfigError, name, lambda llm, n=name, v=value: plan_memory(llm.runner.model, **{n: v}))
        for name, values in {
            "block_size": (0, 1.5, "a", None, True),
            "memory_bytes": (0, 1.5, "1G"),
            "max_model_len": (0, 1.5),
            "dtype": ("int8", 5),
        }.items()
        for value in values
    ),
)


@named(CONSTRUCTED)
def test_llm_with_a_setting_that_cannot_work_is_refused_by_name(case: Case, asked: Asked) -> None:
    case.hold(asked)


CHATS = table(
    ("messages None", InvalidRequestError, "messages is None", lambda llm: llm.chat(None)),
    ("messages a text", InvalidRequestError, "messages is 'hi'", lambda llm: llm.chat("hi")),
    ("messages texts", InvalidRequestError, "a conversation is 'hi'", lambda llm: llm.chat(["hi"])),
    ("no message", InvalidRequestError, "a conversation is empty", lambda llm: llm.chat([[]])),
    ("nothing", InvalidRequestError, "the list of prompts is empty", lambda llm: llm.chat([])),
    ("a message of numbers", InvalidRequestError, "a message is 5", lambda llm: llm.chat([[5]])),
    (
        "a message with an image",
        InvalidRequestError,
        "content of type 'image_url'",
        lambda llm: llm.chat(
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}]
        ),
    ),
    ("a message without a role", InvalidRequestError, "a message is {'content': 'a'}", lambda llm: llm.chat([{"content": "a"}])),
    ("a lone surrogate", InvalidRequestError, "no text that can be encoded", lambda llm: llm.generate("\ud800")),
)


@named(CHATS)
def test_chat_with_malformed_messages_serves_on(case: Case, llm: LLM) -> None:
    want = answer(llm, "one two")
    case.hold(llm)
    llm.engine.check()
    assert answer(llm, "one two") == want
