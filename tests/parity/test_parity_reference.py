"""The reference itself: far from ties, and cut as ``generate`` cuts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity_support import FAMILY, LEAST_MARGIN, LENGTHS, MAX_NEW, TRUNK, Oracle, blocks_to_fit, expected, generate, greedy, run_all

from pagedkv.engine import Engine, EngineConfig
from pagedkv.models import ModelRunner
from pagedkv.sampling import SamplingParams
from pagedkv.testing.models import TINY_MODELS, WINDOW


@pytest.mark.parametrize("name", TINY_MODELS)
def test_reference_of_every_prompt_is_far_from_a_tie(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    margins = {prompt: oracle.reference(prompt).margin for prompt in oracle.prompts + oracle.family}
    worst = min(margins, key=lambda prompt: margins[prompt])
    assert margins[worst] >= LEAST_MARGIN, f"{name}: the prompt {list(worst)} comes within {margins[worst]:.1e} of a tie"
    assert sorted(map(len, oracle.prompts)) == sorted(LENGTHS)
    assert max(oracle.lengths) > 4 * WINDOW
    assert all(prompt[:shared] == oracle.family[0][:shared] for prompt, (shared, _) in zip(oracle.family[1:], FAMILY, strict=True))
    assert len(oracle.family[0]) == TRUNK


@pytest.mark.parametrize("name", TINY_MODELS)
def test_model_reads_its_whole_past_so_that_a_lost_block_would_show(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompt = oracle.prompt_of(40)
    with torch.no_grad():
        logits = [
            oracle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in (prompt, (*prompt[:36], 5, *prompt[37:]))
        ]
    moved = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    assert moved > 10 * LEAST_MARGIN, f"{name}: another token four places back moves the logits by {moved:.1e} only"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_end_of_sequence_and_max_tokens_cut_as_generate_does(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompts = oracle.prompts[:6]
    eos = oracle.reference(prompts[3]).token_ids[MAX_NEW // 2]
    before = oracle.model.generation_config.eos_token_id
    oracle.model.generation_config.eos_token_id = eos
    try:
        runner = ModelRunner(oracle.model, block_size=4)
        want = [generate(oracle.model, prompt, eos=eos).token_ids for prompt in prompts]
    finally:
        oracle.model.generation_config.eos_token_id = before
    assert runner.eos_token_ids == (eos,)
    engine = Engine(runner, EngineConfig(num_blocks=6 * blocks_to_fit(4, 33)))
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=MAX_NEW))
    ended = run_all(engine)
    for index, (prompt, tokens) in enumerate(zip(prompts, want, strict=True)):
        completion = ended[str(index)].outputs[0]
        assert completion.token_ids == tokens, f"{name}, prompt {list(prompt)}, end of sequence {eos}"
        assert completion.finish_reason == ("stop" if tokens[-1] == eos else "length")
        assert completion.stop_reason is None
        assert expected(oracle, prompt, greedy(stop_token_ids=[eos])) == tokens  # the cut that the other parity tests rely on
        assert generate(oracle.model, prompt, max_new=5).token_ids == expected(oracle, prompt, greedy(max_tokens=5))
    assert any(tokens[-1] == eos for tokens in want)
