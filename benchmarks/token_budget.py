"""What a step's budget of tokens costs: how long streams wait while a long prompt comes in, and new tokens per second of many requests.

Budgets take turns, on one runner. A stream gets a token from every step, so that it waits as long as the longest step.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass
from time import perf_counter, process_time

import torch
from common import Report, Spread, arguments, numbers
from contest import Watch, turns
from models_by_name import NAMES as MODELS
from models_by_name import model_by_name
from workloads import Workload, workload

from pagedkv import Engine, EngineConfig, ModelRunner, SamplingParams, measure_token_budget
from pagedkv.errors import ConfigError

BUDGETS = (128, 256, 512, 1024, 2048)
BLOCK_SIZE = 16
STREAM_PROMPT = 128
STEADY_STEPS = 8


@dataclass(frozen=True, slots=True)
class Arrival:
    """What running streams saw of a long prompt.

    Attributes:
        steady: seconds of a step before it came, the median.
        stall: seconds of the longest step until its first token.
        stall_cpu: processor seconds of the step that took most of them.
        first_token: seconds until its first token.
    """

    steady: float
    stall: float
    stall_cpu: float
    first_token: float


def main() -> None:
    """Load the model, take turns, print, write."""
    args = _options()
    torch.set_num_threads(args.threads)
    report = Report("token budget: the longest wait of running streams, and throughput", args.json)
    model = model_by_name(args.model, dtype=getattr(torch, args.dtype), seed=args.seed)
    facts = f"model {args.model}, {args.dtype}, {torch.get_num_threads()} threads, seed {args.seed}, {args.repeats} rounds"
    report.note(facts + ", quick" * args.quick)
    runner = ModelRunner(model, block_size=BLOCK_SIZE)
    for limit in args.max_step_s:
        _choose(report, runner, limit)
    budgets = {str(budget): budget for budget in args.budgets}
    work = workload(args.workload, vocab_size=runner.vocab_size, seed=args.seed, quick=args.quick)
    arrivals: dict[str, list[Arrival]] = {name: [] for name in budgets}
    speeds: dict[str, list[float]] = {name: [] for name in budgets}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in budgets}
    for number in range(args.repeats):
        for name in turns(list(budgets), number):
            arrivals[name].append(_arrival(runner, budgets[name], args))
            if not args.no_throughput:
                watch = Watch()
                _answer(runner, budgets[name], work)
                times = watch.read()
                speeds[name].append(work.num_new_tokens / times.seconds)
                cpu_seconds[name].append(times.cpu_seconds)
    _write_arrivals(report, arrivals, args)
    if not args.no_throughput:
        _write_throughput(report, work, speeds, cpu_seconds)
    report.note(
        "Spread: median (5th..95th percentile) over rounds. Ratios are to the largest budget, and medians over rounds of the ratio within a"
        " round. CPU seconds are the process's own: other processes disturb them less."
    )
    report.finish()


def _choose(report: Report, runner: ModelRunner, limit: float) -> None:
    """Say which budget is measured for a limit, and what that takes."""
    began = perf_counter()
    try:
        chosen = measure_token_budget(runner, max_step_s=limit)
    except ConfigError as error:
        report.note(f"max_step_s={limit}: {error}")
        return
    seconds = perf_counter() - began
    tried = ", ".join(f"{tokens:,}: {1e3 * spent:.0f} ms" for tokens, spent in chosen.steps)
    report.figure(f"max_step_s {limit}, budget", chosen.max_num_batched_tokens)
    report.figure(f"max_step_s {limit}, s to measure", seconds)
    report.note(f"max_step_s={limit}: {chosen.max_num_batched_tokens:,} tokens, measured in {seconds:.1f} s ({tried})")


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help=MODELS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and K/V")
    parser.add_argument("--budgets", type=numbers, default=BUDGETS, help="tokens a step")
    parser.add_argument("--streams", type=int, default=16, help="that run when the long prompt comes")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--workload", type=str.upper, default="B", help="of A,B,C,D, for throughput")
    parser.add_argument("--no-throughput", action="store_true", help="waits alone")
    limits = (0.1, 0.25, 0.5, 1.0)
    parser.add_argument("--max-step-s", type=_seconds, default=limits, help="limits that a budget is measured for, beside those above")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.budgets, args.streams, args.prompt, args.max_step_s = 1, (32, 64), 2, 128, (60.0,)
    return args


def _seconds(text: str) -> tuple[float, ...]:
    """``0.1,1`` to ``(0.1, 1.0)``."""
    return tuple(float(word) for word in text.split(","))


def _engine(runner: ModelRunner, budget: int, num_tokens: int, num_seqs: int) -> Engine:
    blocks = num_tokens // BLOCK_SIZE + num_seqs + 2
    return Engine(runner, EngineConfig(num_blocks=int(blocks * 1.02) + 2, max_num_batched_tokens=budget, enable_prefix_caching=False))


def _arrival(runner: ModelRunner, budget: int, args: argparse.Namespace) -> Arrival:
    """Let streams run, bring the long prompt, and time the steps until its first token."""
    rng = random.Random(args.seed)
    most_steps = STEADY_STEPS + 2 + -(-args.prompt // max(budget - args.streams, 1)) + args.streams * STREAM_PROMPT // budget
    params = SamplingParams(temperature=0, max_tokens=most_steps + 1, ignore_eos=True)
    engine = _engine(runner, budget, args.prompt + args.streams * (STREAM_PROMPT + most_steps) + 16, args.streams + 1)
    for stream in range(args.streams):
        engine.add_request(f"stream {stream}", rng.choices(range(runner.vocab_size), k=STREAM_PROMPT), params)
    waiting = {f"stream {stream}" for stream in range(args.streams)}
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    steady = [_step(engine)[0] for _ in range(STEADY_STEPS)]
    engine.add_request("long", rng.choices(range(runner.vocab_size), k=args.prompt), params)
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    came = False
    while not came:
        wall, cpu, came = _step(engine)
        seconds.append(wall)
        cpu_seconds.append(cpu)
    engine.close()
    return Arrival(statistics.median(steady), max(seconds), max(cpu_seconds), sum(seconds))


def _step(engine: Engine) -> tuple[float, float, bool]:
    """Seconds of one step, by the clock and of the processors, and whether it brought a token of the long prompt."""
    began, cpu_began = perf_counter(), process_time()
    outputs = engine.step()
    return perf_counter() - began, process_time() - cpu_began, any(output.request_id == "long" for output in outputs)


def _answer(runner: ModelRunner, budget: int, work: Workload) -> None:
    """Generate a workload, all requests at once."""
    engine = _engine(runner, budget, sum(work.total_lens), work.num_requests)
    for index, (prompt, length) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(str(index), list(prompt), params, stream=False)
    while engine.has_unfinished:
        engine.step()
    engine.close()


def _write_arrivals(report: Report, arrivals: dict[str, list[Arrival]], args: argparse.Namespace) -> None:
    rows = []
    for name, rounds in arrivals.items():
        figures = {
            "ms of a step before": Spread.of([each.steady for each in rounds], scale=1e3),
            "ms of the longest wait": Spread.of([each.stall for each in rounds], scale=1e3),
            "CPU ms of the longest wait": Spread.of([each.stall_cpu for each in rounds], scale=1e3),
            "s to its first token": Spread.of([each.first_token for each in rounds]),
        }
        for what, spread in figures.items():
            report.figure(f"budget {name}, {what}", spread)
        rows.append([name, *figures.values(), *_ratios(arrivals, name)])
    ratios = ["wait, ratio", "CPU of it, ratio", "first token, ratio"]
    columns = ["budget", "ms of a step before", "ms of the longest wait", "CPU ms of it", "s to its first token", *ratios]
    report.table(f"a prompt of {args.prompt:,} tokens beside {args.streams} streams", columns, rows)


def _ratios(arrivals: dict[str, list[Arrival]], name: str) -> list[float]:
    pairs = list(zip(arrivals[name], list(arrivals.values())[-1], strict=True))
    names = ("stall", "stall_cpu", "first_token")
    return [statistics.median(getattr(mine, what) / getattr(most, what) for mine, most in pairs) for what in names]


def _write_throughput(report: Report, work: Workload, speeds: dict[str, list[float]], cpu_seconds: dict[str, list[float]]) -> None:
    rows = []
    last = list(speeds)[-1]
    for name in speeds:
        speed, cpu = Spread.of(speeds[name]), Spread.of(cpu_seconds[name])
        ratio = statistics.median(mine / most for mine, most in zip(speeds[name], speeds[last], strict=True))
        cpu_ratio = statistics.median(mine / most for mine, most in zip(cpu_seconds[name], cpu_seconds[last], strict=True))
        for what, value in (("new tokens/s", speed), ("CPU s", cpu), ("new tokens/s, ratio", ratio), ("CPU s, ratio", cpu_ratio)):
            report.figure(f"budget {name}, {work.name}, {what}", value)
        rows.append([name, speed, cpu, ratio, cpu_ratio])
    report.table(str(work), ["budget", "new tokens/s", "CPU s", "tokens/s, ratio", "CPU s, ratio"], rows)


if __name__ == "__main__":
    main()
