"""The loop: plan, forward, sample, book, deliver. Synchronous, no thread; the caller decides when a step happens.

Owns the order of these and nothing else: rules are the scheduler's, bytes the storage's, tokens the sampler's, outputs the outbox's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pagedkv import checks
from pagedkv.core import KVCacheManager, Snapshot
from pagedkv.core.transaction import Transaction
from pagedkv.engine_config import EngineConfig
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, InvariantError, PagedKVError, StepError
from pagedkv.intake import Intake
from pagedkv.lengths import Lengths
from pagedkv.models import ModelRunner
from pagedkv.namespaces import salt_of
from pagedkv.outbox import Outbox
from pagedkv.outputs import RequestOutput
from pagedkv.plan import StepPlan
from pagedkv.poisoning import Poison
from pagedkv.pooling import ONLY_PROMPT, Pooler, PoolingParams
from pagedkv.prompt_work import PromptWork
from pagedkv.prompts import ParsedPrompt, Prompt, as_params_list, check_priority
from pagedkv.responses import Response
from pagedkv.sampling import SampledTokens, Sampler, SamplingParams, TokenHistories, Tokenizer
from pagedkv.scheduling import Request, Scheduler, SchedulingPolicy
from pagedkv.seating import Seating
from pagedkv.sizing import blocks_given, pool_groups
from pagedkv.storage import BatchBuilder, KVStorage, Source
from pagedkv.usage import EngineStatistics, Usage


class Engine:
    """Serves many requests on one model: add them, call ``step`` until nothing is left.

    Args:
        runner: the model, made ready.
        config: sizes.
        tokenizer: for text in and out; without one, token ids only.
        policy: order of admission and preemption; first come, first served when not given.
        clock: seconds, for metrics only.

    Raises:
        PoolAllocationError: the device refused the pool; nothing was kept.
        ConfigError: a size that cannot work.

    An error in one request ends that request alone; where its logits were not finite, nobody finds any more what it has read or computed.
    When a whole step fails, ``step`` raises ``StepError`` and everything is as before it. A broken invariant that a check level finds is
    raised from the call that met it, as ``InvariantError``; nothing is undone or repaired, and ``snapshot`` shows what was found. Whatever
    else stops a command in the middle (an interrupt behind the forward pass, say) leaves something half done: every command raises
    ``InvariantError`` from then on, and only looking at the engine and ``close`` are left.

    There is no thread and no lock in here. Who calls from several threads holds one lock around every call, ``step`` included, or hands
    commands over through a queue to the one thread that steps and empties the queue between two steps.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: SchedulingPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config is {checks.shown(config)}: it must be an EngineConfig")
        self.config = config
        self._lengths = Lengths(runner, config.max_model_len)
        self.max_model_len = self._lengths.max_model_len
        self._runner = runner
        self._tokenizer = tokenizer
        self._intake = Intake(runner, self._lengths, tokenizer)
        self._decoder = cast("Tokenizer | None", tokenizer)  # its decode is typed for batches, too
        limits = config.limits()
        if runner.recurrent_state != "none":
            limits = replace(limits, recurrent_state=runner.recurrent_state)
        groups = pool_groups(runner, windowed=config.windowed_groups)
        num_blocks = blocks_given(config.num_blocks, groups, limits, block_size=runner.block_size, max_model_len=self.max_model_len)
        # Before the books, which are small beside it but not small for a pool that no device could hold.
        self._storage = runner.new_storage(num_blocks if len(num_blocks) > 1 else num_blocks[0], num_rows=limits.max_running)
        self._state = self._storage.state
        self._manager = KVCacheManager(
            num_blocks=num_blocks,
            windows=[group.window for group in groups],
            block_size=runner.block_size,
            max_num_seqs=limits.max_running,
            max_seq_len=self.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching and not limits.has_state,
            check=config.check,
        )
        self._poison = Poison.at_level(self._manager, self._storage)
        self._scheduler = Scheduler(self._manager, limits, policy=policy, clock=clock)
        self._batches = BatchBuilder(runner.device, runner.block_size)
        self._usage = Usage(self._manager)
        self._sampler = Sampler(runner.vocab_size, runner.device, max_rows=limits.max_running)
        self._seating = Seating(runner, self._sampler, tokenizer=tokenizer, seed=config.seed, num_rows=limits.max_running)
        self._prompts = PromptWork(runner, self._seating)
        self._outbox = Outbox(self._scheduler, self._seating, self._prompts)
        self._num_requests = 0
        self._closed = False
        self._change = Transaction("the engine")

    # Questions.

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended, or an ended one has not been delivered."""
        return self._scheduler.has_unfinished or self._outbox.has_ready

    @property
    def is_broken(self) -> bool:
        """Whether a command was stopped in the middle, so that all are refused from now on: close the engine, and make another."""
        return self._change.depth > 0 or self._scheduler.is_broken

    @property
    def num_blocks_in_use(self) -> int:
        """Blocks held now, in all layer groups."""
        return sum(self._manager.usable_blocks) - sum(self._manager.available_blocks)

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that there are to hold, in all layer groups."""
        return sum(self._manager.usable_blocks)

    def statistics(self) -> EngineStatistics:
        """A frozen account; O(blocks)."""
        return self._usage.statistics(self._scheduler, self._storage)

    def snapshot(self) -> Snapshot:
        """All block tables, copied out."""
        return self._manager.snapshot()

    @property
    def storage(self) -> KVStorage:
        """The K/V pools: to read, never to write."""
        return self._storage

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is one."""
        return self._tokenizer

    def sequence_of(self, request_id: str, index: int = 0) -> int:
        """The handle by which ``snapshot()`` knows a running continuation of a request; it changes with every preemption.

        Raises:
            InvalidRequestError: no such request or continuation is known, or it holds no blocks now: it waits, or has ended.
        """
        record = self._scheduler.record(request_id)
        branches = [branch for branch in record.branches if branch.index == index] if record else []
        if not branches:
            raise InvalidRequestError(f"request {request_id!r} has no continuation {index} that is known")
        if not branches[0].seq:
            raise InvalidRequestError(f"continuation {index} of request {request_id!r} holds no blocks: it is {branches[0].status}")
        return branches[0].seq

    def check(self) -> None:
        """Verify every invariant of blocks, cached prefixes, tables and queues; O(everything).

        Raises ``InvariantError`` naming a broken one, or because a command was stopped in the middle.
        """
        self._change.check()
        self._manager.check()
        self._scheduler.check()

    def explain(self, request_id: str) -> str:
        """What happened to a request and why, a line each; for live requests and the last ended ones.

        Raises:
            InvalidRequestError: no such request is known.
        """
        record = self._scheduler.record(request_id)
        if record is None:
            raise InvalidRequestError(f"request id {request_id!r} is not known: it never was, or ended long ago")
        states = ", ".join(f"{branch.index}: {branch.finish_reason or branch.status}" for branch in record.branches)
        lines = [f"request {request_id!r} ({states})", *(f"  {event}" for event in record.events)]
        num_tokens = len(record.request.prompt_token_ids) + record.request.max_tokens
        if (why := self._lengths.why_ends_at(num_tokens)) is not None:
            lines.append(f"  ends at {num_tokens} tokens: {why}")
        return "\n".join(lines)

    # Commands.

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | ParsedPrompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        stream: bool = True,
        priority: int | None = None,
    ) -> None:
        """Submit a prompt.

        Args:
            request_id: names it; free again when it has ended.
            prompt: text, token ids, or a dict (``PromptDict``).
            params: how to sample, defaults when not given; or what of the prompt's hidden states is wanted in place of a continuation, see
                ``RequestOutput.embedding``.
            stream: whether every step that brings it a token delivers an output, or only its end does.
            priority: lower goes first, under a policy that looks at it; overrides the prompt's.

        Raises:
            InvalidRequestError: the request cannot be served; nothing was changed. ``RequestTooLargeError`` if it could never fit.
            ClosedError: after ``close``.
        """
        self._check_ready()
        checks.text("request id", request_id, error=InvalidRequestError)
        checks.flag("stream", stream, error=InvalidRequestError)
        pooling, wanted = (params, ONLY_PROMPT) if isinstance(params, PoolingParams) else (None, params)
        (sampling,) = as_params_list(wanted, 1)
        parsed = self._parse(prompt, sampling)
        request = self._request(request_id, parsed, sampling, parsed.priority if priority is None else check_priority(priority))
        embeds = None if parsed.embeds is None else self._runner.as_prompt_embeds(parsed.embeds)
        if pooling is not None:
            self._runner.check_hidden_states()
            request = replace(request, wants_prompt_logits=pooling.whole_prompt)
        if not self._scheduler.has_unfinished and self._runner.altered():
            self.reset_prefix_cache()  # what the model computed before is not what it would compute now
        with self._change:
            try:
                record = self._scheduler.submit(request)
            except InvalidRequestError:  # before it changes anything
                self._change.depth = 0
                raise
            self._num_requests += 1
            pooler = None if pooling is None else Pooler(pooling, len(parsed.token_ids))
            source = None if parsed.decoder_token_ids is None else Source(parsed.token_ids)
            is_far = self._lengths.is_far(len(parsed.token_ids))
            response = Response(record, sampling, self._decoder, parsed.text, stream, pooler, embeds, is_far, source)
            self._outbox.add(request_id, response)

    def check_request(self, prompt: Prompt | ParsedPrompt, params: SamplingParams) -> ParsedPrompt:
        """Raise what ``add_request`` would raise, but for the id; returns the parsed prompt."""
        self._check_open()
        (params,) = as_params_list(params, 1)
        parsed = self._parse(prompt, params)
        self._scheduler.check_fits(self._request("", parsed, params, parsed.priority))
        return parsed

    def abort(self, request_id: str) -> bool:
        """End a request now; its output so far is delivered by the next ``step``.

        Returns:
            False when no such request is alive: unknown, or ended already (a no-op).
        """
        self._change.check()
        request_id = checks.text("request id", request_id, error=InvalidRequestError)
        with self._change:
            aborted = self._scheduler.abort(request_id)
            self._outbox.collect()
            return aborted

    def preempt(self, request_id: str) -> bool:
        """Take a running request's blocks away now; it waits and is computed again later, to the same tokens.

        Returns:
            False when no such request is running (a no-op).
        """
        self._change.check()
        return self._scheduler.preempt(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one forward pass over what the scheduler chose, and deliver what it changed.

        Returns:
            For each streaming request that got a token, and for each request that ended, one output with everything so far.

        Raises:
            StepError: the pass as a whole failed (out of memory, say) and was undone; the cause is chained. Try again, or abort something.
            ClosedError: after ``close``.
        """
        self._check_ready()
        try:
            plan = self._scheduler.plan()
            sampled = None if plan is None else self._compute(plan)
            with self._change:
                if plan is not None and sampled is not None:
                    self._book(plan, sampled)
                return self._outbox.take()
        except BaseException:
            self._undo()
            raise

    def purge_cache(self, cache_salt: str = "") -> int:
        """Make all cached prefixes of one salt unfindable; returns how many blocks that were."""
        salt = checks.text("cache_salt", cache_salt, error=InvalidRequestError)
        return sum(self._manager.purge(name) for name in self._manager.namespaces if salt_of(name) == salt)

    def reset_prefix_cache(self) -> int:
        """Make all cached prefixes unfindable; returns how many blocks that were.

        The engine does so itself where it sees that the model was altered while no request was alive: other weights, an adapter
        switched, a hook added (see ``ModelRunner.altered``). For what it cannot see, or while requests are alive, this is the way.
        """
        return sum(self._manager.purge(name) for name in self._manager.namespaces)

    def fill_free_blocks(self, value: float = 0.0) -> int:
        """Overwrite the K/V of all blocks that hold nothing: zeros erase what requests left behind, NaN proves that nobody reads it.

        Returns:
            how many blocks that were, over all layer groups. Cost: O(their bytes).
        """
        self._check_open()
        free = self._manager.free_block_ids()
        for group, block_ids in enumerate(free):
            self._storage.fill(block_ids, value, group=group)
        return sum(map(len, free))

    def close(self) -> None:
        """Give the pool's memory back; may be called again. Requests that have not ended are gone."""
        if not self._closed:
            self._closed = True
            self._storage.close()
            self._outbox.clear()
            self._seating.clear()

    # How it is done.

    def _compute(self, plan: StepPlan) -> SampledTokens:
        """Run the forward pass and draw the tokens; nothing of it counts before it is booked."""
        try:
            with torch.no_grad():
                self._seating.assign(self._scheduler, self._outbox.responses, self._state)
                plan = self._prompts.trimmed(plan)
                batch = self._batches.build(plan, self._seating.sources(plan.rows))
                self._storage.copy_blocks(plan.copies)
                if self._poison is not None:
                    self._poison.spread(plan)
                logits = self._prompts.forward(batch, self._storage)
                sampled = self._sample(plan, logits)
                self._prompts.book_logprobs(plan, logits)
                return sampled
        except PagedKVError:
            raise
        except Exception as error:
            raise StepError(f"step {plan.step} with {plan.num_tokens} tokens of {plan.num_seqs} sequences failed: {error}") from error

    def _undo(self) -> None:
        """Take back a plan that was not completed: whatever stopped the step, an interrupt from the keyboard too, all is as before it."""
        plan = self._scheduler.outstanding
        if plan is not None:
            self._scheduler.undo(plan)
            self._change.depth = 0  # what was entered had changed nothing
            with self._change:
                self._outbox.collect()  # who was aborted during the step has ended now

    def _book(self, plan: StepPlan, sampled: SampledTokens) -> None:
        """Make a step count, and hand on what it brought."""
        rows = plan.rows[plan.sampling_seqs]
        self._scheduler.complete(plan, sampled.token_ids.astype(np.int32))
        if self._state is not None:
            self._state.commit()
        self._usage.book(num_computed=plan.num_tokens, num_generated=len(rows) - len(sampled.errors))
        for index, failure in sampled.errors.items():
            if isinstance(failure, InvariantError):  # logits that are not finite, which earlier steps without logits may be to blame for
                self._manager.distrust(plan.seqs[plan.sampling_seqs[[index]]])
            self._outbox.fail(int(rows[index]), failure)
        self._outbox.feed(rows, sampled)

    def _sample(self, plan: StepPlan, logits: Tensor) -> SampledTokens:
        if len(plan.sampling_logits) != len(logits):
            logits = logits[torch.from_numpy(plan.sampling_logits).to(logits.device)]
        table = self._manager.table
        histories = TokenHistories(table.token_ids, table.num_tokens, self._seating.begins)
        return self._sampler.sample(logits, plan.rows[plan.sampling_seqs], histories)

    def _parse(self, prompt: Prompt | ParsedPrompt, params: SamplingParams) -> ParsedPrompt:
        """A prompt in one form; raises ``InvalidRequestError`` for what of it and its parameters cannot be served."""
        parsed = self._intake.parse(prompt)
        self._intake.check(parsed, params)
        self._seating.check(params, len(parsed.token_ids if parsed.decoder_token_ids is None else parsed.decoder_token_ids))
        return parsed

    def _request(self, request_id: str, parsed: ParsedPrompt, params: SamplingParams, priority: int) -> Request:
        return self._intake.request(request_id, parsed, params, priority=priority, number=self._num_requests)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")

    def _check_ready(self) -> None:
        """Raise ``ClosedError`` or, when a command was stopped in the middle, ``InvariantError``."""
        self._check_open()
        self._change.check()
