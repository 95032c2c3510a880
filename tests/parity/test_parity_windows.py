"""Windowed layer groups under an engine: sequences hold their windows and no more, and their tokens are those of ``generate``."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from parity_support import Oracle, Prompt, assert_tokens, generate, greedy, poisoned_step

from pagedkv.attention import Mask
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import ConfigError, RequestTooLargeError
from pagedkv.testing.alone import GenerateAlone
from pagedkv.testing.models import WINDOW, randomised, tiny_config
from pagedkv.testing.simulation import simulate_engine

SIZE = 4
HELD = -(-(WINDOW - 1) // SIZE) + 1  # blocks of a window, and the one that is written
WINDOWED = ("gemma3", "mistral", "gpt_oss")
MAX_NEW = 20


@pytest.fixture(scope="module")
def chunked() -> Oracle:
    """A model whose layers attend in chunks of ``WINDOW``, but for the last of four."""
    from transformers import AutoConfig

    small = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    sizes = {name: small[name] for name in names} | {"num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 64}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    config = AutoConfig.for_model("llama4_text", **sizes, **experts, attention_chunk_size=WINDOW, pad_token_id=0)
    return Oracle("llama4", randomised(config))


def prompts_of(count: int, length: int) -> list[Prompt]:
    rng = random.Random(f"windows {count} {length}")
    shared = tuple(rng.randrange(3, 97) for _ in range(length // 2))
    own = [tuple(rng.randrange(3, 97) for _ in range(length - len(shared))) for _ in range(count)]
    return [shared[: len(shared) * (2 - index % 3) // 2] + tokens for index, tokens in enumerate(own)]


def serve(oracle: Oracle, prompts: list[Prompt], config: EngineConfig, *, preempt_every: int = 0) -> Engine:
    """Run the prompts to their ends over poisoned pools, and compare every token."""
    engine = Engine(oracle.runner(SIZE), config)
    engine.fill_free_blocks(float("nan"))
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, greedy(max_tokens=MAX_NEW))
    ended, step = {}, 0
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
        step += 1
        if preempt_every and not step % preempt_every:
            engine.preempt(str(step // preempt_every % len(prompts)))
    for index, prompt in enumerate(prompts):
        want = generate(oracle.model, prompt, max_new=MAX_NEW)
        assert_tokens(ended[str(index)].outputs[0].token_ids, want.token_ids, where=f"{oracle.name}, request {index}", prompt=prompt)
    return engine


@pytest.mark.parametrize("name", WINDOWED)
def test_long_sequences_run_in_pools_of_just_their_windows(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    prompts = prompts_of(3, 70)
    config = EngineConfig(num_blocks=[160, 3 * HELD + 3], max_num_seqs=3, max_num_batched_tokens=13, watermark=0.0, check="step")
    engine = serve(oracle_of(name), prompts, config)
    account = engine.statistics()
    assert account.num_preemptions == 0
    assert account.peak_group_blocks[1] <= 3 * HELD
    assert account.peak_group_blocks[0] > 40
    assert account.peak_blocks_in_use == sum(account.peak_group_blocks)


@pytest.mark.parametrize("name", WINDOWED[:2])
def test_preempted_and_shared_windows_give_the_same_tokens(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    config = EngineConfig(num_blocks=[99, 60], max_num_seqs=4, max_num_batched_tokens=20, check="step")
    engine = serve(oracle_of(name), prompts_of(5, 50), config, preempt_every=4)
    account = engine.statistics()
    assert account.num_preemptions > 2
    assert account.cache.num_hit_tokens > 50


def test_chunked_layers_give_back_whole_chunks(chunked: Oracle) -> None:
    engine = serve(chunked, prompts_of(3, 60), EngineConfig(num_blocks=[120, 12], max_num_seqs=3, max_num_batched_tokens=13, check="audit"))
    assert chunked.runner(SIZE).windows == (None, Mask.chunked(WINDOW))
    assert engine.statistics().peak_group_blocks[1] <= 3 * WINDOW // SIZE


def test_forks_share_their_window(oracle_of: Callable[[str], Oracle]) -> None:
    oracle, (prompt,) = oracle_of("gemma3"), prompts_of(1, 51)
    engine = Engine(oracle.runner(SIZE), EngineConfig(num_blocks=[60, 3 * HELD + 1], check="audit"))
    engine.add_request("a", prompt, greedy(n=3, max_tokens=MAX_NEW))
    (ended,) = [output for _ in range(200) for output in engine.step() if output.finished]
    for completion in ended.outputs:
        want = generate(oracle.model, prompt, max_new=MAX_NEW)
        assert_tokens(completion.token_ids, want.token_ids, where=f"sample {completion.index}", prompt=prompt)
    assert engine.statistics().cache.num_copies > 0


def test_one_table_for_all_layers_can_be_had(oracle_of: Callable[[str], Oracle]) -> None:
    oracle, prompts = oracle_of("gemma3"), prompts_of(3, 60)
    engine = serve(oracle, prompts, EngineConfig(num_blocks=99, windowed_groups=False, check="step"))
    assert len(engine.statistics().cache.groups) == 1


def test_one_number_of_blocks_gives_windowed_groups_what_they_need(oracle_of: Callable[[str], Oracle]) -> None:
    runner = oracle_of("gemma3").runner(SIZE)
    few = EngineConfig(num_blocks=99, max_num_seqs=2, max_num_batched_tokens=8, watermark=0.0)
    assert [group.num_blocks for group in Engine(runner, few).statistics().cache.groups] == [98, 2 * HELD + 3 + 2]
    many = EngineConfig(num_blocks=99)
    assert [group.num_blocks for group in Engine(runner, many).statistics().cache.groups] == [98, 98]
    idle = oracle_of("mistral").runner(SIZE)
    groups = Engine(idle, few).statistics().cache.groups
    assert [group.num_blocks for group in groups] == [2 * 256 // SIZE + 2, 2 * HELD + 3 + 2]
    assert Engine(idle, few).storage.nbytes == (2 * HELD + 3 + 3) * sum(idle.group_nbytes)


@pytest.mark.parametrize("num_blocks", [[9], [9, 9, 9], [], [9, 1]])
def test_blocks_for_another_number_of_groups_are_refused(num_blocks: list[int], oracle_of: Callable[[str], Oracle]) -> None:
    with pytest.raises(ConfigError, match="num_blocks is"):
        Engine(oracle_of("gemma3").runner(SIZE), EngineConfig(num_blocks=num_blocks))


def test_request_that_no_window_can_hold_is_refused_alone(oracle_of: Callable[[str], Oracle]) -> None:
    engine = Engine(oracle_of("gemma3").runner(SIZE), EngineConfig(num_blocks=[60, HELD]))
    with pytest.raises(RequestTooLargeError, match=f"needs {HELD} blocks and there can never be more than {HELD - 1}"):
        engine.add_request("long", [5] * 40)
    engine.add_request("short", [5] * 4, greedy(max_tokens=2))
    assert [output.finished for _ in range(3) for output in engine.step()][-1]


@pytest.mark.parametrize("name", [WINDOWED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WINDOWED[1:])])
def test_lives_with_failures_and_preemptions_end_with_the_tokens_of_generate(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    runner, alone = oracle.runner(SIZE), GenerateAlone(oracle.model)
    reports = [simulate_engine(seed, runner, alone) for seed in range(6)]
    assert sum(report.num_preemptions for report in reports) > 0
