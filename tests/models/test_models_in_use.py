"""What people do with a model, under the engine: hooks, adapters, quantised modules, several engines. Reference: ``generate`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv import LLM, SamplingParams
from pagedkv.errors import UnsupportedModelError
from pagedkv.models import CACHE_ARGUMENT, ModelRunner, load_model
from pagedkv.testing.models import tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12, 20, 21], [40], [50, 51, 52, 53, 54, 55]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def alone(model: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def served(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def engine_over(model: Any, **options: Any) -> LLM:
    """Packed linears and fused layers wherever they can be: what stands in for modules must step aside for hooks."""
    return LLM(model, block_size=4, num_blocks=32, max_num_batched_tokens=12, pack_linears=True, check="audit", **options)


def uneven(x: Tensor) -> Tensor:
    return x * torch.linspace(0.2, 1.8, x.shape[-1])  # which no norm and no argmax takes back


def scaled(module: nn.Module, arguments: Any, output: Any) -> Any:
    return (uneven(output[0]), *output[1:]) if isinstance(output, tuple) else uneven(output)


def scaled_input(module: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
    if "hidden_states" in named:
        return arguments, {**named, "hidden_states": uneven(named["hidden_states"])}
    return (uneven(arguments[0]), *arguments[1:]), named


HOOKED = (
    "model.layers.0",
    "model.layers.1.self_attn.v_proj",
    "model.layers.0.mlp",
    "lm_head",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "model.embed_tokens",
            "model.layers.0.input_layernorm",
            "model.layers.1.self_attn",
            "model.layers.1.self_attn.q_proj",
            "model.layers.0.mlp.down_proj",
            "model.norm",
        )
    ),
)


@contextmanager
def hook(model: PreTrainedModel, where: str, kind: str) -> Iterator[None]:
    if kind == "global":
        wanted = model.get_submodule(where)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, output: scaled(module, (), output) if module is wanted else None
        )
    elif kind == "before":
        handle = model.get_submodule(where).register_forward_pre_hook(scaled_input, with_kwargs=True)
    else:
        handle = model.get_submodule(where).register_forward_hook(scaled)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("where", HOOKED)
def test_hooks_that_change_outputs_work_when_added_and_when_removed(where: str) -> None:
    model = tiny_model("llama")
    plain = alone(model)
    with engine_over(model) as llm:
        assert served(llm) == plain
        for kind in ("after", "before") if where != "model.embed_tokens" else ("after",):
            with hook(model, where, kind):
                wanted = alone(model)
                assert wanted != plain, "the hook changes nothing, so that this shows nothing"
                assert served(llm) == wanted, f"{kind} {where}"
            assert served(llm) == plain, f"{kind} {where} was removed"


def test_hooks_that_are_there_before_the_engine_and_hooks_on_all_modules_work() -> None:
    model = tiny_model("llama")
    for kind in ("after", "global"):
        with hook(model, "model.layers.0.mlp", kind):
            wanted = alone(model)
            with engine_over(model) as llm:
                assert served(llm) == wanted, kind


def test_hook_that_only_looks_is_called_in_every_step_with_the_step_s_rows() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda module, arguments, output: seen.append(output.shape[1]))
    with engine_over(model) as llm:
        seen.clear()
        served(llm)
        assert sum(seen) == llm.statistics().num_computed_tokens
    handle.remove()


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as adapter libraries put one in its place."""

    def __init__(self, base_layer: nn.Linear, *, seed: int) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.disabled = base_layer, {"default": 0.5}, False
        generator = torch.Generator().manual_seed(seed)
        self.lora_a = nn.Parameter(torch.randn((2, base_layer.in_features), generator=generator) * 0.3)
        self.lora_b = nn.Parameter(torch.randn((base_layer.out_features, 2), generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        return result if self.disabled else result + self.scaling["default"] * (x @ self.lora_a.T @ self.lora_b.T)


def adapt(model: PreTrainedModel) -> list[LowRank]:
    adapters = []
    for layer in model.model.layers:
        for owner, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
            adapters.append(LowRank(getattr(owner, name), seed=len(adapters)).eval())
            setattr(owner, name, adapters[-1])
    return adapters


class Wrapper(nn.Module):
    """As PEFT's model: not a PreTrainedModel, with one inside."""

    def __init__(self, model: nn.Module, *, shift: int = 0) -> None:
        super().__init__()
        self.base_model, self.shift = model, shift

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.base_model(input_ids=input_ids + self.shift, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.base_model.generate(**kwargs)


def test_adapters_in_the_layers_are_served_switched_scaled_trained_and_merged_between_requests() -> None:
    model = tiny_model("llama")
    plain = alone(model)
    with engine_over(model) as llm:
        assert served(llm) == plain
        adapters = adapt(model)

        def switch() -> None:
            for adapter in adapters:
                adapter.disabled = True

        def scale() -> None:
            for adapter in adapters:
                adapter.disabled, adapter.scaling["default"] = False, 1.5

        def train() -> None:
            with torch.no_grad():
                for adapter in adapters:
                    adapter.lora_b.mul_(-1)

        def merge() -> None:
            for adapter in adapters:
                adapter.base_layer.weight.data += adapter.lora_b.data @ adapter.lora_a.data
                adapter.disabled = True

        seen = [plain]
        for change in (lambda: None, switch, scale, train, merge):
            change()
            wanted = alone(model)
            assert wanted != seen[-1], change
            assert served(llm) == wanted, change
            seen.append(wanted)


def test_wrapper_with_adapters_inside_is_unwrapped() -> None:
    model = tiny_model("llama")
    adapt(model)
    wrapper = Wrapper(model).eval()
    with engine_over(wrapper) as llm:
        assert llm.runner.model is model
        assert served(llm) == alone(model)
    assert ModelRunner(wrapper, block_size=4).model is model  # type: ignore[arg-type]
    assert load_model(wrapper) is model  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        (lambda: Wrapper(tiny_model("llama"), shift=1).eval(), "computes something else than the LlamaForCausalLM that it wraps"),
        (lambda: Wrapper(nn.Linear(2, 2)).eval(), "wraps a Linear, which is not a transformers PreTrainedModel"),
        (lambda: Wrapper(tiny_model("llama").train()), "training mode"),
        (lambda: Wrapper(tiny_model("llama").to("meta")).eval(), "no weights"),
        (lambda: Wrapper(tiny_model("llama"), shift=1000).eval(), "cannot be compared with the LlamaForCausalLM"),
    ],
    ids=["prompt", "linear", "training", "meta", "raises"],
)
def test_wrapper_that_cannot_be_left_out_is_refused(wrapper: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        LLM(wrapper(), block_size=4)


class Int8Linear(nn.Module):
    """Weights in int8 with a scale a row, kept as buffers, as weight-only quantisation keeps them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class DynamicInt8Linear(Int8Linear):
    """Quantises what comes in, too, by the range of the whole call."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().max().clamp_min(1e-6) / 127
        return super().forward((x / step).round() * step)


def quantised(make: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    model = tiny_model("llama")
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, make(child).eval())
    return model


def test_modules_with_quantised_weights_are_served() -> None:
    model = quantised(Int8Linear)
    wanted = alone(model)
    assert wanted != alone(tiny_model("llama"))
    with engine_over(model) as llm:
        assert served(llm) == wanted


def test_quantised_modules_whose_rows_depend_on_their_neighbours_are_refused_with_the_figures() -> None:
    model = quantised(DynamicInt8Linear)
    with pytest.raises(UnsupportedModelError, match=r"self-check failed: logits differ from the model's own forward by"):
        ModelRunner(model, block_size=4)


def test_two_engines_over_one_model_and_two_models_in_one_process_keep_apart() -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3", seed=5)
    wanted, wanted_of_other = alone(model), alone(other)
    with engine_over(model) as one, engine_over(model) as two, engine_over(other) as three:
        streams = [llm.stream(PROMPTS, GREEDY) for llm in (one, two, three)]
        found: list[dict[str, list[int]]] = [{}, {}, {}]
        live = [0, 1, 2]
        while live:  # a step of each in turn
            for place in list(live):
                output = next(streams[place], None)
                if output is None:
                    live.remove(place)
                else:
                    found[place][output.request_id] = list(output.outputs[0].token_ids)
        in_order = [[tokens[request_id] for request_id in sorted(tokens, key=int)] for tokens in found]
        assert in_order == [wanted, wanted, wanted_of_other]
        one.close()  # and with it its packed weights
        assert served(two) == wanted
    assert alone(model) == wanted


def test_model_dispatched_by_device_map_on_one_device_is_served(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    wanted = alone(tiny_model("llama"))
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    for device_map in ("cpu", parts):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
        with engine_over(model) as llm:
            assert served(llm) == wanted, device_map


@pytest.mark.parametrize("move", [lambda model: model.model.layers[1].to("meta"), lambda model: model.model.layers[0].mlp.to("meta")])
def test_model_with_layers_elsewhere_is_refused(move: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    move(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is spread over cpu, meta: one device"):
        ModelRunner(model, block_size=4)


def test_model_that_wants_a_cache_class_of_its_own_is_refused_by_name() -> None:
    model = tiny_model("llama")

    def only_its_own(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        if type(named.get(CACHE_ARGUMENT)).__name__ not in ("DynamicCache", "NoneType"):
            raise ValueError("MiniMax uses its own MiniMaxCache")

    model.model.register_forward_pre_hook(only_its_own, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="MiniMaxCache"):
        ModelRunner(model, block_size=4)


def test_model_that_leaves_our_cache_aside_is_refused() -> None:
    model = tiny_model("llama")
    model.model.register_forward_pre_hook(lambda module, arguments, named: (arguments, {**named, CACHE_ARGUMENT: None}), with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="stored no K/V"):
        ModelRunner(model, block_size=4)
