"""Log-probabilities of every position against the model's plain forward, through chunks, hits refused, and preemption."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity_support import Oracle, greedy, new_engine, poisoned_step

from pagedkv.outputs import RequestOutput
from pagedkv.testing.models import TINY_MODELS

RELATIVE = 1e-4


def _plain(oracle: Oracle, token_ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(oracle.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].double(), dim=-1)


def _rows(entries: tuple[object, ...], vocab_size: int) -> torch.Tensor:
    return torch.tensor([[entry[token].logprob for token in range(vocab_size)] for entry in entries], dtype=torch.float64)  # type: ignore[index]


@pytest.mark.parametrize("preempted_after", [None, 2, 7], ids=["undisturbed", "in the prompt", "in the output"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logprobs_of_prompt_and_output_agree_with_the_plain_forward(
    name: str, preempted_after: int | None, oracle_of: Callable[[str], Oracle]
) -> None:
    oracle = oracle_of(name)
    prompt, neighbour = oracle.prompt_of(26), oracle.prompt_of(17)
    engine = new_engine(oracle, 4, 60, max_num_batched_tokens=7)
    engine.add_request("neighbour", neighbour, greedy(max_tokens=4))
    engine.add_request("it", prompt, greedy(max_tokens=8, logprobs=-1, prompt_logprobs=-1))
    ended: dict[str, RequestOutput] = {}
    step = 0
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
        if step == preempted_after:
            assert engine.preempt("it")
        step += 1
    output = ended["it"]
    completion = output.outputs[0]
    where = f"{name}, preempted after step {preempted_after}"
    assert output.prompt_logprobs is not None
    assert completion.logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt), where
    assert output.prompt_logprobs[0] is None
    assert len(completion.logprobs) == len(completion.token_ids) == 8
    got = _rows((*output.prompt_logprobs[1:], *completion.logprobs), 97)
    want = _plain(oracle, prompt + completion.token_ids)[:-1]
    difference = (got - want).abs().amax(dim=1) / want.abs().max()
    bad = torch.nonzero(~(difference <= RELATIVE)).flatten().tolist()
    assert not bad, f"{where}: position {bad[0] + 1} differs by {float(difference[bad[0]]):.1e} of the largest"
    chosen = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))
    assert completion.token_ids == oracle.reference(prompt).token_ids[:8]
