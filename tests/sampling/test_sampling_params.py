from __future__ import annotations

import copy
import dataclasses
import doctest
import pickle
import subprocess
import sys

import numpy as np
import pytest

import pagedkv.sampling.params
from pagedkv.errors import InvalidRequestError
from pagedkv.sampling import SamplingParams, encode_bad_words

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n", v) for v in (0, -1, 1.5, True, "2", None)],
        *[("temperature", v) for v in (-0.1, NAN, INF, True, "1", None)],
        *[("top_k", v) for v in (-2, 1.5, True, None)],
        *[("top_p", v) for v in (0, -0.1, 1.01, NAN)],
        *[("min_p", v) for v in (-0.1, 1.01, NAN)],
        *[("typical_p", v) for v in (0.0, 1.01, NAN)],
        *[("repetition_penalty", v) for v in (0.0, -1.0, NAN, INF)],
        *[("presence_penalty", v) for v in (-2.01, 2.01, NAN)],
        *[("frequency_penalty", v) for v in (-2.01, 2.01, NAN)],
        *[("max_tokens", v) for v in (0, -1, 2.0, True)],
        *[("min_tokens", v) for v in (-1, 17, True)],
        *[("logprobs", v) for v in (-2, True, 1.0)],
        *[("prompt_logprobs", v) for v in (-2, True)],
        *[("seed", v) for v in (-2, 2**64, 1.0, True)],
        *[("stop", v) for v in ("", ["a", ""], [1], b"a", 3)],
        *[("bad_words", v) for v in ("", [""], [None])],
        *[("stop_token_ids", v) for v in ([-1], [1.0], [True], "12", [2**31], 5)],
        *[("allowed_token_ids", v) for v in ([], [-1])],
        *[("bad_words_token_ids", v) for v in ([[]], [[-1]], [1], "ab", 7)],
        *[("logit_bias", v) for v in ({-1: 1.0}, {1: NAN}, {"1": 1.0}, {1: "x"}, [1])],
        *[("generation_kwargs", v) for v in ([], {1: 2})],
        *[(name, 1) for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")],
    ],
)
def test_params_value_out_of_range_raises_and_names_value_and_setting(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert "has to be" in str(caught.value)


def test_params_unknown_or_positional_option_raises_type_error() -> None:
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)
    with pytest.raises(TypeError):
        SamplingParams(1)


def test_params_min_tokens_beyond_max_tokens_raises_and_none_has_no_limit() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=500, max_tokens=None).max_tokens is None


def test_params_stop_without_text_raises() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop=["x"], detokenize=False)


@pytest.mark.parametrize(("word", "option"), [("max_new_tokens", "max_tokens"), ("do_sample", "temperature"), ("top_k", "top_k")])
def test_generation_kwargs_with_own_option_raises_and_names_it(word: str, option: str) -> None:
    with pytest.raises(InvalidRequestError, match=option):
        SamplingParams(generation_kwargs={word: 1})


def test_params_values_are_frozen_comparable_hashable_and_copy() -> None:
    words = [[1, 2], [3]]
    params = SamplingParams(
        stop=["a", "b", "a"], stop_token_ids=np.array([4, 4, 5]), bad_words_token_ids=words, logit_bias={7: -1}, top_k=-1, seed=np.int64(3)
    )
    words[0].append(9)
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (4, 5)
    assert params.bad_words_token_ids == ((1, 2), (3,))
    assert params.top_k == 0
    assert dict(params.logit_bias) == {7: -1.0}
    assert not hasattr(params.logit_bias, "__setitem__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    for twin in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params)):
        assert twin == params
        assert hash(twin) == hash(params)
    assert SamplingParams(generation_kwargs={"suppress_tokens": [1]}) == SamplingParams(generation_kwargs={"suppress_tokens": [1]})
    hash(SamplingParams(generation_kwargs={"suppress_tokens": [1]}))


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_params_temperature_below_limit_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is greedy


def test_params_stop_single_string_is_one_stop() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {10: 1.0}},
        {"bad_words_token_ids": [[1, 10]]},
        {"allowed_token_ids": [10]},
        {"stop_token_ids": [10]},
        {"logprobs": 11},
    ],
)
def test_check_vocabulary_id_beyond_it_raises(options: dict[str, object]) -> None:
    params = SamplingParams(**options)
    params.check_vocabulary(11)
    with pytest.raises(InvalidRequestError, match="10"):
        params.check_vocabulary(10)


def test_encode_bad_words_gives_both_spellings_and_refuses_empty() -> None:
    assert encode_bad_words(["ab", " ab"], lambda text: [ord(c) for c in text]) == ((97, 98), (32, 97, 98))
    with pytest.raises(InvalidRequestError, match="bad_words"):
        encode_bad_words([" "], lambda text: [1])


def test_params_and_outputs_import_without_torch() -> None:
    code = """
import sys, pagedkv.sampling.params, pagedkv.outputs, pagedkv.sampling
pagedkv.sampling.SamplingParams()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sampling_package_exports_exactly_its_names() -> None:
    import pagedkv.sampling as package

    assert sorted(package.__all__) == list(package.__all__) == dir(package)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_params_doctest_runs() -> None:
    assert doctest.testmod(pagedkv.sampling.params).failed == 0
