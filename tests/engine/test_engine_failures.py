"""What fails fails alone: a whole step is undone and may be tried again; an error in one request ends that request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import cast

import pytest
import torch
from engine_support import PROMPTS, FailingBackend, Prompt, generate, greedy, new_engine, run_all, step, tokens_of
from state_models import state_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import ClosedError, InvalidRequestError, InvariantError, PagedKVError, StepError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import Sampler, SamplingParams
from pagedkv.testing.faults import Fault, failing_calls
from pagedkv.testing.models import tiny_model
from pagedkv.testing.poison import PoisonBackend

ODD_TOKEN = 96  # in no prompt and no reference: its embedding can be spoilt without harm to others


def _failing(error: BaseException) -> tuple[PreTrainedModel, FailingBackend, ModelRunner]:
    model = tiny_model("llama", num_hidden_layers=1)
    backend = FailingBackend(error, PoisonBackend())
    return model, backend, ModelRunner(model, backend=backend, block_size=4)


def _submit_work(engine: Engine) -> None:
    """A fork, two that outgrow the pool together, and a latecomer that hits their prefix."""
    engine.add_request("fork", PROMPTS[1], greedy(8, n=2))
    engine.add_request("long", PROMPTS[2], greedy(8))
    engine.add_request("hit", PROMPTS[2], greedy(8))


def _facts(engine: Engine) -> dict[int, tuple[tuple[int, ...], int]]:
    return {sequence.seq: (sequence.token_ids, sequence.num_computed_tokens) for sequence in engine.snapshot().sequences}


def _account(engine: Engine) -> tuple[int, int, int]:
    now = engine.statistics()
    return now.num_steps, now.num_computed_tokens, now.num_generated_tokens


def _step_that_may_fail(engine: Engine) -> list[RequestOutput] | None:
    """A step; None when it failed, which must have changed nothing."""
    tables, account, preempted = _facts(engine), _account(engine), engine.statistics().num_preemptions
    try:
        return step(engine)
    except StepError as error:
        caught = error
    assert isinstance(caught.__cause__, MemoryError)
    assert "the device is full" in str(caught)
    engine.check()
    now = _facts(engine)
    for seq, (tokens, computed) in tables.items():
        if seq not in now:
            assert engine.statistics().num_preemptions > preempted, "a sequence is gone that was not preempted"
            continue
        assert now[seq][0] == tokens
        # A half-full block whose copy was planned may not have been copied: its tokens are computed again.
        assert computed - 4 < now[seq][1] <= computed
    assert _account(engine) == account
    engine.fill_free_blocks(float("nan"))
    return None


def test_step_that_fails_at_any_call_is_undone_and_its_retry_gives_the_same_tokens() -> None:
    model, backend, runner = _failing(MemoryError("the device is full"))
    want = {
        "fork": [generate(model, PROMPTS[1], 8)] * 2,
        "long": [generate(model, PROMPTS[2], 8)],
        "hit": [generate(model, PROMPTS[2], 8)],
    }
    failed_at = 0
    for call in range(200):
        engine = new_engine(runner, 11, max_num_batched_tokens=9)
        _submit_work(engine)
        backend.arm(call)
        ended: dict[str, RequestOutput] = {}
        failures = 0
        while engine.has_unfinished:
            outputs = _step_that_may_fail(engine)
            failures += outputs is None
            ended.update((output.request_id, output) for output in outputs or () if output.finished)
        assert {request_id: tokens_of(output) for request_id, output in ended.items()} == want, f"failed at call {call}"
        assert failures == (0 if backend.armed else 1)
        if backend.armed:  # every call of a run has failed once by now; this run had none
            assert engine.statistics().num_preemptions > 0
            assert engine.statistics().cache.num_copies > 0
            assert engine.statistics().cache.num_hit_tokens > 0
            backend.disarm()
            break
        failed_at += 1
        assert any("undone" in str(event) for output in ended.values() for event in output.events)
    assert failed_at > 20, "the work was too short to fail in"


def test_step_interrupted_from_the_keyboard_is_undone_and_the_next_goes_on() -> None:
    model, backend, runner = _failing(KeyboardInterrupt())
    engine = new_engine(runner)
    engine.add_request("it", PROMPTS[0], greedy(5))
    step(engine)
    backend.arm(1)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert run_all(engine)["it"].outputs[0].token_ids == generate(model, PROMPTS[0], 5)


def test_abort_between_a_failed_step_and_its_retry_ends_that_request_only() -> None:
    model, backend, runner = _failing(RuntimeError("broken"))
    engine = new_engine(runner)
    engine.add_request("aborted", PROMPTS[0], greedy(5))
    engine.add_request("other", PROMPTS[1], greedy(5))
    backend.arm(0)
    with pytest.raises(StepError, match="broken"):
        engine.step()
    assert engine.abort("aborted")
    ended = run_all(engine)
    assert ended["aborted"].outputs[0].finish_reason == "abort"
    assert ended["other"].outputs[0].token_ids == generate(model, PROMPTS[1], 5)


@contextmanager
def _spoilt(model: PreTrainedModel) -> Iterator[None]:
    """The embedding of ``ODD_TOKEN`` is NaN for a while."""
    weight = model.get_input_embeddings().weight
    kept = weight[ODD_TOKEN].detach().clone()
    with torch.no_grad():
        weight[ODD_TOKEN] = float("nan")
    try:
        yield
    finally:
        with torch.no_grad():
            weight[ODD_TOKEN] = kept


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"temperature": 1.0}, {"n": 2}, {"stop_token_ids": [3, 4]}], ids=str)
def test_logits_that_are_not_finite_end_that_request_only(
    runner: ModelRunner, references: dict[Prompt, tuple[int, ...]], options: dict[str, object]
) -> None:
    with _spoilt(runner.model):
        engine = new_engine(runner)
        engine.add_request("before", PROMPTS[0], greedy(stop_token_ids=[90, 91, 92]))
        step(engine)
        engine.add_request("bad", (5, ODD_TOKEN, 7), SamplingParams(**{"temperature": 0, "max_tokens": 6, **options}))  # type: ignore[arg-type]
        engine.add_request("after", PROMPTS[2], greedy())
        ended = run_all(engine)
    bad = ended["bad"]
    assert bad.finished
    assert {completion.finish_reason for completion in bad.outputs} == {"error"}
    assert all(completion.token_ids == () and completion.stop_reason is None for completion in bad.outputs)
    assert isinstance(bad.error, InvariantError)
    assert "finite" in str(bad.error)
    assert ended["before"].outputs[0].token_ids == references[PROMPTS[0]][:8]
    assert ended["after"].outputs[0].token_ids == references[PROMPTS[2]][:8]
    assert engine.statistics().cache.groups[0].num_in_use == 0


@pytest.mark.parametrize("budget", [64, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("n", [1, 2])
def test_blocks_behind_logits_that_are_not_finite_are_never_found_again(runner: ModelRunner, budget: int, n: int) -> None:
    prompt = (*PROMPTS[2][:6], ODD_TOKEN, *PROMPTS[2][6:])
    engine = new_engine(runner, max_num_batched_tokens=budget)
    with _spoilt(runner.model):
        engine.add_request("bad", prompt, greedy(n=n))
        assert {completion.finish_reason for completion in run_all(engine)["bad"].outputs} == {"error"}
    engine.add_request("again", (*prompt, 3), greedy())
    again = run_all(engine)["again"]
    assert again.error is None
    assert again.outputs[0].token_ids == generate(runner.model, (*prompt, 3), 8)
    engine.add_request("hit", (*prompt, 5), greedy())
    assert run_all(engine)["hit"].num_cached_tokens >= 16


def test_logits_processor_that_raises_ends_that_request_only(runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    def allowed(batch: int, token_ids: torch.Tensor) -> list[int]:
        if len(token_ids) == len(PROMPTS[1]) + 3:
            raise LookupError("no grammar rule")
        return list(range(97))

    engine = new_engine(runner)
    engine.add_request("neighbour", PROMPTS[0], greedy())
    engine.add_request("bad", PROMPTS[1], greedy(generation_kwargs={"prefix_allowed_tokens_fn": allowed}))
    ended = run_all(engine)
    bad = ended["bad"]
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].token_ids == references[PROMPTS[1]][:3]
    assert isinstance(bad.error, InvalidRequestError)
    assert "no grammar rule" in str(bad.error)
    assert isinstance(bad.error.__cause__, LookupError)
    assert ended["neighbour"].outputs[0].token_ids == references[PROMPTS[0]][:8]


class Forgetful:
    """A tokenizer that has no text for one token, and raises."""

    def __init__(self, token: int) -> None:
        self._token = token

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if self._token in token_ids:
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return "".join(chr(65 + token) for token in token_ids)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", [{}, {"logprobs": 0}, {"prompt_logprobs": 0}])
def test_tokenizer_that_raises_ends_that_request_only(
    stream: bool, asked: dict[str, int], runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]
) -> None:
    want = references[PROMPTS[1]][:8]
    unknown = PROMPTS[1][1] if "prompt_logprobs" in asked else want[3]
    assert unknown not in (*PROMPTS[0], *references[PROMPTS[0]][:8])
    tokenizer = cast("PreTrainedTokenizerBase", Forgetful(unknown))
    engine = Engine(runner, EngineConfig(num_blocks=60), tokenizer=tokenizer)
    engine.add_request("neighbour", PROMPTS[0], greedy())
    engine.add_request("bad", PROMPTS[1], greedy(**asked), stream=stream)
    ended = run_all(engine)
    (bad,) = ended["bad"].outputs
    assert bad.finish_reason == "error"
    assert bad.token_ids == want[: len(bad.token_ids)]
    assert isinstance(ended["bad"].error, InvalidRequestError)
    assert "the tokenizer could not turn tokens into text: TypeError" in str(ended["bad"].error)
    assert isinstance(ended["bad"].error.__cause__, TypeError)
    assert ended["neighbour"].outputs[0].text == "".join(chr(65 + token) for token in references[PROMPTS[0]][:8])
    assert ended["neighbour"].error is None


def test_model_put_in_training_mode_is_refused_at_the_step_and_goes_on_after_eval(references: dict[Prompt, tuple[int, ...]]) -> None:
    model = tiny_model("llama")
    engine = new_engine(ModelRunner(model, backend=PoisonBackend(), block_size=4))
    engine.add_request("it", PROMPTS[0], greedy())
    step(engine)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"inference.*model\.eval\(\)"):
        engine.step()
    model.eval()
    assert run_all(engine)["it"].outputs[0].token_ids == references[PROMPTS[0]][:8]


def test_model_is_usable_as_ever_between_steps(runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    engine = new_engine(runner)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, greedy())
    ended: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in step(engine) if output.finished)
        assert generate(runner.model, PROMPTS[1], 4) == references[PROMPTS[1]][:4]
    assert [ended[str(index)].outputs[0].token_ids for index in range(len(PROMPTS))] == [references[prompt][:8] for prompt in PROMPTS]


def test_engine_after_close_refuses_work_and_closing_again_is_allowed(runner: ModelRunner) -> None:
    engine = new_engine(runner)
    engine.add_request("it", PROMPTS[0], greedy())
    step(engine)
    engine.close()
    engine.close()
    for use in (engine.step, lambda: engine.add_request("b", [5]), lambda: engine.check_request([5], greedy()), engine.fill_free_blocks):
        with pytest.raises(ClosedError):
            use()
    assert isinstance(ClosedError("x"), PagedKVError)
    assert engine.abort("it") is True
    assert engine.abort("it") is False


def test_end_of_who_was_aborted_during_a_step_that_failed_is_delivered(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(runner)
    engine.add_request("only", PROMPTS[0], greedy())
    step(engine)

    def abort_and_fail(*_: object) -> None:
        assert engine.abort("only")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "forward", abort_and_fail)
    with pytest.raises(StepError):
        engine.step()
    assert engine.has_unfinished
    (output,) = engine.step()
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) == 1
    assert engine.num_blocks_in_use == 0


def test_state_goes_along_with_each_row_once_though_the_step_of_its_fork_fails_twice() -> None:
    runner = ModelRunner(state_model("lfm2"), block_size=4)

    def serve(failing_steps: tuple[int, ...]) -> list[tuple[int, ...]]:
        engine = new_engine(runner, 16, max_num_seqs=2, max_model_len=32)
        engine.add_request("fork", (5, 9, 31, 60, 7, 8), SamplingParams(seed=3, n=2, max_tokens=5, ignore_eos=True))
        outputs: list[RequestOutput] = []
        for number in count():
            if number in failing_steps:  # after state went along, before the rows are taken from the scheduler
                with failing_calls(Sampler, "add", Fault(1)), pytest.raises(StepError):
                    engine.step()
                continue
            outputs += step(engine)
            if not engine.has_unfinished:
                return tokens_of(outputs[-1])
        raise AssertionError

    assert serve((1, 2)) == serve(())
