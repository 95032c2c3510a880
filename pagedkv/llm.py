"""The friendly face: a model, prompts in, texts out, in vLLM's names.

Owns who waits for which output. All rules are the engine's, whose life and size are its keeper's.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Literal, Self, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pagedkv.attention import AttentionBackend
from pagedkv.checks import flag, integer, shown
from pagedkv.conversations import Message, as_conversations
from pagedkv.core import CheckLevel
from pagedkv.engine import Engine
from pagedkv.engine_config import EngineConfig
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError
from pagedkv.intake import Intake
from pagedkv.keeper import EngineKeeper, PoolSize
from pagedkv.lengths import Lengths
from pagedkv.models import AdaptedModel, ModelRunner, TierName, load_model, load_tokenizer
from pagedkv.outputs import EmbeddingRequestOutput, RequestOutput
from pagedkv.pooling import ONLY_PROMPT, PoolingParams
from pagedkv.prompts import ParsedPrompt, Prompt, as_params_list, as_prompt_list
from pagedkv.sampling import SamplingParams
from pagedkv.scheduling import FirstComeFirstServed, LongestCachedPrefix, Priority, SchedulingPolicy
from pagedkv.streamers import Streamer, StreamerFeed
from pagedkv.token_budget import TokenBudget, measure_token_budget, parse_max_step_s
from pagedkv.usage import EngineStatistics

_POLICIES: Mapping[str, Callable[[], SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "longest_prefix": LongestCachedPrefix,
}


class LLM:
    """Generates in batches with a Hugging Face model over a paged K/V cache.

    Args:
        model: hub id, folder, ``.gguf`` file, or a loaded language model in evaluation mode: a decoder, or an encoder-decoder, whose
            encoder then reads the prompts.
        tokenizer: hub id, folder or loaded; the model's own when not given. With a loaded model and no tokenizer, token ids go in and out.
        dtype: of weights and K/V, ``"float32"`` for one; the checkpoint's own when not given.
        device: ``"cpu"``, ``"cuda"``; CUDA when there is one.
        block_size: tokens in a block.
        num_blocks: exactly so many blocks, the null block included (where layers have windows, for those no more than they need); or
        kv_cache_memory_bytes: as many blocks as fit in so many bytes; or neither: what the submitted work can use at once.
        memory_share: with neither, never more than this share of the free memory, from above 0 to 1.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens computed in one step, and so sequences running at once.
        max_step_s: seconds that a step with a prompt in it may take, because running streams wait for it; then
            ``max_num_batched_tokens`` is only the most, and what is used is measured at load, see ``measure_token_budget`` and
            ``token_budget``. The same requests can then be cut into other steps by another process, which changes no token in float32.
        max_model_len: tokens of prompt and output together; the model's positions when not given. See ``EngineConfig``.
        enable_prefix_caching: whether prefixes are kept and shared; never with a model that has recurrent layers.
        attention_backend: ``"auto"``, a backend's name, or an ``AttentionBackend``.
        pack_linears: whether linear layers on the CPU run with repacked copies of their weights, which take memory beside the model's own;
            ``"auto"``: where it pays and memory allows. ``"int8"`` rounds the copies to eight bits: **tokens are then no longer those of
            the model**, and come faster where few are computed at a time. See ``ModelRunner`` and ``runner.packing``.
        fuse: whether norms, gates of MLPs, rotations and whole decoder layers on the CPU run as native operations where these are proven
            to compute the same. See ``ModelRunner`` and ``runner.fusion``.
        tier: ``"auto"``: the fastest way of running the model that is right; ``"packed"``, ``"dense"`` or ``"dense-equal"``: only
            that one. See ``ModelRunner`` and ``runner.tier``.
        scheduling_policy: ``"fcfs"``, ``"priority"``, ``"longest_prefix"``, or a ``SchedulingPolicy``.
        seed: for requests that bring none.
        check: how closely blocks, tables and queues are watched: ``"off"``; ``"step"``, conservation laws; ``"audit"``, everything after
            every command, for tests and debugging. See ``pagedkv.core.CheckLevel``.

    Raises:
        ConfigError: a setting that cannot work. ``UnsupportedModelError``, ``UnsupportedBackendError``: with the reason.
        PoolAllocationError: the device refused the pool of a given size.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | AdaptedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        memory_share: float = 0.5,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_step_s: float | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        attention_backend: str | AttentionBackend = "auto",
        pack_linears: bool | Literal["auto", "int8"] = "auto",
        fuse: bool | Literal["auto"] = "auto",
        tier: TierName = "auto",
        scheduling_policy: str | SchedulingPolicy = "fcfs",
        seed: int = 0,
        check: CheckLevel = "off",
    ) -> None:
        size = PoolSize(num_blocks, kv_cache_memory_bytes, memory_share)
        integer("block_size", block_size, least=1, most=2**31 - 1)  # here and now: what follows costs the loading of a model
        config = EngineConfig(  # what cannot work is refused before the model is loaded
            num_blocks=2 if num_blocks is None else num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            check=check,
        )
        policy = _policy(scheduling_policy)
        limit = None if max_step_s is None else parse_max_step_s(max_step_s)
        loaded = load_model(model, dtype=dtype, device=device)
        self._tokenizer = load_tokenizer(tokenizer, model=model)
        self._runner = ModelRunner(
            loaded, backend=attention_backend, block_size=block_size, pack_linears=pack_linears, fuse=fuse, tier=tier
        )
        self._lengths = Lengths(self._runner, max_model_len)
        self._token_budget: TokenBudget | None = None
        if limit is not None:
            most = config.max_num_batched_tokens
            budget = measure_token_budget(self._runner, max_step_s=limit, max_num_batched_tokens=most, max_model_len=max_model_len)
            self._token_budget, config = budget, replace(config, max_num_batched_tokens=budget.max_num_batched_tokens)
        self._intake = Intake(self._runner, self._lengths, self._tokenizer)
        make = partial(Engine, self._runner, tokenizer=self._tokenizer, policy=policy)
        self._keeper = EngineKeeper(make, self._runner, config, size, max_model_len=self._lengths.max_model_len)
        self._num_requests = 0
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._closed = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is one."""
        return self._tokenizer

    @property
    def runner(self) -> ModelRunner:
        """The model made ready, with the report of its self-check."""
        return self._runner

    @property
    def token_budget(self) -> TokenBudget | None:
        """What was measured at load for ``max_step_s``, and chosen; None where that was not given."""
        return self._token_budget

    @property
    def engine(self) -> Engine:
        """The engine of the latest work; raises ``ConfigError`` before the first work where the pool is sized to it."""
        engine = self._keeper.engine
        if engine is None:
            raise ConfigError("the pool is sized to the work and there was none yet: give num_blocks, or generate first")
        return engine

    def statistics(self) -> EngineStatistics:
        """A frozen account of the engine, see ``engine``."""
        return self.engine.statistics()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        streamer: Streamer | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, all at once as far as memory allows.

        Args:
            prompts: texts, token-id lists, or dicts (``PromptDict``); one or many.
            sampling_params: one for all, or one each; defaults when not given.
            use_tqdm: whether to show a progress bar.
            streamer: transformers' ``TextStreamer``, for a single prompt.

        Returns:
            Outputs in the order of the prompts.

        Raises:
            InvalidRequestError: any prompt or parameter cannot be served; then nothing is started.
            StepError: a forward pass failed; what was started by this call is ended.
        """
        work = self._work(prompts, sampling_params)
        flag("use_tqdm", use_tqdm, error=InvalidRequestError)
        feed = None if streamer is None else StreamerFeed(streamer)
        if feed is not None and (len(work) != 1 or work[0][1].n != 1):
            raise InvalidRequestError(f"a streamer takes one prompt with n=1, got {len(work)} prompts")
        return self._finished(work, use_tqdm=use_tqdm, feed=feed)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Yield an output for every prompt and step that brings it a token, with everything so far; ``request_id`` counts within the LLM.

        Arguments and errors as for ``generate``; they are checked at once, before the first output is asked for. Leaving the loop early
        ends the requests.
        """
        work = self._work(prompts, sampling_params)
        return (output for output in self._run(work, stream=True) if output is not None)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the tokenizer's chat template.

        Args:
            messages: dicts with ``role`` and ``content``; a list of them, or a list of such lists.
            sampling_params: as for ``generate``.
            use_tqdm: whether to show a progress bar.
            chat_template: instead of the tokenizer's own.
            add_generation_prompt: whether the template opens the assistant's turn.

        Raises:
            InvalidRequestError: no tokenizer, no chat template, an empty conversation, or what ``generate`` raises.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer: give one to LLM")
        if chat_template is None and self._tokenizer.chat_template is None:
            raise InvalidRequestError("the tokenizer has no chat template: give chat_template")
        prompts: list[Prompt] = []
        for conversation in as_conversations(messages):
            ids = self._tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", list(conversation)),  # typed there for text alone; templates take more
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
            prompts.append({"prompt_token_ids": cast("list[int]", ids)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The last hidden states of prompts, pooled; batched, in chunks, and for those of the last token with cached prefixes.

        Args:
            prompts: as for ``generate``; one token less than ``max_model_len`` each at most.
            pooling_params: which of the hidden states; by default those of the last token, as the model has them.
            use_tqdm: whether to show a progress bar.

        Returns:
            Outputs in the order of the prompts; ``output.outputs.embedding`` is a float32 array.

        Raises:
            InvalidRequestError: any prompt or parameter cannot be served; then nothing is started.
            UnsupportedModelError: the model's hidden states cannot be taken.
            StepError: a forward pass failed; what was started by this call is ended.
        """
        pooling = PoolingParams() if pooling_params is None else pooling_params
        if not isinstance(pooling, PoolingParams):
            raise InvalidRequestError(f"pooling_params is {shown(pooling_params)}: it must be PoolingParams(...)")
        flag("use_tqdm", use_tqdm, error=InvalidRequestError)
        work = self._work(prompts, ONLY_PROMPT)
        self._runner.check_hidden_states()
        return [EmbeddingRequestOutput.of(output) for output in self._finished(work, use_tqdm=use_tqdm, pooling=pooling)]

    def reset_prefix_cache(self) -> int:
        """Make all cached prefixes unfindable; returns how many blocks that were. For when: see ``Engine.reset_prefix_cache``."""
        engine = self._keeper.engine
        return 0 if engine is None else engine.reset_prefix_cache()

    def close(self) -> None:
        """Give the pool's memory back and leave the model as it was; may be called again."""
        self._closed = True
        self._keeper.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # How it is done.

    def _work(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[ParsedPrompt, SamplingParams]]:
        """Pair prompts with parameters and check every one, so that nothing is started when one is wrong."""
        if self._closed:
            raise ClosedError("the LLM is closed")
        several = as_prompt_list(prompts)
        if not several:
            raise InvalidRequestError("the list of prompts is empty")
        parsed = [self._intake.parse(prompt) for prompt in several]  # once: what follows takes the token ids
        work = list(zip(parsed, as_params_list(sampling_params, len(several)), strict=True))
        engine = self._keeper.prepare(map(self._length, work), in_use=bool(self._inboxes))
        for prompt, wanted in work:
            engine.check_request(prompt, wanted)
        return work

    def _length(self, work: tuple[ParsedPrompt, SamplingParams]) -> tuple[int, int]:
        """Tokens that a prompt has with its output at most, and how many sequences come of it."""
        prompt, params = work
        longest = self._lengths.max_model_len
        tokens = prompt.num_tokens + (longest if params.max_tokens is None else params.max_tokens)
        return min(tokens, longest), params.n

    def _finished(
        self,
        work: list[tuple[ParsedPrompt, SamplingParams]],
        *,
        use_tqdm: bool,
        feed: StreamerFeed | None = None,
        pooling: PoolingParams | None = None,
    ) -> list[RequestOutput]:
        """Do the work to its end, with a progress bar; its outputs in its order."""
        results: dict[str, RequestOutput] = {}
        outputs = self._run(work, stream=feed is not None, pooling=pooling)
        with tqdm(total=len(work), disable=not use_tqdm or None, desc="prompts", unit="prompt", dynamic_ncols=True) as bar:
            progress = _Progress(bar, self)
            for output in outputs:
                if feed is not None and output is not None:
                    feed.take(output)
                if output is not None and output.finished:
                    results[output.request_id] = output
                progress.update(len(results))
        return [results[request_id] for request_id in sorted(results, key=int)]

    def _run(
        self, work: list[tuple[ParsedPrompt, SamplingParams]], *, stream: bool, pooling: PoolingParams | None = None
    ) -> Iterator[RequestOutput | None]:
        """Submit the work and step until it is done; yields its outputs, and None after each step."""
        engine = self.engine
        mine: dict[str, None] = {}
        inbox: deque[RequestOutput] = deque()
        try:
            for prompt, params in work:
                request_id = str(self._num_requests)
                engine.add_request(request_id, prompt, params if pooling is None else pooling, stream=stream)
                self._num_requests += 1
                mine[request_id] = None
                self._inboxes[request_id] = inbox
            while mine:
                if not inbox:  # a step that another stream made may have brought some already
                    self._step(engine)
                while inbox:
                    output = inbox.popleft()
                    if output.finished:
                        self._forget(mine, output.request_id)
                    yield output
                yield None
        finally:
            for request_id in list(mine):
                self._forget(mine, request_id)
                if not engine.is_broken:
                    engine.abort(request_id)

    def _step(self, engine: Engine) -> None:
        """Make a step, and give each output to the call that asked for it; of one that was left, to nobody."""
        for output in engine.step():
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.append(output)

    def _forget(self, mine: dict[str, None], request_id: str) -> None:
        del mine[request_id], self._inboxes[request_id]


class _Progress:
    """Shows prompts done, tokens per second and blocks in use on a progress bar, a few times a second."""

    def __init__(self, bar: tqdm[object], llm: LLM) -> None:
        self._bar = bar
        self._engine = llm.engine
        self._before = self._engine.statistics().num_generated_tokens if not bar.disable else 0
        self._start = self._last = time.monotonic()

    def update(self, num_done: int) -> None:
        if self._bar.disable:
            return
        now = time.monotonic()
        if num_done == self._bar.n and now - self._last < 0.25:
            return
        self._last = now
        made = self._engine.statistics().num_generated_tokens - self._before
        used, there = self._engine.num_blocks_in_use, self._engine.num_usable_blocks
        self._bar.set_postfix_str(f"{made / max(now - self._start, 1e-9):.0f} tok/s, {used}/{there} blocks", refresh=False)
        self._bar.update(num_done - self._bar.n)


def _policy(given: str | SchedulingPolicy) -> SchedulingPolicy | None:
    if not isinstance(given, str):
        if not callable(getattr(given, "rank", None)) or not callable(getattr(given, "choose", None)):
            raise ConfigError(f"scheduling_policy is {shown(given)}: it must be one of {', '.join(_POLICIES)}, or a SchedulingPolicy")
        return given
    if given not in _POLICIES:
        raise ConfigError(f"scheduling_policy is {given!r}: it must be one of {', '.join(_POLICIES)}, or a SchedulingPolicy")
    return _POLICIES[given]()
