"""The model outside a step: ordinary forwards, generate and training give bit for bit what they gave before."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from models_support import mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.errors import ClosedError, ConfigError, StepError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.models.bridge import attention_configs, pointed_at_us
from pagedkv.storage import BatchBuilder, KVStorage
from pagedkv.testing.models import TINY_MODELS, tiny_model
from pagedkv.testing.plans import make_plan

LENS = (12, 20)


def _ordinary_use(model: PreTrainedModel) -> list[Tensor]:
    """A cached and a cache-less forward, a padded batch, a generation, and a training step's loss and gradient."""
    tokens = random_tokens(LENS, seed=8)
    padded = torch.nn.functional.pad(tokens[0], (8, 0))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :8] = 0
    with torch.no_grad():
        results = [model(input_ids=tokens[1][None], use_cache=use).logits for use in (True, False)]
        results.append(model(input_ids=torch.stack([padded, tokens[1]]), attention_mask=mask).logits)
    results.append(model.generate(tokens[1][None], attention_mask=mask[1:], max_new_tokens=6, do_sample=False, pad_token_id=0))
    model.train()
    torch.manual_seed(0)
    loss = model(input_ids=tokens[1][None], labels=tokens[1][None]).loss
    loss.backward()
    results += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    model.eval()
    return results


def _assert_equal(got: list[Tensor], want: list[Tensor], what: str) -> None:
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(ours, theirs), f"{what}: result {number} changed"


def _implementations(model: PreTrainedModel) -> list[str | None]:
    return [config._attn_implementation for config in attention_configs(model)]


def _run(runner: ModelRunner) -> None:
    paged_logits(runner, random_tokens(LENS, seed=1), mixed_schedule(LENS, chunk=5, num_decodes=2))


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_ordinary_use_is_bit_equal_after_building_between_steps_and_after_close(name: str, implementation: str | None) -> None:
    model = tiny_model(name)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    before = _implementations(model)
    config = copy.deepcopy(model.config.to_dict())
    want = _ordinary_use(model)
    runner = ModelRunner(model, block_size=4)
    _assert_equal(_ordinary_use(model), want, f"{name} after building")
    _run(runner)
    _assert_equal(_ordinary_use(model), want, f"{name} between steps")
    _run(runner)
    runner.close()
    _assert_equal(_ordinary_use(model), want, f"{name} after close")
    assert _implementations(model) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_registered_functions_without_a_step_delegate_bit_for_bit(name: str, implementation: str | None) -> None:
    model = tiny_model(name)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    want = _ordinary_use(model)
    with pointed_at_us(attention_configs(model)):
        got = _ordinary_use(model)
    _assert_equal(got, want, name)


def test_another_thread_using_the_model_during_a_step_gets_its_ordinary_result() -> None:
    model = tiny_model("gemma2")
    runner = ModelRunner(model, block_size=4)
    tokens = random_tokens((16,), seed=2)
    want = plain_logits(model, tokens)
    got: list[Tensor] = []

    def intrude(module: torch.nn.Module, arguments: object) -> None:
        if not got:
            got.append(torch.empty(0))
            thread = threading.Thread(target=lambda: got.append(plain_logits(model, tokens)[0]))
            thread.start()
            thread.join()

    handle = model.get_decoder().layers[1].register_forward_pre_hook(intrude)
    _run(runner)
    handle.remove()
    assert torch.equal(got[1], want[0])


def test_second_step_of_a_model_during_a_step_is_refused_and_harms_nothing() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4)
    tokens, steps = random_tokens(LENS, seed=1), mixed_schedule(LENS, chunk=5, num_decodes=2)
    want = paged_logits(runner, tokens, steps)
    raised: list[BaseException] = []

    def intrude(module: torch.nn.Module, arguments: object) -> None:
        try:
            _run(runner)
        except StepError as error:
            raised.append(error)

    handle = model.get_decoder().layers[1].register_forward_pre_hook(intrude)
    got = paged_logits(runner, tokens, steps)
    handle.remove()
    assert len(raised) == len(steps)
    _assert_equal(got, want, "llama")


def test_implementation_changed_during_a_step_is_found() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4)

    def meddle(module: torch.nn.Module, arguments: object) -> None:
        model.config._attn_implementation_internal = "sdpa"

    handle = model.get_decoder().layers[1].register_forward_pre_hook(meddle)
    with pytest.raises(UnsupportedModelError, match="changed during the step"):
        _run(runner)
    handle.remove()
    _run(runner)


def test_implementation_is_restored_when_a_forward_fails() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4)
    before = _implementations(model)

    def fail(module: torch.nn.Module, arguments: object) -> None:
        raise ZeroDivisionError

    handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        _run(runner)
    handle.remove()
    assert _implementations(model) == before
    _run(runner)


def test_two_runners_share_a_model() -> None:
    model = tiny_model("gpt_oss")
    first, second = ModelRunner(model, block_size=4), ModelRunner(model, backend="reference", block_size=8)
    tokens = random_tokens(LENS, seed=3)
    steps = mixed_schedule(LENS, chunk=5, num_decodes=2)
    one, other = paged_logits(first, tokens, steps), paged_logits(second, tokens, steps)
    assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(one, other, strict=True))
    first.close()
    assert torch.equal(paged_logits(second, tokens, steps)[0], other[0])


def test_changed_weights_are_used_by_the_next_step() -> None:
    model = tiny_model("gpt_oss")
    runner = ModelRunner(model, block_size=4)
    tokens, steps = random_tokens(LENS, seed=3), mixed_schedule(LENS, chunk=5, num_decodes=2)
    other = tiny_model("gpt_oss", seed=5)
    model.load_state_dict(other.state_dict(), assign=True)
    got, want = paged_logits(runner, tokens, steps), plain_logits(other, tokens)
    assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(got, want, strict=True))


def test_forward_after_close_is_refused_and_close_may_be_repeated() -> None:
    runner = ModelRunner(tiny_model("llama"), block_size=4)
    runner.close()
    runner.close()
    with pytest.raises(ClosedError):
        _run(runner)


def test_forward_of_a_model_put_in_training_mode_is_refused() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4)
    model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        _run(runner)


def test_forward_makes_no_gradients_and_leaves_buffers_trainable() -> None:
    model = tiny_model("llama").requires_grad_(True)
    runner = ModelRunner(model, block_size=4)
    (logits,) = paged_logits(runner, random_tokens((9,), seed=1), [[(0, 9)]])
    assert not logits.requires_grad
    assert not logits.is_inference()
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_storage_of_another_geometry_is_refused_before_anything_is_written() -> None:
    runner = ModelRunner(tiny_model("llama"), block_size=4)
    batch = BatchBuilder("cpu", 4).build(make_plan([3], [3], block_tables=[[1]], block_size=4))
    other = KVStorage(runner.layers[:1], num_blocks=3, block_size=4, dtype=runner.dtype, device="cpu")
    with pytest.raises(ConfigError, match="not for this model"):
        runner.forward(batch, other)
    assert not other.layers[0].key.any()


def test_unknown_backend_and_bad_block_size_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedBackendError, match="nonesuch"):
        ModelRunner(model, backend="nonesuch")
    with pytest.raises(ConfigError, match="block_size is 0"):
        ModelRunner(model, block_size=0)
