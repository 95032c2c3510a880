"""A step's budget of tokens from what steps take: by a clock that says what it is told, so that no test depends on the machine."""

from __future__ import annotations

from functools import partial

import pytest
from pair_models import pair_model
from state_models import state_model

from pagedkv import LLM, ModelRunner, SamplingParams, measure_token_budget
from pagedkv.attention import StepAttention
from pagedkv.attention.torch_backend import TorchBackend
from pagedkv.errors import ConfigError
from pagedkv.storage import StepBatch
from pagedkv.testing.models import tiny_model

MAX_POSITIONS = 64


class Lookout(TorchBackend):
    """Sees the steps of a runner."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[list[int], list[int]]] = []

    def plan(self, batch: StepBatch) -> StepAttention:
        self.steps.append((batch.plan.query_lens.tolist(), batch.plan.seq_lens.tolist()))
        return super().plan(batch)


class Clock:
    """Lets the given seconds pass between every second reading and the one before."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self._now, self._began = 100.0, False

    def __call__(self) -> float:
        if self._began:
            self._now += self._seconds.pop(0)
        self._began = not self._began
        return self._now

    @property
    def left(self) -> list[float]:
        return self._seconds


@pytest.fixture(scope="module")
def lookout() -> Lookout:
    return Lookout()


@pytest.fixture(scope="module")
def runner(lookout: Lookout) -> ModelRunner:
    return ModelRunner(tiny_model("llama", seed=1, max_position_embeddings=MAX_POSITIONS), backend=lookout, block_size=4)


@pytest.mark.parametrize(
    ("seconds", "most", "steps"),
    [
        ((0.1, 0.5, 0.9, 0.6, 0.7), 2048, ((16, 0.1), (32, 0.5), (64, 0.6))),  # just the limit is within it
        ((0.9, 0.2, 0.9, 0.9, 0.3, 0.8, 0.8, 0.6), 2048, ((16, 0.2), (32, 0.3), (64, 0.6))),  # tries that others disturbed
        ((0.1, 0.2, 0.3), 40, ((16, 0.1), (32, 0.2), (40, 0.3))),
        ((0.1,), 16, ((16, 0.1),)),
        ((0.1,), 3, ((3, 0.1),)),
    ],
)
def test_budget_is_the_largest_number_tried_whose_step_is_fast_enough(
    runner: ModelRunner, seconds: tuple[float, ...], most: int, steps: tuple[tuple[int, float], ...]
) -> None:
    clock = Clock(*seconds)
    budget = measure_token_budget(runner, max_step_s=0.5, max_num_batched_tokens=most, clock=clock)
    assert [tokens for tokens, _ in budget.steps] == [tokens for tokens, _ in steps]
    assert [spent for _, spent in budget.steps] == pytest.approx([spent for _, spent in steps])
    assert budget.max_num_batched_tokens == max(tokens for tokens, spent in steps if spent <= 0.5)
    assert (budget.max_step_s, budget.prompt_len, clock.left) == (0.5, MAX_POSITIONS - 1, [])


def test_timed_are_the_last_full_steps_of_the_longest_prompt_or_several_whole_ones(runner: ModelRunner, lookout: Lookout) -> None:
    lookout.steps.clear()
    measure_token_budget(runner, max_step_s=1, max_num_batched_tokens=150, max_model_len=57, clock=Clock(*[0.5] * 5))
    assert lookout.steps == [
        ([16], [48]),
        ([32], [32]),
        ([56, 8], [56, 8]),
        ([56, 56, 16], [56, 56, 16]),
        ([56, 56, 38], [56, 56, 38]),
    ]


def test_prompt_that_is_timed_ends_at_4096_tokens_where_longer_ones_are_served(lookout: Lookout) -> None:
    runner = ModelRunner(tiny_model("llama", seed=1, max_position_embeddings=8192), backend=lookout, block_size=64)
    lookout.steps.clear()
    assert measure_token_budget(runner, max_step_s=1, max_num_batched_tokens=16, clock=Clock(0.5)).prompt_len == 4096
    assert lookout.steps == [([16], [4096])]


def test_step_that_is_too_slow_at_its_smallest_is_refused_with_what_it_takes(runner: ModelRunner) -> None:
    with pytest.raises(ConfigError, match=r"max_step_s is 0\.01: a step of 16 tokens behind 63 takes 0\.25 seconds here"):
        measure_token_budget(runner, max_step_s=0.01, clock=Clock(0.5, 0.25, 0.75))


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "1", True, None])
def test_limit_that_is_no_number_above_0_is_refused(runner: ModelRunner, wrong: float) -> None:
    with pytest.raises(ConfigError, match="max_step_s"):
        measure_token_budget(runner, max_step_s=wrong, clock=Clock())


def test_most_tokens_below_1_are_refused(runner: ModelRunner) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens is 0"):
        measure_token_budget(runner, max_step_s=1, max_num_batched_tokens=0, clock=Clock())


@pytest.mark.parametrize("name", ["jamba", "bart"])
def test_model_whose_steps_no_budget_bounds_is_refused_by_name(name: str) -> None:
    model = state_model(name) if name == "jamba" else pair_model(name)
    with pytest.raises(ConfigError, match=rf"max_step_s is 1\.0, but .*{type(model).__name__} are computed in one piece"):
        measure_token_budget(ModelRunner(model, block_size=4), max_step_s=1, clock=Clock())


def test_recurrent_state_and_gathered_layers_do_not_stand_in_the_way() -> None:
    runner = ModelRunner(state_model("mamba2"), block_size=4)
    assert runner.recurrent_state == "chunked"
    budget = measure_token_budget(runner, max_step_s=1, max_num_batched_tokens=40, max_model_len=30, clock=Clock(0.5, 0.5, 0.5))
    assert budget.max_num_batched_tokens == 40


def test_llm_takes_the_measured_budget_and_answers_as_without(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = [[3, 1, 4] * 15, [1, 5, 9]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(runner.model, block_size=4) as llm:
        assert llm.token_budget is None
        want = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    told = partial(measure_token_budget, clock=Clock(0.1, 0.3, 0.3, 0.3))
    monkeypatch.setattr("pagedkv.llm.measure_token_budget", told)
    with LLM(runner.model, block_size=4, max_step_s=0.2, max_model_len=60) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)] == want
        assert llm.token_budget is not None
        assert (llm.token_budget.max_num_batched_tokens, llm.token_budget.prompt_len) == (16, 59)
        assert llm.engine.config.max_num_batched_tokens == 16
        assert llm.statistics().num_steps > 6 + 1, "the long prompt took several steps"


@pytest.mark.parametrize("options", [{"max_step_s": 0}, {"max_step_s": "fast"}, {"max_step_s": float("nan")}])
def test_llm_refuses_a_wrong_limit_before_it_loads_anything(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="max_step_s"):
        LLM("no/such-model", **options)


def test_llm_measures_up_to_the_most_it_is_given(runner: ModelRunner) -> None:
    with LLM(runner.model, max_step_s=1e9, max_num_batched_tokens=48) as llm:
        assert llm.token_budget is not None
        assert [tokens for tokens, _ in llm.token_budget.steps] == [16, 32, 48]
