"""Prompts in, outputs out: every form of prompt, the order of results, chat, text, log-probabilities, salts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llm_support import TEXTS, assert_idle, generate, greedy, make_llm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pagedkv import LLM, SamplingParams


def test_texts_are_continued_as_generate_does_and_come_back_in_the_order_asked(
    llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = (9, 1, 5, 7, 3)  # so that they do not end in the order asked
    outputs = llm.generate(TEXTS, [greedy(length) for length in lengths], use_tqdm=False)
    assert [output.prompt for output in outputs] == list(TEXTS)
    for output, text, length in zip(outputs, TEXTS, lengths, strict=True):
        ids = tokenizer.encode(text)
        assert output.prompt_token_ids == tuple(ids)
        assert output.finished
        (completion,) = output.outputs
        assert completion.token_ids == generate(model, ids, length), text
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True), text
        assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
        assert completion.logprobs is None
    assert_idle(llm)


def test_every_form_of_prompt_gives_the_same_output(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(TEXTS[0])
    forms = [TEXTS[0], ids, tuple(ids), np.array(ids), {"prompt": TEXTS[0]}, {"prompt_token_ids": ids, "cache_salt": "x", "priority": 3}]
    outputs = llm.generate(forms, greedy(), use_tqdm=False)
    assert len({output.outputs[0].token_ids for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [TEXTS[0], None, None, None, TEXTS[0], None]
    for form in forms:  # one prompt that is not in a list
        (output,) = llm.generate(form, greedy(), use_tqdm=False)
        assert output.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_texts_of_one_call_are_encoded_once_each(llm: LLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = tokenizer.encode

    def count(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", count)
    llm.generate(TEXTS, greedy(2), use_tqdm=False)
    assert encoded == list(TEXTS)


def test_token_ids_go_in_and_out_without_a_tokenizer(model: PreTrainedModel) -> None:
    with make_llm(model, None) as llm:
        assert llm.tokenizer is None
        (output,) = llm.generate([[5, 6, 7]], greedy(logprobs=1), use_tqdm=False)
        assert output.outputs[0].token_ids == generate(model, [5, 6, 7])
        assert output.outputs[0].text == ""
        assert output.outputs[0].logprobs is not None
        assert all(entry.decoded_token is None for row in output.outputs[0].logprobs for entry in row.values())


def test_default_sampling_params_give_sixteen_tokens_at_most(llm: LLM) -> None:
    (output,) = llm.generate("one", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_progress_bar_shows_tokens_and_blocks(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(TEXTS, greedy(4))
    shown = capsys.readouterr().err
    assert "5/5" in shown or shown == ""  # tqdm says nothing where there is no terminal
    llm.generate(TEXTS, greedy(4), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_chat_goes_through_the_template(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}]
    (output,) = llm.chat(talk, greedy(), use_tqdm=False)
    text = "<|system|>be brief</s><|user|>one two</s><|assistant|>"
    assert output.prompt_token_ids == tuple(tokenizer.encode(text))
    (same,) = llm.generate(text, greedy(), use_tqdm=False)
    assert same.outputs[0].token_ids == output.outputs[0].token_ids
    several = llm.chat([talk, talk[1:]], greedy(), use_tqdm=False)
    assert [one.prompt_token_ids for one in several] == [
        output.prompt_token_ids,
        tuple(tokenizer.encode("<|user|>one two</s><|assistant|>")),
    ]
    (bare,) = llm.chat(talk, greedy(), use_tqdm=False, add_generation_prompt=False)
    assert bare.prompt_token_ids == output.prompt_token_ids[:-1]
    (other,) = llm.chat(talk, greedy(), use_tqdm=False, chat_template="{{ messages[-1]['content'] }}")
    assert other.prompt_token_ids == tuple(tokenizer.encode("one two"))


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_ends_the_text_and_is_its_reason(llm: LLM, tokenizer: PreTrainedTokenizerFast, include: bool) -> None:
    (free,) = llm.generate(TEXTS[2], greedy(16), use_tqdm=False)
    tokens = free.outputs[0].token_ids
    pieces = [tokenizer.decode([token]) for token in tokens]
    place = next(at for at in range(4, 16) if pieces[at].strip() and "\ufffd" not in pieces[at] and pieces[at] not in "".join(pieces[:at]))
    stop = pieces[place]
    (output,) = llm.generate(TEXTS[2], greedy(16, stop=["never in there", stop], include_stop_str_in_output=include), use_tqdm=False)
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == tokens[: place + 1]
    before = free.outputs[0].text[: free.outputs[0].text.index(stop)]
    assert completion.text == (before + stop if include else before)
    (last,) = llm.generate(TEXTS[2], greedy(place + 1, stop=[stop]), use_tqdm=False)
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", stop), "completed by the last token allowed"
    assert last.outputs[0].text == before
    (ignored,) = llm.generate(TEXTS[2], greedy(16, stop=[stop], min_tokens=16), use_tqdm=False)
    assert ignored.outputs[0].token_ids == tokens
    assert_idle(llm)


def test_stop_token_ends_the_text_and_is_not_part_of_it(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (free,) = llm.generate(TEXTS[0], greedy(12), use_tqdm=False)
    tokens = free.outputs[0].token_ids
    stop = tokens[6]
    first = tokens.index(stop)
    (output,) = llm.generate(TEXTS[0], greedy(12, stop_token_ids=[stop]), use_tqdm=False)
    assert output.outputs[0].token_ids == tokens[: first + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert output.outputs[0].text == tokenizer.decode(tokens[:first], skip_special_tokens=True)


def test_logprobs_name_the_chosen_and_the_best_tokens_with_their_text(
    llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (output,) = llm.generate(TEXTS[2], greedy(5, logprobs=3, prompt_logprobs=0), use_tqdm=False)
    (completion,) = output.outputs
    ids = output.prompt_token_ids + completion.token_ids
    with torch.no_grad():
        want = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    for offset, (entry, token) in enumerate(zip(completion.logprobs, completion.token_ids, strict=True)):
        row = want[len(output.prompt_token_ids) - 1 + offset]
        assert list(entry) == row.topk(3).indices.tolist()
        assert next(iter(entry)) == token
        for rank, (other, logprob) in enumerate(entry.items(), start=1):
            assert logprob.logprob == pytest.approx(float(row[other]), rel=1e-4)
            assert logprob.rank == rank
            assert logprob.decoded_token == tokenizer.decode([other])
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert list(entry) == [ids[position]]
        assert entry[ids[position]].logprob == pytest.approx(float(want[position - 1, ids[position]]), rel=1e-4)


def test_prefixes_are_found_across_calls_and_never_across_salts(llm: LLM) -> None:
    shared = {"prompt": TEXTS[2], "cache_salt": "a"}
    (first,) = llm.generate(shared, greedy(), use_tqdm=False)
    (again,) = llm.generate(shared, greedy(), use_tqdm=False)
    (other,) = llm.generate({"prompt": TEXTS[2], "cache_salt": "b"}, greedy(), use_tqdm=False)
    (none,) = llm.generate(TEXTS[2], greedy(), use_tqdm=False)
    count = len(first.prompt_token_ids)
    assert [one.num_cached_tokens for one in (first, again, other, none)] == [0, (count - 1) // 4 * 4, 0, 0]
    assert len({one.outputs[0].token_ids for one in (first, again, other, none)}) == 1


def test_prefix_caching_off_finds_nothing_and_says_so(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with make_llm(model, tokenizer, enable_prefix_caching=False) as llm:
        outputs = [llm.generate(TEXTS[2], greedy(), use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert "prefix caching is off" in str(outputs[1].events[1])


def test_seeded_samples_are_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, n=2, max_tokens=6, ignore_eos=True)
    (alone,) = llm.generate(TEXTS[0], params, use_tqdm=False)
    crowd = llm.generate(
        [*TEXTS[1:], TEXTS[0]], [*(SamplingParams(temperature=1.5, max_tokens=9) for _ in TEXTS[1:]), params], use_tqdm=False
    )
    assert [one.token_ids for one in crowd[-1].outputs] == [one.token_ids for one in alone.outputs]
    assert [one.index for one in alone.outputs] == [0, 1]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "longest_prefix"])
def test_every_policy_gives_the_same_tokens_in_the_order_asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, policy: str
) -> None:
    prompts = [{"prompt": text, "priority": -index} for index, text in enumerate(TEXTS)]
    with make_llm(model, tokenizer, num_blocks=16, max_num_seqs=2, scheduling_policy=policy) as llm:
        outputs = llm.generate(prompts, greedy(5), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [generate(model, tokenizer.encode(text), 5) for text in TEXTS]
        assert_idle(llm)


def test_bad_words_are_not_written(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (free,) = llm.generate(TEXTS[0], greedy(6), use_tqdm=False)
    word = next(text for token in free.outputs[0].token_ids if (text := tokenizer.decode([token])).strip() and "\ufffd" not in text)
    (output,) = llm.generate(TEXTS[0], greedy(6, bad_words=[word]), use_tqdm=False)
    assert word not in output.outputs[0].text
    assert output.outputs[0].token_ids != free.outputs[0].token_ids


def test_metrics_are_in_order(llm: LLM) -> None:
    (output,) = llm.generate(TEXTS[0], greedy(3), use_tqdm=False)
    metrics = output.metrics
    assert metrics.first_scheduled_time is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.num_preemptions == 0
