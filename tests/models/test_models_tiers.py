"""The tiers below the packed one in place: logits equal the model's own, and the choice is told with its reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens
from tier_models import ADAPTED, DENSE, EQUAL, GATHERED, tier_model
from torch import Tensor

from pagedkv.attention import AttendOptions, Mask
from pagedkv.attention.ragged import attend_ragged
from pagedkv.attention.reference import ReferenceBackend
from pagedkv.errors import ConfigError, StepError, UnsupportedModelError
from pagedkv.models import ModelRunner, TierName, plan_memory
from pagedkv.models.dense import split_rows
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec
from pagedkv.testing.models import TINY_MODELS, tiny_model
from pagedkv.testing.plans import make_plan

LENS = (17, 33, 6, 25)


def _check(runner: ModelRunner, *, chunk: int, seed: int, what: str) -> None:
    tokens = random_tokens(LENS, seed=seed)
    got = paged_logits(runner, tokens, mixed_schedule(LENS, chunk=chunk, num_decodes=4), seed=seed)
    assert got[0].dtype == torch.float32
    assert_close(got, plain_logits(runner.model, tokens), relative=1e-4, what=f"{what}, chunk {chunk}, seed {seed}")


@pytest.mark.parametrize("name", [*DENSE, *EQUAL, *GATHERED])
def test_logits_ragged_chunked_and_decoding_equal_the_plain_forward(name: str) -> None:
    runner = ModelRunner(tier_model(name), block_size=4)
    kind = "gathered" if name in GATHERED else "dense"
    assert runner.tier.name == ("dense" if name in DENSE else "dense-equal" if name in EQUAL else "packed")
    assert set(runner.tier.layers) == {kind}
    _check(runner, chunk=5, seed=2, what=name)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize(("name", "tier"), [("bloom", "dense"), ("gpt_neo", "dense"), ("deepseek_v3", "auto")])
@pytest.mark.slow
def test_logits_equal_the_plain_forward_for_every_block_size(name: str, tier: TierName, block_size: int) -> None:
    runner = ModelRunner(tier_model(name, seed=3), block_size=block_size, tier=tier)
    _check(runner, chunk=7, seed=4, what=f"{name}, block size {block_size}")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "gemma2", "gpt2", "bloom", "gpt_neo") else pytest.param(name, marks=pytest.mark.slow)
        for name in (*TINY_MODELS, *ADAPTED)
    ],
)
def test_models_that_are_read_in_place_are_right_when_forced_dense(name: str) -> None:
    runner = ModelRunner(tiny_model(name) if name in TINY_MODELS else tier_model(name), block_size=4, tier="dense")
    assert runner.tier.layers == ("dense", "dense")
    assert runner.backend_name == runner.report.backend == "own"
    _check(runner, chunk=5, seed=2, what=f"{name}, dense")


def test_choice_names_what_was_against_the_faster_tier() -> None:
    tier = ModelRunner(tier_model("big_bird"), block_size=4).tier
    assert "AttentionInterface" in tier.rejected["packed"]
    assert str(tier).startswith("dense (2 layers dense); not packed: the code of BigBird")
    assert ModelRunner(tiny_model("llama"), block_size=4).tier.rejected == {}


class _Wrong(ReferenceBackend):
    """Sees everything."""

    def attend(self, query: Tensor, pool: Any, step: Any, options: AttendOptions) -> Tensor:
        return super().attend(query, pool, step, AttendOptions(mask=Mask.causal(), scale=options.scale))


def test_packed_tier_whose_numbers_are_wrong_gives_way_to_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.packed.get_backend", lambda *args, **kwargs: _Wrong())
    runner = ModelRunner(tiny_model("mistral"), block_size=4)
    assert runner.tier.name == "dense"
    assert "self-check failed: logits differ" in runner.tier.rejected["packed"]
    _check(runner, chunk=5, seed=2, what="mistral, dense")


def test_tier_that_is_forced_is_the_only_one_tried() -> None:
    with pytest.raises(UnsupportedModelError, match="does not call attention"):
        ModelRunner(tier_model("big_bird"), block_size=4, tier="packed")
    with pytest.raises(UnsupportedModelError, match="does not call attention"):
        ModelRunner(tier_model("big_bird"), block_size=4, backend="torch")
    with pytest.raises(ConfigError, match="a backend is named"):
        ModelRunner(tier_model("bloom"), block_size=4, tier="dense", backend="torch")
    with pytest.raises(ConfigError, match="must be one of auto, packed, dense, dense-equal"):
        ModelRunner(tiny_model("llama"), block_size=4, tier="fast")  # type: ignore[arg-type]


def test_second_dense_step_of_a_model_during_a_step_is_refused_and_harms_nothing() -> None:
    model = tier_model("bloom")
    runner, other = (ModelRunner(model, block_size=size, tier="dense") for size in (4, 8))
    tokens, steps = random_tokens((12, 20), seed=1), mixed_schedule((12, 20), chunk=5, num_decodes=2)
    want = paged_logits(runner, tokens, steps)
    raised: list[BaseException] = []

    def intrude(module: torch.nn.Module, arguments: object) -> None:
        with pytest.raises(StepError, match="take turns") as caught:
            paged_logits(other, tokens, steps)
        raised.append(caught.value)

    handle = model.transformer.h[1].register_forward_pre_hook(intrude)
    got = paged_logits(runner, tokens, steps)
    handle.remove()
    assert raised
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    assert paged_logits(other, tokens, steps)[0].isfinite().all()


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi", "falcon_new", "gpt_neo", "xglm", "deepseek_v3", "diffllama"])
def test_plan_of_a_config_equals_the_layers_of_the_model(name: str) -> None:
    model = tier_model(name)
    assert plan_memory(model.config, block_size=4).layers == ModelRunner(model, block_size=4).grouped_layers


def test_latents_stay_compressed_in_the_pool() -> None:
    runner = ModelRunner(tier_model("deepseek_v3"), block_size=4)
    assert runner.layers == (LayerSpec(num_kv_heads=1, key_dim=8, value_dim=4),) * 2


@pytest.mark.parametrize("mask", [Mask.causal(), Mask.sliding(5), Mask.chunked(6)], ids=str)
@pytest.mark.parametrize("variant", ["plain", "soft cap", "sinks", "slopes"])
def test_ragged_attention_equals_the_reference_over_pages(mask: Mask, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.attention.ragged._MAX_SCORES", 100)  # several rounds for the longer chunks
    generator = torch.Generator().manual_seed(11)
    heads, kv_heads, width, lens, queries = 4, 2, 8, (9, 14, 3), (1, 6, 3)
    extra = {
        "plain": {},
        "soft cap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(heads, generator=generator)},
        "slopes": {"alibi_slopes": torch.rand(heads, generator=generator)},
    }[variant]
    options = AttendOptions(mask=mask, scale=0.3, **extra)
    tables = [[3, 7, 1], [2, 8, 4, 6], [5]]
    plan = make_plan(queries, lens, block_tables=tables, block_size=4)
    batch = BatchBuilder("cpu", 4).build(plan)
    storage = KVStorage([LayerSpec(kv_heads, width, width)], num_blocks=9, block_size=4, dtype=torch.float32, device="cpu")
    key, value = (torch.randn(sum(lens), kv_heads, width, generator=generator) for _ in range(2))
    slots = [table[position // 4] * 4 + position % 4 for table, length in zip(tables, lens, strict=True) for position in range(length)]
    storage.write(0, key, value, torch.tensor(slots))
    query = torch.randn(sum(queries), heads, width, generator=generator)
    backend = ReferenceBackend()
    want = backend.attend(query, storage.layers[0], backend.plan(batch), options)
    got = attend_ragged(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), plan=plan, options=options)
    assert torch.allclose(got, want, atol=1e-5)


def test_step_is_cut_into_rows_of_one_query_length_and_of_similar_length() -> None:
    lens = [100, 128, 129, 250, 257, 5, 60, 120]
    queries = [1, 1, 1, 1, 1, 5, 5, 3]
    tables = [list(range(1, 2 + length // 4)) for length in lens]
    plan = make_plan(queries, lens, block_tables=tables, block_size=4)

    def cut(**options: bool) -> list[list[int]]:
        return [rows.seqs.tolist() for rows in split_rows(plan, **options)]

    assert cut() == [[0, 1], [2, 3], [4], [7], [5, 6]]
    assert cut(by_past=True) == [[0, 1], [2, 3], [4], [7], [5], [6]]
    assert cut(equal=True) == [[0], [1], [2], [3], [4], [7], [5], [6]]
    together = list(split_rows(plan))[-1]
    assert (together.num_keys, together.past_len) == (60, 55)
    assert together.tokens.tolist() == [list(range(5, 10)), list(range(10, 15))]
    assert together.there.sum(axis=1).tolist() == [5, 60]
    assert together.there[0, -5:].all()
