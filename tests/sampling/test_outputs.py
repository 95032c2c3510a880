from __future__ import annotations

import dataclasses

import pytest

from pagedkv.errors import InvalidRequestError
from pagedkv.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pagedkv.sampling import Logprob


def test_outputs_are_frozen_and_compare_by_value() -> None:
    def make() -> RequestOutput:
        sample = CompletionOutput(
            index=0, text="x", token_ids=(1,), logprobs=({1: Logprob(-0.5, 1)},), cumulative_logprob=-0.5, finish_reason="stop"
        )
        metrics = RequestMetrics(arrival_time=1.0)
        return RequestOutput(
            request_id="a",
            prompt="p",
            prompt_token_ids=(3, 4),
            outputs=(sample,),
            num_cached_tokens=0,
            metrics=metrics,
            error=InvalidRequestError("x"),
        )

    output = make()
    assert output == make()
    assert output.outputs[0].finished
    assert not CompletionOutput(index=0, text="", token_ids=()).finished
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.finished = True


def test_metrics_differences_are_none_until_they_happened() -> None:
    early = RequestMetrics(arrival_time=1.0)
    assert (early.time_in_queue_s, early.time_to_first_token_s, early.total_time_s) == (None, None, None)
    done = RequestMetrics(arrival_time=1.0, first_scheduled_time=1.5, first_token_time=2.0, finished_time=4.0)
    assert (done.time_in_queue_s, done.time_to_first_token_s, done.total_time_s) == (0.5, 1.0, 3.0)
