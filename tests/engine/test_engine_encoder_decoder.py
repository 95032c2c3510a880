"""Encoder-decoders under the engine: the tokens of ``generate`` for each prompt alone, whatever else is running."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_support import greedy, run_all
from pair_models import PAIRS, alone, pair_model, random_prompts
from transformers import PreTrainedModel

from pagedkv import Engine, EngineConfig, ModelRunner, PoolingParams
from pagedkv.errors import InvalidRequestError, RequestTooLargeError, StepError, UnsupportedModelError
from pagedkv.sampling import SamplingParams

NUM_NEW = 9
LENS = (5, 13, 9, 21, 1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pair_model("bart")


@pytest.fixture(scope="module")
def runner(model: PreTrainedModel) -> ModelRunner:
    return ModelRunner(model, block_size=4)


@pytest.fixture
def engine(runner: ModelRunner) -> Iterator[Engine]:
    engine = new_engine(runner)
    yield engine
    engine.check()
    engine.close()


def new_engine(runner: ModelRunner, **options: Any) -> Engine:
    """One that audits itself, so that every freed block is NaN before the next forward."""
    settings = {"num_blocks": 60, "max_num_seqs": 6, "max_model_len": 60, "check": "audit", **options}
    return Engine(runner, EngineConfig(**settings))


def tokens_of(engine: Engine, work: dict[str, Any], params: SamplingParams) -> dict[str, tuple[int, ...]]:
    for request_id, prompt in work.items():
        engine.add_request(request_id, prompt, params, stream=False)
    return {request_id: output.outputs[0].token_ids for request_id, output in run_all(engine).items()}


def count_runs(model: PreTrainedModel) -> tuple[list[int], Any]:
    """Rows of every run of the encoder from now on, and the hook's handle."""
    runs: list[int] = []
    encoder: Any = model.get_encoder()
    return runs, encoder.register_forward_hook(lambda module, args, output: runs.append(len(output[0])))


TIERS = ("encoder-decoder", "encoder-decoder-equal")
SHORT = {("t5", TIERS[0]), ("bart", TIERS[0]), ("bart", TIERS[1])}


@pytest.mark.parametrize(
    ("name", "tier"),
    [pytest.param(name, tier, marks=() if (name, tier) in SHORT else pytest.mark.slow) for name in PAIRS for tier in TIERS],
)
def test_tokens_are_those_of_each_prompt_alone(name: str, tier: Any) -> None:
    model = pair_model(name)
    prompts = random_prompts(*LENS, seed=1)
    want = [alone(model, prompt, NUM_NEW) for prompt in prompts]
    runner = ModelRunner(model, block_size=4, tier=tier)
    work = {str(index): prompt for index, prompt in enumerate(prompts)}
    roomy = new_engine(runner)
    for round_ in range(2):
        assert list(sorted_tokens(roomy, work)) == want, f"{name}, {tier}, round {round_}"
    # Not all of them at once, every prompt in pieces, and one after the other preempted wherever it is.
    tight = new_engine(runner, num_blocks=16, max_num_batched_tokens=6)
    assert list(sorted_tokens(tight, work, preempt_every=7)) == want, f"{name}, {tier}, preempted"
    assert tight.statistics().num_preemptions > 0
    for engine in (roomy, tight):
        engine.check()
        assert engine.num_blocks_in_use == 0
        engine.close()


def sorted_tokens(engine: Engine, work: dict[str, Any], *, preempt_every: int | None = None) -> Iterator[tuple[int, ...]]:
    """Greedy tokens in the order of the work."""
    for request_id, prompt in work.items():
        engine.add_request(request_id, prompt, greedy(NUM_NEW), stream=False)
    ended: dict[str, tuple[int, ...]] = {}
    steps = 0
    while engine.has_unfinished:
        ended.update((output.request_id, output.outputs[0].token_ids) for output in engine.step())
        steps += 1
        if preempt_every is not None and steps % preempt_every == 0:
            engine.preempt(str(steps // preempt_every % len(work)))
    return (ended[request_id] for request_id in work)


def test_input_is_found_again_only_as_a_whole(engine: Engine, model: PreTrainedModel) -> None:
    first, other = random_prompts(14, 6, seed=2)
    second = first[:8] + other  # the first two blocks hold the same tokens of the encoder, and other K and V
    runs, handle = count_runs(model)
    outputs = []
    for number, prompt in enumerate((first, second, first, {"prompt_token_ids": first, "cache_salt": "other"})):
        engine.add_request(str(number), prompt, greedy(NUM_NEW), stream=False)
        outputs.append(run_all(engine)[str(number)])
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 12, 0]
    assert runs == [1, 1, 1, 1]  # two tokens of the third were not cached
    for output, ids in zip(outputs, (first, second, first, first), strict=True):
        assert output.prompt_token_ids == tuple(ids)
        assert output.decoder_prompt_token_ids == (2,)
        assert output.outputs[0].token_ids == alone(model, ids, NUM_NEW)
    assert engine.purge_cache("other") > 0
    assert engine.purge_cache("other") == 0
    assert engine.purge_cache() > 0
    assert engine.reset_prefix_cache() == 0
    handle.remove()


def test_encoder_runs_once_for_a_prompt_in_pieces_and_not_at_all_for_a_cached_one(runner: ModelRunner, model: PreTrainedModel) -> None:
    engine = new_engine(runner, max_num_batched_tokens=6)
    (prompt,) = random_prompts(23, seed=3)
    want = alone(model, prompt, NUM_NEW)
    runs, handle = count_runs(model)
    assert tokens_of(engine, {"a": prompt}, greedy(NUM_NEW))["a"] == want
    assert runs == [1]
    longer = {"prompt_token_ids": prompt, "decoder_prompt_token_ids": [2, *want[:5]]}
    assert tokens_of(engine, {"b": longer}, greedy(NUM_NEW - 5))["b"] == want[5:]  # all blocks of the input are full, and found
    assert runs == [1]
    engine.fill_free_blocks()
    handle.remove()
    engine.close()


def test_inputs_of_one_step_share_a_run_of_the_encoder(engine: Engine, model: PreTrainedModel) -> None:
    runs, handle = count_runs(model)
    tokens_of(engine, {str(index): prompt for index, prompt in enumerate(random_prompts(5, 13, 9, seed=4))}, greedy(1))
    handle.remove()
    assert runs == [3]


@pytest.mark.parametrize("begins", [[2, 50, 51], [50, 51]])
def test_decoder_prompt_goes_on_as_in_generate(engine: Engine, model: PreTrainedModel, begins: list[int]) -> None:
    prompts = random_prompts(11, 6, seed=5)
    want = [alone(model, prompt, NUM_NEW, decoder_input_ids=torch.tensor([begins]))[2:] for prompt in prompts]
    work = {str(index): {"prompt_token_ids": prompt, "decoder_prompt_token_ids": begins} for index, prompt in enumerate(prompts)}
    assert list(tokens_of(engine, {**work, "plain": prompts[0]}, greedy(NUM_NEW)).values())[:2] == want


def test_continuations_share_their_input_and_draw_the_same_beside_others(runner: ModelRunner, model: PreTrainedModel) -> None:
    prompt, *others = random_prompts(10, 13, 9, 17, seed=6)
    params = SamplingParams(n=3, seed=11, temperature=1.0, max_tokens=NUM_NEW, ignore_eos=True)
    quiet, busy = new_engine(runner), new_engine(runner, num_blocks=16, max_num_batched_tokens=7)
    quiet.add_request("a", prompt, params, stream=False)
    quiet.step()
    quiet.step()
    assert quiet.num_blocks_in_use == 3 + 2  # 10 tokens of the encoder and one of the decoder, the last block once for each
    want = [sample.token_ids for sample in run_all(quiet)["a"].outputs]
    assert len(set(want)) == 3
    busy.add_request("a", prompt, params, stream=False)
    for index, other in enumerate(others):
        busy.add_request(str(index), other, greedy(NUM_NEW), stream=False)
    for _ in range(4):
        busy.step()
    busy.preempt("a")
    ended = run_all(busy)
    assert [sample.token_ids for sample in ended["a"].outputs] == want
    assert [ended[str(index)].outputs[0].token_ids for index in range(3)] == [alone(model, other, NUM_NEW) for other in others]
    for engine in (quiet, busy):
        engine.check()
        assert engine.num_blocks_in_use == 0
        engine.close()


def test_penalties_and_processors_see_the_tokens_of_the_decoder_alone(engine: Engine, model: PreTrainedModel) -> None:
    (prompt,) = random_prompts(12, seed=7)
    prompt += list(alone(model, prompt, NUM_NEW))  # so that a penalty of the input's tokens would show
    for settings, params in (
        ({"repetition_penalty": 1.7}, greedy(NUM_NEW, repetition_penalty=1.7)),
        ({"no_repeat_ngram_size": 2}, greedy(NUM_NEW, generation_kwargs={"no_repeat_ngram_size": 2})),
        ({"forced_bos_token_id": 44}, greedy(NUM_NEW, generation_kwargs={"forced_bos_token_id": 44})),
    ):
        assert tokens_of(engine, {"a": prompt}, params)["a"] == alone(model, prompt, NUM_NEW, **settings), settings
    last = alone(model, prompt, NUM_NEW)[0]
    want = alone(model, prompt, NUM_NEW, eos_token_id=last, min_new_tokens=3)
    assert (
        tokens_of(engine, {"a": prompt}, SamplingParams(temperature=0, max_tokens=NUM_NEW, min_tokens=3, stop_token_ids=[last]))["a"]
        == want
    )


def test_request_ended_amid_its_input_gives_everything_back(runner: ModelRunner, model: PreTrainedModel) -> None:
    engine = new_engine(runner, max_num_batched_tokens=6)
    prompt, other = random_prompts(23, 8, seed=8)
    engine.add_request("a", prompt, greedy(), stream=False)
    engine.step()
    assert engine.num_blocks_in_use == 2  # 6 of 23 tokens
    engine.add_request("b", other, greedy(NUM_NEW), stream=False)
    assert engine.preempt("a")
    engine.step()
    assert engine.abort("a")
    assert run_all(engine)["b"].outputs[0].token_ids == alone(model, other, NUM_NEW)
    engine.check()
    assert engine.num_blocks_in_use == 0
    engine.close()


@pytest.mark.parametrize("part", ["get_encoder", "get_decoder"])
def test_step_that_fails_is_undone(engine: Engine, model: PreTrainedModel, part: str) -> None:
    prompts = random_prompts(9, 14, seed=9)

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, greedy(NUM_NEW), stream=False)
    handle = getattr(model, part)().register_forward_hook(stop)
    with pytest.raises(StepError, match="stopped"):
        engine.step()
    handle.remove()
    ended = run_all(engine)
    assert [ended[str(index)].outputs[0].token_ids for index in range(2)] == [alone(model, prompt, NUM_NEW) for prompt in prompts]


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "prompt_logprobs": ([5], greedy(prompt_logprobs=1), InvalidRequestError, "prompt_logprobs"),
    "prompt_embeds": ({"prompt_embeds": torch.zeros(3, 32)}, greedy(), InvalidRequestError, "prompt_embeds"),
    "images": ({"prompt_token_ids": [5], "multi_modal_data": {}}, greedy(), InvalidRequestError, "images, audio"),
    "hidden states": ([5], PoolingParams(), UnsupportedModelError, "encoder-decoder"),
    "an empty prompt": ([], greedy(), InvalidRequestError, "the prompt is empty"),
    "an unknown token": ([97], greedy(), InvalidRequestError, "token id 97"),
    "no decoder prompt": ({"prompt_token_ids": [5], "decoder_prompt_token_ids": []}, greedy(), InvalidRequestError, "are empty"),
    "floats": ({"prompt_token_ids": [5], "decoder_prompt_token_ids": [1.5]}, greedy(), InvalidRequestError, "decoder_prompt_token_ids"),
    "an unknown token of the decoder": (
        {"prompt_token_ids": [5], "decoder_prompt_token_ids": [97]}, greedy(), InvalidRequestError, "token id 97",
    ),
    "an input longer than the encoder": ([5] * 129, greedy(), InvalidRequestError, "the encoder 128 positions"),
    "a decoder prompt longer than the decoder": (
        {"prompt_token_ids": [5], "decoder_prompt_token_ids": [5] * 127}, greedy(), InvalidRequestError, "decoder has 128 positions",
    ),
    "more than max_model_len": ([5] * 59, greedy(), InvalidRequestError, r"60 tokens, 1 of them of the decoder.*max_model_len is 60"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_request_that_cannot_be_served_is_refused_by_name(engine: Engine, model: PreTrainedModel, what: str) -> None:
    prompt, params, error, reason = REFUSED[what]
    with pytest.raises(error, match=reason):
        engine.add_request("a", prompt, params)
    assert not engine.has_unfinished


def test_pool_that_cannot_hold_input_and_output_refuses_them(runner: ModelRunner, model: PreTrainedModel) -> None:
    engine = new_engine(runner, num_blocks=6)
    with pytest.raises(RequestTooLargeError, match="max_model_len or num_blocks"):
        engine.add_request("a", [5] * 14, greedy(7))
    (prompt,) = random_prompts(13, seed=10)
    assert tokens_of(engine, {"a": prompt}, greedy(6))["a"] == alone(model, prompt, 6)
    engine.close()


def test_output_ends_with_the_positions_of_the_decoder(model: PreTrainedModel) -> None:
    small = pair_model("bart", max_position_embeddings=24)
    engine = Engine(ModelRunner(small, block_size=4), EngineConfig(num_blocks=30))
    assert engine.max_model_len == 48
    (prompt,) = random_prompts(24, seed=11)
    assert tokens_of(engine, {"a": prompt}, greedy(max_tokens=None))["a"] == alone(small, prompt, 23)
    engine.close()
