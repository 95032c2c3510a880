"""New tokens per second on workloads A to D: pagedkv beside transformers' padded `generate` and its continuous batching.

All run in this process, on the same model object, with the same token ids, greedily, to fixed output lengths. Each rival's variants (batch
sizes, page sizes) are tried once, and its fastest is measured against ours in turns. In float32 all tokens are compared.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from agreement import Agreement, margin
from common import Report, Spread, arguments, numbers, pairs
from contest import BATCH_SIZES, PAGES, Answer, Contestant, fastest, turns
from contestants import ContinuousBatching, Ours, Padded, alone
from models_by_name import NAMES as MODELS
from models_by_name import model_by_name
from transformers import PreTrainedModel
from workloads import NAMES, Workload, workload

OURS = "pagedkv"
BY_PROMPT, BY_OUTPUT = "generate, sorted by prompt", "generate, sorted by output"
CONTINUOUS = "continuous batching"
MOST_MARGINS = 4
NOTES = (
    "Spread: median (5th..95th percentile). A ratio above 1 is in favour of pagedkv; it is the median over rounds of the ratio within a"
    " round, since a round's runs follow each other under the same load. CPU seconds are the process's own, over all its threads: other"
    " processes disturb them less.",
    "Padded generate computes every row of a batch to the batch's longest output. Sorted by output, it is told the output lengths,"
    " which it could not know if sequences ended by themselves.",
    "Not timed: loading, making the LLM, making continuous batching's manager and cache. Cached prefixes do not outlive an answer.",
)


def main() -> None:
    """Load the model, hold the contests, print, write."""
    args = _options()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    report = Report("throughput: new tokens per second, one process, the same model object and token ids", args.json)
    model = model_by_name(args.model, dtype=getattr(torch, args.dtype), seed=args.seed)
    facts = f"model {args.model}, {args.dtype}, {torch.get_num_threads()} threads, seed {args.seed}, {args.repeats} rounds"
    report.note(facts + (", quick" if args.quick else ""))
    for name in args.workloads:
        vocab_size = model.config.get_text_config().vocab_size
        work = workload(name, vocab_size=vocab_size, seed=args.seed, quick=args.quick)
        warm = workload(name, vocab_size=vocab_size, seed=args.seed + 1, quick=True)
        with _field(model, work, args) as contestants:
            best = {who: _fastest(report, work, variants, warm=warm) for who, variants in contestants.items()}
            answers = _rounds(report, work, best, args.repeats)
        if args.dtype == "float32":
            _compare(report, model, work, answers=answers, sample=args.alone)
    for note in NOTES:
        report.note(note)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help=MODELS)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and K/V; tokens are compared in float32"
    )
    parser.add_argument("--workloads", type=lambda text: text.upper().split(","), default=list(NAMES), help="some of A,B,C,D")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are measured, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--alone", type=int, default=8, help="prompts of each workload that generate also answers by themselves, in float32"
    )
    parser.add_argument("--batch-sizes", type=numbers, default=BATCH_SIZES, help="padded batches that are tried")
    parser.add_argument("--pages", type=pairs, default=PAGES, help="continuous batching: PAGE_SIZExTOKENS_A_STEP,... that are tried")
    parser.add_argument("--no-sort-by-output", action="store_true", help="leave out generate over batches sorted by output length")
    parser.add_argument("--rivals", choices=("all", "padded", "none"), default="all", help="whom to run beside ours")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.batch_sizes, args.pages, args.alone = 1, (16,), PAGES[-1:], 2
    return args


@contextmanager
def _field(model: PreTrainedModel, work: Workload, args: argparse.Namespace) -> Iterator[dict[str, list[Contestant]]]:
    """Each contestant in its variants, for as long as the contest lasts."""
    sizes = sorted({min(size, work.num_requests) for size in args.batch_sizes})
    field: dict[str, list[Contestant]] = {OURS: [Ours(model)]}
    if args.rivals != "none":
        field[BY_PROMPT] = [Padded(model, batch_size=size) for size in sizes]
        if len(set(work.output_lens)) > 1 and not args.no_sort_by_output:
            field[BY_OUTPUT] = [Padded(model, batch_size=size, by="output") for size in sizes]
    if args.rivals == "all":
        field[CONTINUOUS] = [ContinuousBatching(model, page_size=page, max_batch_tokens=tokens) for page, tokens in args.pages]
    try:
        yield field
    finally:
        for variants in field.values():
            for contestant in variants:
                contestant.close()


def _rounds(report: Report, work: Workload, best: dict[str, Contestant], repeats: int) -> dict[str, Answer]:
    """Measure in turns and print the table; returns each one's last answer."""
    rounds: list[dict[str, Answer]] = []
    for number in range(repeats):
        rounds.append({name: best[name].answer(work) for name in turns(list(best), number)})
    rows = []
    for name, contestant in best.items():
        seconds = Spread.of([answers[name].seconds for answers in rounds])
        speed = Spread.of([work.num_new_tokens / answers[name].seconds for answers in rounds])
        cpu = Spread.of([answers[name].cpu_seconds for answers in rounds])
        ratio = statistics.median(answers[name].seconds / answers[OURS].seconds for answers in rounds)
        cpu_ratio = statistics.median(answers[name].cpu_seconds / answers[OURS].cpu_seconds for answers in rounds)
        rows.append([contestant.label, seconds, speed, ratio, cpu.median, cpu_ratio])
        report.figure(f"{work.name}, {name}, s", seconds)
        report.figure(f"{work.name}, {name}, tokens/s", speed)
        report.figure(f"{work.name}, {name}, CPU s", cpu)
        report.figure(f"{work.name}, {name}, times the seconds of pagedkv", ratio)
        report.figure(f"{work.name}, {name}, times the CPU seconds of pagedkv", cpu_ratio)
    report.table(str(work), ["who", "seconds", "new tokens/s", "/ pagedkv's", "CPU s", "/ pagedkv's"], rows)
    for name in best:
        facts = rounds[-1][name].facts
        for fact, value in facts.items():
            report.figure(f"{work.name}, {name}, {fact}", value)
        if facts:
            report.note(f"{name}: " + ", ".join(f"{fact} {value:,.4g}" for fact, value in facts.items()))
    return rounds[-1]


def _fastest(report: Report, work: Workload, variants: list[Contestant], *, warm: Workload) -> Contestant:
    """Warm each variant up on a small workload and, where there are several, run each once; the fastest stays."""
    for contestant in variants:
        contestant.answer(warm)

    def tell(contestant: Contestant, answer: Answer) -> None:
        report.figure(f"{work.name}, tried once, {contestant.label}, s", answer.seconds)
        print(f"tried {work.name}: {contestant.label}: {answer.seconds:.2f} s, {answer.cpu_seconds:.2f} CPU s", flush=True)

    return fastest(variants, work, tell)


def _compare(report: Report, model: PreTrainedModel, work: Workload, *, answers: dict[str, Answer], sample: int) -> None:
    """Hold all against ours, and all against generate on single prompts, which is the truth."""
    count = min(sample, work.num_requests)
    picks = [index * work.num_requests // count for index in range(count)]
    truth = {index: alone(model, work, index) for index in picks}
    tokens = {name: dict(enumerate(answer.tokens)) for name, answer in answers.items()}
    rows = []
    for name, given in tokens.items():
        to_ours, to_truth = Agreement.of(given, tokens[OURS]), Agreement.of(given, truth)
        rows.append([name, to_ours, to_truth])
        report.figure(f"{work.name}, {name}, tokens other than pagedkv's", to_ours.num_different)
        report.figure(f"{work.name}, {name}, requests other than pagedkv's", to_ours.num_unequal)
        report.figure(f"{work.name}, {name}, requests other than alone", to_truth.num_unequal)
        for index, place in list(to_truth.first.items())[:MOST_MARGINS]:
            gap = margin(model, work, index=index, answer=truth[index], place=place)
            report.note(
                f"{name}, request {index}: differs from generate alone at token {place}, where the two best logits lie {gap:.2g} apart"
            )
    title = f"{work.name}: what differs, in float32"
    report.table(title, ["who", "from pagedkv", f"from generate alone ({count} prompts)"], rows)


if __name__ == "__main__":
    main()
