from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_helpers import arange, make_histories, make_sampler

from pagedkv.errors import InvalidRequestError
from pagedkv.sampling import Logprob, SamplingParams, prompt_logprobs, token_logprobs


def normal(rows: int, vocab_size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(vocab_size).normal(size=(rows, vocab_size)).astype(np.float32) * 3)


@pytest.mark.parametrize("vocab_size", [4, 300, 5000])
@pytest.mark.parametrize("num", [0, 1, 3, -1])
def test_token_logprobs_equal_log_softmax_and_its_order(vocab_size: int, num: int) -> None:
    row = normal(1, vocab_size)[0]
    expected = row.double().log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    for token in (order[0], order[-1], 2):
        got = token_logprobs(row, token, num)
        wanted = vocab_size if num == -1 else num
        assert list(got) == list(dict.fromkeys([token, *order[:wanted]]))
        for other, entry in got.items():
            assert entry.logprob == pytest.approx(expected[other].item(), abs=1e-5)
            assert entry.rank == order.index(other) + 1


def test_token_logprobs_equal_tokens_rank_by_id() -> None:
    row = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0])
    got = token_logprobs(row, 4, 3)
    assert [(token, entry.rank) for token, entry in got.items()] == [(4, 5), (1, 1), (3, 2), (0, 3)]


def test_token_logprobs_masked_logits_are_minus_infinity() -> None:
    got = token_logprobs(torch.tensor([0.0, -torch.inf, 0.0]), 1, -1)
    assert got[1].logprob == float("-inf")
    assert got[0].logprob == pytest.approx(np.log(0.5))


def test_prompt_logprobs_one_mapping_per_position() -> None:
    logits = normal(4, 50)
    got = prompt_logprobs(logits, [3, 1, 4, 1], 2)
    assert [next(iter(entry)) for entry in got] == [3, 1, 4, 1]
    assert got == [token_logprobs(row, token, 2) for row, token in zip(logits, [3, 1, 4, 1], strict=True)]
    assert prompt_logprobs(logits[:0], [], 2) == []
    with pytest.raises(InvalidRequestError, match="next tokens"):
        prompt_logprobs(logits, [1], 2)


def test_sample_logprobs_are_of_raw_logits_and_only_for_rows_that_ask() -> None:
    logits = normal(3, 80)
    params = [
        SamplingParams(temperature=0.3, top_k=1, repetition_penalty=2.0, logit_bias={5: 90.0}, logprobs=2),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=0),
    ]
    got = make_sampler(params, vocab_size=80).sample(logits, arange(3), make_histories([[1]] * 3))
    assert got.token_ids[0] == 5
    assert got.logprobs is not None
    assert got.logprobs[0] == token_logprobs(logits[0], 5, 2)
    assert got.logprobs[1] is None
    assert list(got.logprobs[2]) == [logits[2].argmax().item()]
    assert isinstance(got.logprobs[2][int(got.token_ids[2])], Logprob)
