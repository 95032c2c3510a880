"""Models in half precision: what roundings hide shows on a copy in float32 of a few layers."""

from __future__ import annotations

import pytest
import torch
from tier_models import tier_model

from pagedkv.models import ModelRunner
from pagedkv.models.float32_copy import Float32Copy
from pagedkv.testing.models import tiny_model

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_way_that_is_wrong_within_roundings_is_not_taken(dtype: torch.dtype) -> None:
    runner = ModelRunner(tier_model("roformer").to(dtype), block_size=4)
    assert runner.tier.name == "dense-equal"
    assert "self-check failed" in runner.tier.rejected["dense"]
    report = runner.report
    assert report.judged_by == "ranks"
    assert report.copy is not None
    assert report.copy.max_relative_error < report.copy.bound == 1e-3
    assert report.why_no_copy is None


def test_model_in_float32_needs_no_copy() -> None:
    report = ModelRunner(tiny_model("llama"), block_size=4).report
    assert (report.judged_by, report.copy, report.why_no_copy) == ("numbers", None, None)


def test_copy_holds_the_first_layers_up_to_one_of_each_kind_and_leaves_the_model_alone() -> None:
    model = tiny_model("llama", num_hidden_layers=5).to(torch.bfloat16)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    copy = Float32Copy(model)
    assert copy.model is not None
    assert copy.num_layers == len(copy.model.model.layers) == 2
    assert {parameter.dtype for parameter in copy.model.parameters()} == {torch.float32}
    assert torch.equal(copy.model.model.layers[1].mlp.up_proj.weight.bfloat16(), model.model.layers[1].mlp.up_proj.weight)
    assert len(model.model.layers) == 5
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1]), name
    kinds = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2, "num_hidden_layers": 5}
    assert Float32Copy(tiny_model("gemma3", **kinds).to(torch.bfloat16)).num_layers == 4


def test_copy_that_would_not_fit_is_not_made_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.float32_copy.free_memory", lambda device: 1000)
    report = ModelRunner(tiny_model("llama").to(torch.bfloat16), block_size=4).report
    assert report.copy is None
    assert "more than a quarter of the 1,000 that are free" in str(report.why_no_copy)


def test_copy_that_fails_alone_costs_the_model_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    monkeypatch.setattr(type(model), "__deepcopy__", lambda self, memo: 1 / 0, raising=False)
    report = ModelRunner(model, block_size=4).report
    assert report.copy is None
    assert "ZeroDivisionError" in str(report.why_no_copy)
