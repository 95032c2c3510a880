"""A deterministic life of an ``Engine``: arrivals, aborts, forks, failures and purges on a virtual clock, all from one seed.

Owns the load and the verdict. After every step the kit asks whether all books agree, whether somebody starves, and whether every token is
the one that its request would have got alone. Nothing here reads a real clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pagedkv.engine import Engine
from pagedkv.engine_config import EngineConfig
from pagedkv.errors import InvalidRequestError, RequestTooLargeError, StepError
from pagedkv.outputs import RequestOutput
from pagedkv.testing.hash_model import HashModel, continuation
from pagedkv.testing.lives import Life
from pagedkv.testing.replay import tables
from pagedkv.testing.simulated_load import POLICIES, Job, SimulationReport, SimulationSetting, draw_job
from pagedkv.testing.simulated_runner import Fault, SimulatedRunner
from pagedkv.testing.violations import ViolationError

if TYPE_CHECKING:
    from pagedkv.models import ModelRunner

Oracle = Callable[[Job], list[list[int]]]
_MAX_PREEMPTIONS = 3  # what a scheduler allows before it admits a request only where it is sure to fit


def simulate(seed: int, *, num_requests: int = 10) -> SimulationReport:
    """Run one random life over the hash model; the same seed gives the same plans, bit for bit.

    Args:
        seed: of everything: sizes, policy, load, failures.
        num_requests: requests that arrive.

    Returns:
        what happened, with a digest of all plans.

    Raises:
        ViolationError: a promise was broken; its notes name seed, step and setting, ``life`` is what ``simulate_life`` runs again.

    Cost: some 100 milliseconds for ten requests.
    """
    return simulate_life(Life(seed, tuple(range(num_requests))))


def simulate_engine(seed: int, runner: ModelRunner, oracle: Oracle, *, num_requests: int = 6) -> SimulationReport:
    """The same life over a real model.

    Args:
        seed: of sizes, policy, load and failures.
        runner: the model, made ready; its block size is kept.
        oracle: the greedy tokens of each continuation of a job, run alone (transformers' ``generate``, say).
        num_requests: requests that arrive.

    Raises:
        ViolationError: as for ``simulate``.
    """
    return simulate_life(Life(seed, tuple(range(num_requests))), runner, oracle)


def simulate_life(
    life: Life, runner: ModelRunner | None = None, oracle: Oracle | None = None, *, watch: Callable[[str], object] | None = None
) -> SimulationReport:
    """Run one life, whole or cut down.

    Args:
        life: what to run.
        runner: a real model, made ready, whose block size is kept; the hash model when not given.
        oracle: as for ``simulate_engine``; needed with a runner.
        watch: takes one text after the other: what happens, and all tables after each step.

    Raises:
        ViolationError: as for ``simulate``.
        InvalidRequestError: a runner without an oracle, or the other way round.
        ConfigError: a pool that no engine can have.
    """
    if (runner is None) != (oracle is None):
        raise InvalidRequestError("a runner and its oracle come together: the hash model has its own")
    size = runner.block_size if runner is not None else life.block_size
    setting = SimulationSetting.draw(random.Random(life.seed), num_blocks=life.num_blocks, block_size=size, greedy=runner is not None)
    if runner is None:
        # The engine asks no more of a runner than what the hash model has.
        runner = cast(
            "ModelRunner", HashModel(block_size=setting.block_size, max_positions=setting.max_model_len, windows=(None, *setting.windows))
        )
    return _Simulation(life, setting, runner, oracle or _HashOracle(setting), watch).noted()


class _HashOracle:
    """Greedy tokens from the prompt alone; drawn ones from an engine that serves nobody else and shares nothing."""

    def __init__(self, setting: SimulationSetting) -> None:
        self._setting = setting

    def __call__(self, job: Job) -> list[list[int]]:
        model = HashModel(block_size=16, max_positions=self._setting.max_model_len, windows=(None, *self._setting.windows))
        if not job.drawn:
            tokens = continuation(
                job.prompt,
                job.max_tokens,
                vocab_size=model.vocab_size,
                namespace=job.salt,
                windows=model.windows,
                stops=job.stops,
                min_tokens=job.min_tokens,
            )
            return [tokens] * job.n
        alone = SimulatedRunner(cast("ModelRunner", model), lambda _: job.salt)
        engine = Engine(cast("ModelRunner", alone), EngineConfig(num_blocks=256, enable_prefix_caching=False))
        # A token that would stop it is not drawn before ``min_tokens``.
        engine.add_request("alone", list(job.prompt), job.params(stops=job.min_tokens > 0))
        outputs: list[RequestOutput] = []
        while engine.has_unfinished:
            outputs += engine.step()
        return [list(each.token_ids) for each in outputs[-1].outputs]


class _Simulation:
    def __init__(
        self,
        life: Life,
        setting: SimulationSetting,
        runner: ModelRunner,
        oracle: Oracle,
        watch: Callable[[str], object] | None,
    ) -> None:
        self.life, self.setting, self.oracle, self.watch = life, setting, oracle, watch
        self.now = 0.0
        self.runner = SimulatedRunner(runner, self._salt_of)
        self.engine = Engine(
            cast("ModelRunner", self.runner), setting.engine_config(), policy=POLICIES[setting.policy], clock=lambda: self.now
        )
        self.vocab_size = runner.vocab_size
        self.jobs: dict[str, Job] = {}
        self.latest: dict[str, RequestOutput] = {}
        self.live: dict[str, None] = {}
        self.disturbed: set[str] = set()  # ended or failed from outside: their tokens are a beginning of the expected ones
        self.turn = 0
        self.eventful: list[int] = []  # turns before whose step something happened from outside
        self.report = SimulationReport()
        self.work = 0

    def noted(self) -> SimulationReport:
        try:
            return self.run()
        except Exception as error:
            broken = error if isinstance(error, ViolationError) else ViolationError("audit", f"{type(error).__name__}: {error}")
            broken.add_note(f"seed {self.life.seed}, step {self.report.num_steps}, {self.setting}")
            broken.life = replace(self.life, turns=tuple(self.eventful))
            if broken is error:
                raise
            raise broken from error

    def run(self) -> SimulationReport:
        draws = {number: random.Random(f"{self.life.seed} request {number}") for number in self.life.requests}
        arrivals = sorted((rng.uniform(0, self.setting.span), number) for number, rng in draws.items())
        while arrivals or self.engine.has_unfinished:
            if not self.engine.has_unfinished and arrivals:
                self.now = max(self.now, arrivals[0][0])
            while arrivals and arrivals[0][0] <= self.now:
                _, number = arrivals.pop(0)
                self._arrive(number, draws[number])
            if self.life.turns is None or self.turn in self.life.turns:
                self._disturb(random.Random(f"{self.life.seed} turn {self.turn}"))
            self._step()
            self.turn += 1
            self.runner.fault = None
        self._verify_idle()
        self.report.digest = self.runner.digest.hexdigest()
        return self.report

    # What happens.

    def _arrive(self, number: int, rng: random.Random) -> None:
        known = [job.prompt + tuple(self._tokens(name, 0)) for name, job in self.jobs.items()]
        job = draw_job(rng, self.setting, f"r{number}", known, self.vocab_size)
        try:
            self.engine.add_request(job.name, job.as_prompt(), job.params())
        except RequestTooLargeError as refusal:
            self.report.num_refused += 1
            if job.n == 1 and job.num_tokens <= min(self.setting.max_model_len, self.setting.capacity):
                raise ViolationError("liveness", f"{job} was refused although it fits alone") from None
            self._tell("refused", refusal, job)
            return
        self._tell("comes", job)
        self.jobs[job.name] = job
        self.live[job.name] = None
        self.work += job.n * (len(job.prompt) + job.max_tokens)

    def _disturb(self, rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.05 and self.jobs:
            name = rng.choice(list(self.jobs))
            self._happen("abort", name)
            if self.engine.abort(name):
                self.disturbed.add(name)
                self.report.num_aborted += 1
        elif kind < 0.09 and self.setting.with_preemptions and self.live:
            name = rng.choice(list(self.live))
            self._happen("preempt", name)
            self.engine.preempt(name)
        elif kind < 0.11:
            salt = rng.choice(["", "1"])
            self._happen("purge the namespace", repr(salt))
            self.engine.purge_cache(salt)
            self.report.num_purges += 1
        elif kind < 0.17 and self.life.faults:
            faults: tuple[Fault, ...] = ("before", "after", "logits")
            self.runner.fault = fault = rng.choice(faults)
            self._happen("fault", fault)

    def _step(self) -> None:
        if not self.engine.has_unfinished:
            return
        self.report.num_steps += 1
        self.now += 1.0
        bound = 200 + 30 * self.work
        if self.report.num_steps > bound:
            raise ViolationError("liveness", f"no end in sight after {bound} steps for {self.work} tokens")
        oldest, self.runner.plan = self._oldest(), None
        try:
            outputs = self.engine.step()
        except StepError as failure:
            if self.runner.fault not in ("before", "after"):
                raise
            self._tell("the step failed and was undone", failure)
            self.report.num_failed_steps += 1
            outputs = []
        finally:
            self._show_step()
        for output in outputs:
            self._take(output)
        self._verify_books()
        self._verify_oldest(oldest)
        self.engine.fill_free_blocks(float("nan"))

    def _take(self, output: RequestOutput) -> None:
        name = output.request_id
        self.latest[name] = output
        if any(each.finish_reason == "error" for each in output.outputs):
            self.disturbed.add(name)
        if not output.finished:
            return
        self._tell("ended", name, *(f"{each.finish_reason} {list(each.token_ids)}" for each in output.outputs))
        del self.live[name]
        self.report.num_ended += 1
        job = self.jobs[name]
        errors = sum(each.finish_reason == "error" for each in output.outputs)
        self.report.num_errors += errors
        if self.report.num_errors > self.runner.num_spoilt:
            raise ViolationError("liveness", f"{name} ended with {output.error!r}, and nothing was wrong with it")
        restarts = self.report.num_failed_steps + self.report.num_spoilt if self.runner.recurrent_state != "none" else 0
        if not (self.setting.with_preemptions or restarts) and output.metrics.num_preemptions > _MAX_PREEMPTIONS * job.n:
            raise ViolationError("liveness", f"{name} was preempted {output.metrics.num_preemptions} times")
        self._verify_tokens(job, output)

    # What is told of it.

    def _happen(self, what: str, about: str) -> None:
        self.eventful.append(self.turn)
        self._tell(what, about)

    def _tell(self, what: str, *about: object) -> None:
        if self.watch is not None:
            self.watch(f"turn {self.turn}: {' '.join([what, *map(str, about)])}")

    def _show_step(self) -> None:
        if self.watch is None:
            return
        owners = {self._handle(name, index): f"{name}.{index}" for name in self.live for index in range(self.jobs[name].n)}
        plan = self.runner.plan
        computed = [] if plan is None else zip(plan.seqs.tolist(), plan.query_lens.tolist(), strict=True)
        self.watch(f"--- step {self.report.num_steps}: {', '.join(f'{seq} +{count}' for seq, count in computed) or 'nothing ran'}")
        self.watch("\n".join([tables(self.engine.snapshot()), *(f"{seq} is {owner}" for seq, owner in owners.items() if seq)]))

    # The verdict.

    def _verify_tokens(self, job: Job, output: RequestOutput) -> None:
        for completion, alone in zip(output.outputs, self.oracle(job), strict=False):
            expected, got = job.until_stop(alone), list(completion.token_ids)
            ended_early = job.name in self.disturbed and completion.finish_reason in ("abort", "error")
            if got != (expected[: len(got)] if ended_early else expected):
                place = next((at for at, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), "the end")
                raise ViolationError("tokens", f"{job.name} continuation {completion.index} differs at {place}: {got}, alone {expected}")
        if job.name not in self.disturbed and len(output.outputs) != job.n:
            raise ViolationError("tokens", f"{job.name} has {len(output.outputs)} of {job.n} continuations")

    def _verify_books(self) -> None:
        self.engine.check()
        now = self.engine.statistics()
        for group in now.cache.groups:
            if group.num_free + group.num_evictable + group.num_in_use != group.num_blocks:
                raise ViolationError("accounting", f"the classes of blocks do not sum to the pool: {group}")
        running = sum(1 for name in self.live for index in range(self.jobs[name].n) if self._handle(name, index))
        if running != now.num_running or running != now.cache.num_seqs:
            raise ViolationError("accounting", f"{running} continuations hold {now.cache.num_seqs} sequences, {now.num_running} run")
        if now.num_running > self.setting.max_num_seqs:
            raise ViolationError("accounting", f"{now.num_running} sequences run, {self.setting.max_num_seqs} may")
        if self.runner.num_counted_tokens > self.setting.max_num_batched_tokens:
            most = self.setting.max_num_batched_tokens
            raise ViolationError("accounting", f"a step of {self.runner.num_counted_tokens} tokens, {most} may be")
        self.report.num_preemptions = now.num_preemptions
        self.report.num_hit_tokens, self.report.num_copies = now.cache.num_hit_tokens, now.cache.num_copies
        self.report.num_evicted = sum(group.num_evicted for group in now.cache.groups)
        self.report.peak_blocks, self.report.num_spoilt = now.peak_blocks_in_use, self.runner.num_spoilt

    def _verify_oldest(self, oldest: tuple[str, int, int] | None) -> None:
        if oldest is None or oldest[0] not in self.live:
            return
        name, index, handle = oldest
        if self.runner.recurrent_state != "none" and self.runner.fault is not None:
            return  # a fork whose first step fails starts again
        done = any(each.index == index and each.finish_reason for each in self.latest[name].outputs) if name in self.latest else False
        if not done and self._handle(name, index) != handle:
            raise ViolationError("liveness", f"{name} continuation {index} was the oldest that ran, and was preempted")

    def _verify_idle(self) -> None:
        now = self.engine.statistics()
        if self.live:
            raise ViolationError("liveness", f"{list(self.live)} never ended")
        if self.engine.num_blocks_in_use or now.cache.num_seqs or now.num_waiting:
            raise ViolationError("accounting", f"{self.engine.num_blocks_in_use} blocks are held although nothing is left to do")

    # Who is who.

    def _handle(self, name: str, index: int) -> int:
        """The sequence of a running continuation, or 0."""
        try:
            return self.engine.sequence_of(name, index)
        except ValueError:
            return 0

    def _oldest(self) -> tuple[str, int, int] | None:
        for name in self.live:
            for index in range(self.jobs[name].n):
                if handle := self._handle(name, index):
                    return name, index, handle
        return None

    def _salt_of(self, seq: int) -> int:
        owners = (name for name in self.live for index in range(self.jobs[name].n) if self._handle(name, index) == seq)
        return self.jobs[next(owners)].salt

    def _tokens(self, name: str, index: int) -> list[int]:
        output = self.latest.get(name)
        return list(output.outputs[index].token_ids) if output is not None and len(output.outputs) > index else []
