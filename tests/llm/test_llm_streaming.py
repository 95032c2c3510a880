"""Streams: growing outputs, leaving early, several at once, and transformers' streamer."""

from __future__ import annotations

import gc

import pytest
from llm_support import TEXTS, assert_idle, generate, greedy, make_llm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from pagedkv import LLM, SamplingParams
from pagedkv.errors import ClosedError, InvalidRequestError


def test_stream_grows_token_by_token_to_what_generate_gives(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    last: dict[str, tuple[tuple[int, ...], str]] = {}
    ended = []
    for output in llm.stream(TEXTS, greedy(6)):
        (completion,) = output.outputs
        tokens, text = last.get(output.request_id, ((), ""))
        assert completion.token_ids[: len(tokens)] == tokens
        assert len(completion.token_ids) == len(tokens) + 1
        assert completion.text.startswith(text), "what was shown is never taken back"
        assert output.finished == (len(completion.token_ids) == 6)
        if not output.finished:
            assert not completion.text.endswith("\ufffd"), "half a character was shown"
        last[output.request_id] = completion.token_ids, completion.text
        ended += [output] if output.finished else []
    assert len(ended) == len(TEXTS)
    for output in ended:
        want = generate(model, tokenizer.encode(output.prompt or ""), 6)
        assert output.outputs[0].token_ids == want
        assert output.outputs[0].text == tokenizer.decode(want, skip_special_tokens=True)
    assert_idle(llm)


def test_stream_left_early_ends_its_requests_and_returns_their_blocks(llm: LLM, model: PreTrainedModel) -> None:
    for output in llm.stream(TEXTS, greedy(9)):
        if len(output.outputs[0].token_ids) == 2:
            break
    gc.collect()
    assert_idle(llm)
    stream = llm.stream(TEXTS, greedy(9))
    next(stream)
    assert llm.statistics().num_running == len(TEXTS)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm)
    (output,) = llm.generate([[9, 8, 7]], greedy(), use_tqdm=False)
    assert output.outputs[0].token_ids == generate(model, [9, 8, 7])


def test_stream_that_was_never_begun_submits_nothing(llm: LLM) -> None:
    llm.stream(TEXTS, greedy())
    gc.collect()
    assert_idle(llm)
    assert not llm.engine.has_unfinished


def test_stream_checks_its_arguments_before_the_first_output_is_asked_for(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.stream([[5], []], greedy())


def test_outputs_of_a_stream_share_one_copy_of_the_prompt(llm: LLM) -> None:
    first, *others = llm.stream([[5, 6, 7, 8]], greedy(4))
    assert first.prompt_token_ids == (5, 6, 7, 8)
    assert [output.prompt_token_ids is first.prompt_token_ids for output in others] == [True] * 3


def test_streams_in_turns_each_get_their_own_outputs(llm: LLM, model: PreTrainedModel) -> None:
    prompts = ([5, 6, 7, 8], [9, 10], [30, 31, 32])
    streams = [llm.stream([prompt], greedy(4 + index)) for index, prompt in enumerate(prompts)]
    got: list[list[int]] = [[] for _ in prompts]
    alive = set(range(len(prompts)))
    while alive:
        for index in sorted(alive):
            output = next(streams[index], None)
            if output is None:
                alive.discard(index)
                continue
            got[index].append(len(output.outputs[0].token_ids))
            assert output.prompt_token_ids == tuple(prompts[index])
            if output.finished:
                assert output.outputs[0].token_ids == generate(model, prompts[index], 4 + index)
    assert got == [[*range(1, 5)], [*range(1, 6)], [*range(1, 7)]]
    assert_idle(llm)


def test_generate_inside_of_a_stream_leaves_the_stream_whole(llm: LLM, model: PreTrainedModel) -> None:
    lengths = []
    for output in llm.stream([[5, 6, 7, 8]], greedy(5)):
        lengths.append(len(output.outputs[0].token_ids))
        (inner,) = llm.generate([[9, 10, len(lengths)]], greedy(7), use_tqdm=False)
        assert inner.outputs[0].token_ids == generate(model, [9, 10, len(lengths)], 7)
    assert lengths == [1, 2, 3, 4, 5]
    assert_idle(llm)


def test_stream_of_forks_delivers_all_samples_in_every_output(llm: LLM) -> None:
    outputs = list(llm.stream(TEXTS[0], SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)))
    assert [len(output.outputs) for output in outputs] == [3] * 5
    assert all(len(completion.token_ids) == count for count, output in enumerate(outputs, start=1) for completion in output.outputs)


def test_text_streamer_prints_what_the_output_says(
    llm: LLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (output,) = llm.generate(TEXTS[0], greedy(8), use_tqdm=False, streamer=streamer)
    assert capsys.readouterr().out == output.outputs[0].text + "\n"
    llm.generate(TEXTS[0], greedy(8), use_tqdm=False, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == TEXTS[0] + output.outputs[0].text + "\n"


def test_text_streamer_takes_one_prompt_and_one_sample(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextStreamer(tokenizer)
    with pytest.raises(InvalidRequestError, match="2 prompts"):
        llm.generate(TEXTS[:2], greedy(), streamer=streamer)
    with pytest.raises(InvalidRequestError, match="n=1"):
        llm.generate(TEXTS[0], SamplingParams(n=2), streamer=streamer)
    assert_idle(llm)


def test_closing_the_llm_ends_its_streams(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    llm = make_llm(model, tokenizer)
    stream = llm.stream(TEXTS, greedy(9))
    next(stream)
    llm.close()
    with pytest.raises(ClosedError):
        list(stream)
