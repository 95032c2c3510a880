from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pair_models import pair_model
from state_models import state_model
from tier_models import tier_model

from pagedkv.attention.native import library
from pagedkv.attention.native.products import PairProduct
from pagedkv.cli import main
from pagedkv.testing.models import tiny_model


def test_doctor_says_which_kernel_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    attention = found["attention on the CPU"]
    loaded = library.load_library().library
    assert ("build " + loaded.build.name if loaded else "backend 'torch'") in attention["found"]
    assert found["linear layers, float32"]["found"]
    natively = loaded is not None and PairProduct.fits(torch.zeros(1, 32, dtype=torch.bfloat16), loaded)
    assert ("the native library" in found["linear layers, bfloat16"]["found"]) == natively
    assert "the native library" not in found["linear layers, float32"]["found"]


def test_doctor_without_a_library_names_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "backend 'torch'" in said
    assert "reinstall pagedkv from source where a C++ compiler" in said


def test_doctor_model_shows_the_self_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "passed" in found["self-check"]["found"]
    assert "norms and MLPs" in found["fused parts"]["found"]
    assert "bytes a token" in found["K/V"]["found"]
    assert found["tier"]["found"].startswith("packed: ")
    assert "judged by numbers" in found["self-check"]["reasons"][0]
    assert "2 x K/V of 2 heads, K 8 and V 8 wide, group 0, read in place with causal mask" in found["layers"]["reasons"]


def test_doctor_shows_the_layer_groups_and_what_a_half_precision_model_was_judged_by(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    groups = found["layer groups"]
    assert groups["found"] == "2"
    assert "every block is kept" in groups["reasons"][0]
    assert "blocks behind a sliding window of 8 are given back" in groups["reasons"][1]
    assert "judged by numbers on a float32 copy of 2 layers" in found["self-check"]["reasons"][1]


def test_doctor_tells_both_parts_of_an_encoder_decoder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pair_model("bart").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tier"]["found"].startswith("encoder-decoder: ")
    assert found["K/V"] == {
        "found": "512 bytes a token, 2,048 a block of 4",
        "reasons": ["512 bytes a token of the encoder, in the same blocks"],
    }
    assert found["positions"]["found"] == "256"
    assert found["positions"]["reasons"] == ["128 of the encoder and 128 of the decoder"]


def test_doctor_of_a_model_that_runs_dense_says_why_not_faster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tier_model("big_bird").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tier"]["found"].startswith("dense: ")
    assert "AttentionInterface" in found["tier"]["reasons"][0]
    assert main(["doctor", str(tmp_path), "--tier", "packed"]) == 1
    assert "BigBirdForCausalLM: refused" in capsys.readouterr().out


def test_doctor_of_a_model_that_runs_by_an_adapter_names_the_class_that_it_is_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tier_model("bloom").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    tier = json.loads(capsys.readouterr().out)["tier"]
    assert tier["found"].startswith("packed: ")
    assert tier["reasons"][0].startswith("by an adapter for BloomAttention, ")
    model = tier_model("bloom")
    model.config.pretraining_tp, model.config.slow_but_exact = 2, True
    model.save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    tier = json.loads(capsys.readouterr().out)["tier"]
    assert tier["found"].startswith("dense: ")
    assert "the adapter for BloomAttention does not fit" in tier["reasons"][0]
    assert "slow_but_exact" in tier["reasons"][0]


@pytest.mark.parametrize(("name", "prompts"), [("lfm2", "in chunks"), ("mamba", "in one piece")])
def test_doctor_model_with_recurrent_state_says_what_that_rules_out(
    name: str, prompts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state_model(name).save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--block-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recurrent state"]
    assert "bytes a sequence" in found["found"]
    assert "prefixes are not cached" in str(found)
    assert prompts in str(found)


def test_doctor_model_that_is_not_there_ends_with_status_1_and_the_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path / "none")]) == 1
    assert "ConfigError" in capsys.readouterr().err


def test_command_unknown_ends_with_status_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cure"])
    assert ended.value.code == 2


def test_module_is_run_by_name() -> None:
    done = subprocess.run([sys.executable, "-m", "pagedkv", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "doctor" in done.stdout
