"""Every architecture that the installed transformers can build, in every mix of requests, against transformers' own generate.

Each decoder of transformers' registry is shrunk until it runs in milliseconds and given wide random weights. Its greedy tokens over our
engine (ragged prompts in chunks, prefix hits, forks, preemption; windows shorter than the prompts) are compared with ``generate`` of each
prompt alone, and beside it those of transformers' continuous batching. Encoder-decoders are listed.

Run it again for a new release of transformers: what is new there appears by itself, and what the general sizes do not fit is named under
"not built", with what transformers said, for ``_OVERRIDES`` in ``pagedkv/testing/architectures.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common import Report, arguments, without_paths
from isolation import Lost, run_isolated
from matrix_trials import (
    FAILS,
    INCONSISTENT,
    NO_REFERENCE,
    NOT_BUILT,
    REFUSED,
    RIGHT,
    WRONG,
    Verdict,
    try_continuous_batching,
    try_ours,
    try_seq2seq,
)
from verdict_store import VerdictStore

from pagedkv.testing.architectures import decoder_architectures, encoder_decoder_architectures

QUICK = ("bloom", "deepseek_v3", "gemma3_text", "llama", "mamba", "moshi")
IMPLEMENTATIONS = ("sdpa", "eager")
PRELOAD = ("matrix_trials", "transformers", "pagedkv.testing.parity")
KINDS = (RIGHT, WRONG, FAILS, REFUSED, INCONSISTENT, NO_REFERENCE, NOT_BUILT)
Verdicts = dict[str, Verdict]
Trial = Callable[..., Verdict]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", help="these architectures, separated by commas")
    parser.add_argument("--no-rivals", action="store_true", help="leave transformers' continuous batching out")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that one trial may take")
    parser.add_argument("--store", type=Path, metavar="PATH", help="verdicts are added to this file, and those in it are not tried again")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the tables to this file")
    options = parser.parse_args()
    report = Report("Every architecture of this transformers: our engine and its own continuous batching against generate", options.json)
    decoders, seq2seq = chosen(options)
    ours = run(decoders, try_ours, options)
    rivals = {} if options.no_rivals else run_rivals(ours, options)
    write(report, ours, rivals, run(seq2seq, try_seq2seq, options))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown())
    report.finish()
    if any(verdict.kind == WRONG for verdict in ours.values()):
        raise SystemExit("an architecture is silently wrong")


def chosen(options: Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The decoders and the encoder-decoders to try."""
    decoders, seq2seq = decoder_architectures(), encoder_decoder_architectures()
    if options.quick:
        return QUICK, seq2seq[:1]
    if options.only is None:
        return decoders, seq2seq
    names = options.only.split(",")
    unknown = sorted(set(names) - set(decoders) - set(seq2seq))
    if unknown:
        raise SystemExit(f"transformers names no language model for {', '.join(unknown)}")
    return tuple(name for name in names if name in decoders), tuple(name for name in names if name in seq2seq)


def run(names: Sequence[str], trial: Trial, options: Namespace) -> Verdicts:
    """A trial of our own for each architecture."""
    return collect({name: (name, options.seed) for name in names}, trial, options)


def run_rivals(ours: Mapping[str, Verdict], options: Namespace) -> dict[str, Verdicts]:
    """Continuous batching by implementation of attention, for every architecture whose ``generate`` gives something to compare with."""
    names = [name for name, verdict in ours.items() if verdict.expected]
    return {
        implementation: collect(
            {name: (name, options.seed, implementation, ours[name].expected, ours[name].inconsistent) for name in names},
            try_continuous_batching,
            options,
            implementation,
        )
        for implementation in IMPLEMENTATIONS
    }


def collect(calls: Mapping[str, tuple[object, ...]], trial: Trial, options: Namespace, *more: str) -> Verdicts:
    """The verdicts in the order of the calls; progress is printed as they come. ``more`` tells calls of one trial apart."""
    store = VerdictStore(options.store)
    verdicts: dict[str, Verdict | None] = {name: store.get(trial.__name__, name, options.seed, *more) for name in calls}
    missing = [name for name, verdict in verdicts.items() if verdict is None]
    arguments_of_missing = [calls[name] for name in missing]
    done = len(calls) - len(missing)
    for index, answer in run_isolated(trial, arguments_of_missing, jobs=options.jobs, timeout_s=options.timeout, preload=PRELOAD):
        verdict = Verdict(FAILS, answer.reason) if isinstance(answer, Lost) else answer
        verdicts[missing[index]] = verdict
        store.keep(verdict, trial.__name__, missing[index], options.seed, *more)
        done += 1
        words = f": {verdict.detail}" if verdict.detail else ""
        print(f"{done}/{len(calls)} {missing[index]} {verdict.kind} {verdict.tier}{without_paths(words)[:160]}", flush=True)
    return {name: verdict for name, verdict in verdicts.items() if verdict is not None}


def write(report: Report, ours: Verdicts, rivals: Mapping[str, Verdicts], seq2seq: Verdicts) -> None:
    columns = {"pagedkv": ours, **{f"continuous batching, {name}": verdicts for name, verdicts in rivals.items()}}
    counts = {who: Counter(verdict.kind for verdict in verdicts.values()) for who, verdicts in columns.items()}
    report.figure("architectures tried", len(ours))
    report.table("Decoders", ["", *columns], [[kind, *(counts[who][kind] for who in columns)] for kind in KINDS])
    for who, verdicts in columns.items():
        for kind in KINDS:
            report.figure(f"{who}, {kind}", counts[who][kind])
        for name, verdict in verdicts.items():
            report.figure(f"{who}: {name}", f"{_cell(verdict)}: {without_paths(verdict.detail)}" if verdict.detail else _cell(verdict))
    tiers = Counter(verdict.tier for verdict in ours.values() if verdict.kind == RIGHT)
    report.table("Right ones by tier", ["tier", "architectures"], sorted(tiers.items()))
    rows = [[name, *(_cell(verdicts.get(name)) for verdicts in columns.values())] for name in ours]
    report.table("Each decoder", ["architecture", *columns], rows)
    write_mixes(report, ours)
    if reasons(ours):
        report.listing("Not right, and why", reasons(ours))
    report.table("Encoder-decoders, and decoders that hear", ["", "pagedkv"], [[name, _cell(verdict)] for name, verdict in seq2seq.items()])
    if reasons(seq2seq):
        report.listing("Not right among them, and why", reasons(seq2seq))


def write_mixes(report: Report, ours: Verdicts) -> None:
    """How much of each mix there was, so that nobody is right by having been asked nothing."""
    columns = ["mix", "architectures", "outputs compared", "preemptions", "tokens from prefix hits", "largest error of a logprob"]
    rows: list[list[object]] = []
    right = [verdict.mixes for verdict in ours.values() if verdict.kind == RIGHT]
    for mixes in zip(*right, strict=True):
        outputs, preemptions = sum(mix.num_outputs for mix in mixes), sum(mix.num_preemptions for mix in mixes)
        cached, worst = sum(mix.num_cached_tokens for mix in mixes), max(mix.max_logprob_error for mix in mixes)
        rows.append([mixes[0].name, len(mixes), outputs, preemptions, cached, f"{worst:.1e}"])
    report.table("What the right ones went through", columns, rows)


def reasons(verdicts: Verdicts) -> list[tuple[str, str]]:
    return [(name, f"{each.kind}: {without_paths(each.detail)}") for name, each in verdicts.items() if each.kind != RIGHT]


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return "-"
    return f"{verdict.kind}, {verdict.tier}" if verdict.kind == RIGHT and verdict.tier else verdict.kind


if __name__ == "__main__":
    main()
