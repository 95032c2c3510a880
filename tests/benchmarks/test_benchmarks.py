"""Every benchmark script runs to its end in its quick form and writes the figures that it promises; no figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from warm_scripts import run_script

FOLDER = Path(__file__).parents[2] / "benchmarks"
COMMON = {"title", "command", "date", "machine", "load_average_before", "load_average_after", "tables", "figures", "notes", "wall_s"}


def run(script: str, folder: Path, *options: str) -> dict[str, Any]:
    path = folder / "figures.json"
    shared = ("--quick", "--seed", "1", "--json", str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_script(FOLDER / script, *shared, *options, folder=Path.cwd(), environment=environment, timeout_s=300)
    assert done.returncode == 0, f"{script} {options}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    content: dict[str, Any] = json.loads(path.read_text())
    assert set(content) >= COMMON, f"{script}: missing {COMMON - set(content)}"
    assert str(folder) not in path.read_text(), "a published file names no path of its machine"
    return content


def need(figures: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in figures]
    assert not missing, f"missing {missing}; there are {sorted(figures)}"


def test_control_plane_quick_run_writes_steps_and_commands(tmp_path: Path) -> None:
    figures = run("control_plane.py", tmp_path, "--no-rivals")["figures"]
    need(figures, "decode step, pagedkv, 64 running, us", "decode step, core, 64 running, us")
    need(figures, *(f"decode step, check={level}, 64 running, us" for level in ("off", "step", "audit")))
    assert figures["decode step, pagedkv, 64 running, us"]["count"] > 0


def test_load_quick_run_says_what_the_self_check_adds_in_both_precisions(tmp_path: Path) -> None:
    figures = run("load.py", tmp_path, "--tiers", "auto,dense")["figures"]
    for what in ("float32, auto", "float32, dense", "bfloat16, auto", "bfloat16, dense"):
        need(figures, f"{what}, self-check, s", f"{what}, self-check, s of processors", f"{what}, with packed and fused parts, s")


def test_adapters_quick_run_compares_kinds_with_the_dense_tier(tmp_path: Path) -> None:
    figures = run("adapters.py", tmp_path, "--only", "falcon, ALiBi;gpt_neo")["figures"]
    for name in ("falcon, ALiBi", "gpt_neo"):
        need(figures, *(f"{name}, 4 sequences, {way}" for way in ("packed, tokens/s", "dense, tokens/s", "times dense")))


def test_embed_quick_run_gives_the_states_of_each_prompt_alone(tmp_path: Path) -> None:
    figures = run("embed.py", tmp_path)["figures"]
    need(figures, "one prompt at a time, s", "padded batches of 32, s", "LLM.embed, s")
    assert figures["LLM.embed, largest difference"] < 1e-4


def test_throughput_tiny_model_compares_all_ways_on_all_workloads(tmp_path: Path) -> None:
    content = run("throughput.py", tmp_path, "--model", "tiny", "--threads", "1")
    figures = content["figures"]
    for work in "ABCD":
        for who in ("pagedkv", "generate, sorted by prompt", "continuous batching"):
            need(figures, f"{work}, {who}, s", f"{work}, {who}, tokens/s", f"{work}, {who}, times the seconds of pagedkv")
            need(figures, f"{work}, {who}, requests other than alone", f"{work}, {who}, tokens other than pagedkv's")
        need(figures, f"{work}, pagedkv, preemptions", f"{work}, pagedkv, peak blocks", f"{work}, pagedkv, K/V waste %")
    need(figures, "B, generate, sorted by output, s")
    # A wrong token would make the figures worthless, so this much is judged.
    assert [figures[f"{work}, pagedkv, requests other than alone"] for work in "ABCD"] == [0] * 4, content["tables"]
    assert figures["C, pagedkv, cached prompt tokens"] > 0


def test_throughput_bfloat16_run_of_one_workload_compares_no_tokens(tmp_path: Path) -> None:
    figures = run("throughput.py", tmp_path, "--model", "tiny", "--dtype", "bfloat16", "--workloads", "b", "--rivals", "padded")["figures"]
    need(figures, "B, pagedkv, s", "B, generate, sorted by prompt, s")
    assert not [name for name in figures if name.startswith(("A", "C", "D")) or "continuous" in name or "other than" in name]


def test_compare_tiny_model_answers_every_workload_and_says_who_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    missing = ["--vllm-python", sys.executable, "--openvino-python", str(tmp_path / "nobody")]
    rivals = ["--backends", "auto,reference", "--no-transformers", *missing]
    content = run("compare.py", tmp_path, "--model", "tiny", "--threads", "1", "--plot", str(tmp_path / "plot.png"), *rivals)
    figures = content["figures"]
    for work in "ABCD":
        need(figures, f"{work}, pagedkv, s", f"{work}, pagedkv, tokens/s", f"{work}, pagedkv, CPU s", f"{work}, pagedkv, s by round")
        need(figures, f"{work}, pagedkv, cores taken by others", f"{work}, pagedkv, cores taken by others by round")
        assert figures[f"{work}, pagedkv, reference, share of tokens equal to pagedkv's"] == 1
    need(figures, "vLLM, eager, left out", "OpenVINO, left out", "llama.cpp, left out")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_attention_quick_run_measures_backends_against_the_machine(tmp_path: Path) -> None:
    figures = run("attention.py", tmp_path, "--threads", "1", "--backends", "torch,reference", "--step", "ragged", "--step", "over 128")[
        "figures"
    ]
    need(
        figures,
        "best, 1 threads, GB/s in order",
        "best, 1 threads, GFLOP/s of a float32 product",
        "best, 1 threads, GFLOP/s of a bfloat16 product",
    )
    assert not any("decode 1 x" in name for name in figures)
    for dtype, worst in (("float32", 1e-3), ("bfloat16", 5e-2)):
        for who in ("torch", "reference", "torch, contiguous"):
            decode = f"decode 4 ragged, 9/3 heads x 64, {dtype}, 1 threads, {who}"
            prefill = f"prefill 32 over 128, 32/8 heads x 128, {dtype}, 1 threads, {who}"
            need(figures, f"{decode}, GB/s", f"{decode}, % of best", f"{prefill}, GFLOP/s")
            # What computes something else would make the figures worthless, so this much is judged.
            assert figures[f"{decode}, largest error"] < worst
            assert figures[f"{prefill}, largest error"] < worst


def test_memory_quick_run_writes_layouts_block_sizes_and_prefix(tmp_path: Path) -> None:
    figures = run("memory.py", tmp_path)["figures"]
    for size in (1, 4, 16, 64):
        need(figures, f"pages of {size}, waste %", f"pages of {size}, peak bytes")
    assert figures["pages of 1, waste %"] == 0
    assert figures["C, shared, blocks that hold the prefix"] == figures["C, blocks of the prefix stored once"]
    assert figures["C, each its own, blocks that hold the prefix"] > figures["C, shared, blocks that hold the prefix"]


def test_memory_tiny_model_engine_agrees_with_the_books_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = run("memory.py", tmp_path, "--model", "tiny", "--plot", str(tmp_path / "plot.png"))["figures"]
    need(figures, "engine, waste %", "engine, its own mean_waste %", "engine, peak blocks", "engine, pool bytes")
    assert figures["engine, preemptions"] == 0
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_generate_cache_quick_run_finds_the_same_tokens_in_fewer_blocks(tmp_path: Path) -> None:
    figures = run("generate_cache.py", tmp_path, "--threads", "1")["figures"]
    for who in ("pagedkv", "pagedkv, dense"):
        for mode in ("greedy", "sampling", "beam 4", "beam 4 of 4 prompts", "4 samples of a prompt"):
            speed = "times the speed of transformers' cache"
            need(figures, *(f"{mode}, context 48, {who}, {what}" for what in ("tokens/s", speed, f"{speed} behind the first")))
            # Neither a wrong token nor a block too many is a matter of time, so this much is judged.
            assert figures[f"{mode}, context 48, {who}, rows other than with transformers' cache"] == 0
        assert figures[f"beam 4, context 48, {who}, peak share of transformers' cache"] < 0.6


def test_linear_tiny_model_measures_every_shape_and_the_step(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    products = pytest.importorskip("pagedkv.models.linear_products")
    if products.why_not_packable(torch.float32) is not None:
        pytest.skip(products.why_not_packable(torch.float32))
    figures = run("linear.py", tmp_path, "--model", "tiny", "--threads", "1")["figures"]
    for rows in (1, 4, 16, 64, 256):
        for way in ("plain", "packed", "merged"):
            need(figures, f"q_proj+k_proj+v_proj 32->32+16+16, {rows} rows, {way}, us")
        need(figures, f"lm_head 32->97, {rows} rows, packed, us")
    for rows in (1, 16, 64):
        need(figures, f"step, {rows} rows, plain, ms", f"step, {rows} rows, packed, ms")
    assert figures["packed layers"] == 15


def test_stress_quick_run_counts_what_it_audited(tmp_path: Path) -> None:
    figures = run("stress.py", tmp_path)["figures"]
    need(figures, "operations_per_cpu_s_off", "operations_per_cpu_s_step", "operations_per_cpu_s_audit", "first_seed", "last_seed")
    assert figures["checks"] >= figures["operations"] == 4000
    assert figures["violations"] == 0


def test_traces_quick_run_of_a_generated_trace_agrees_with_the_simulation(tmp_path: Path) -> None:
    figures = run("traces.py", tmp_path)["figures"]
    for pool in ("endless", "400 blocks"):
        # The share of blocks that are found is not a time: it must be right in a quick run as well.
        assert figures[f"one by one, {pool}, block hit rate %"] == pytest.approx(figures[f"one by one, {pool}, simulated %"])
    need(figures, "trace, requests a second", "loaded, 400 blocks, off, hit rate %")
    assert figures["loaded, 400 blocks, audit, checks"] == figures["loaded, 400 blocks, audit, steps"] > 0


def test_stress_run_goes_on_with_the_chunks_that_are_missing(tmp_path: Path) -> None:
    kept = tmp_path / "chunks.jsonl"
    whole = run("stress.py", tmp_path, "--resume", str(kept))["figures"]
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    kept.write_text("".join(lines[:1]))
    resumed = run("stress.py", tmp_path, "--resume", str(kept))["figures"]
    assert kept.read_text().startswith(lines[0])
    assert [json.loads(line)["number"] for line in kept.read_text().splitlines()] == [0, 1, 2, 3]
    measured = {"operations_per_cpu_s_off", "operations_per_cpu_s_step", "operations_per_cpu_s_audit", "cpu_s"}
    assert {name: value for name, value in resumed.items() if name not in measured} == {
        name: value for name, value in whole.items() if name not in measured
    }


def test_managers_quick_run_finds_nothing_in_ours_and_names_what_is_missing(tmp_path: Path) -> None:
    figures = run("managers.py", tmp_path, "--vllm-python", str(tmp_path / "none"))["figures"]
    assert figures["pagedkv, outcome"] == "no violation"
    assert figures["pagedkv, operations"] >= 500
    assert figures["vllm, outcome"].startswith("not tried: it did not run: ")
    assert str(tmp_path) not in figures["vllm, outcome"]


@pytest.mark.slow
def test_model_matrix_quick_run_judges_ours_and_continuous_batching(tmp_path: Path) -> None:
    content = run("model_matrix.py", tmp_path, "--markdown", str(tmp_path / "matrix.md"))
    figures = content["figures"]
    assert figures["pagedkv, WRONG"] == 0
    assert figures["pagedkv, right"] >= 4
    assert figures["continuous batching, eager, right"] + figures["continuous batching, eager, WRONG"] > 0
    assert figures["architectures tried"] == 6
    assert "| llama " in (tmp_path / "matrix.md").read_text()


def test_isolated_calls_that_hang_or_die_are_lost_and_the_others_answer(tmp_path: Path) -> None:
    lines = [
        "import sys; sys.path.insert(0, sys.argv[1])",
        "from isolation import run_isolated",
        "import isolated_calls",
        "if __name__ == '__main__':",
        "    answers = dict(run_isolated(isolated_calls.call, [('hang',), ('die',), ('answer',)], jobs=3, timeout_s=3.0))",
        "    assert answers[0].reason.startswith('hangs'), answers",
        "    assert answers[1].reason == 'dies (exit code 7)', answers",
        "    assert answers[2] == 'answer', answers",
    ]
    (tmp_path / "isolated_calls.py").write_text(
        "import os, time\ndef call(what):\n    if what == 'hang': time.sleep(60)\n    if what == 'die': os._exit(7)\n    return what\n"
    )
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, str(script), str(FOLDER)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_step_profile_quick_run_splits_steps_of_both_precisions_into_kinds_of_work(tmp_path: Path) -> None:
    figures = run("step_profile.py", tmp_path, "--model", "tiny", "--threads", "1")["figures"]
    for dtype in ("float32", "bfloat16"):
        for situation in ("1 running", "4 running", "prefill of 32"):
            for kind in ("planning", "linear layers", "attention", "head", "sampling", "completing", "outputs"):
                assert figures[f"{dtype}, {situation}, {kind}, s"]["median"] > 0
            need(figures, f"{dtype}, {situation}, whole step, s", f"{dtype}, {situation}, the same without clocks, s")


@pytest.mark.slow
def test_token_budget_quick_run_measures_waits_and_throughput_of_each_budget(tmp_path: Path) -> None:
    figures = run("token_budget.py", tmp_path, "--model", "tiny", "--threads", "1")["figures"]
    for budget in (32, 64):
        need(
            figures,
            f"budget {budget}, ms of a step before",
            f"budget {budget}, ms of the longest wait",
            f"budget {budget}, B, new tokens/s",
        )
        assert (
            figures[f"budget {budget}, s to its first token"]["median"] * 1e3
            > figures[f"budget {budget}, ms of the longest wait"]["median"]
        )
