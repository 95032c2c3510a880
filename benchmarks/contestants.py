"""Who generates: ours, and transformers' two ways, on the same model object with the same token ids.

A contestant answers one workload and says how long that took. It owns how the library at hand is called well; it does not own the
comparison (``throughput.py``). What is made once for many answers (an LLM, a manager and its cache) is made outside the timed part, for all
alike; nothing that one answer left in a cache may serve the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from contest import Answer, Watch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from workloads import Workload

from pagedkv import LLM, Engine, EngineStatistics, SamplingParams
from pagedkv.errors import ConfigError

NEVER = -1  # a token id that does not exist: ends no sequence
SAFETY = 0.2  # share of blocks kept free: continuous batching admits nothing below 0.15


class Ours:
    """``LLM.generate`` with token ids; its pool is sized to the work. Cached prefixes are purged between answers.

    Args:
        model: loaded.
        backend: of attention, by name.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str = "auto") -> None:
        self._llm = LLM(model, attention_backend=backend)
        self._backend = backend

    @property
    def label(self) -> str:
        return "pagedkv" if self._backend == "auto" else f"pagedkv, attention {self._backend}"

    def answer(self, workload: Workload) -> Answer:
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in workload.output_lens]
        prompts = [list(prompt) for prompt in workload.prompts]
        engine, before = self._purged()
        watch = Watch()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        times = watch.read()
        after = self._llm.statistics()
        if before is None or self._llm.engine is not engine:  # a larger pool is a new engine, which counts from 0
            steps, preemptions = after.num_steps, after.num_preemptions
        else:
            steps, preemptions = after.num_steps - before.num_steps, after.num_preemptions - before.num_preemptions
        facts = {
            "steps": steps,
            "preemptions": preemptions,
            "peak blocks": after.peak_blocks_in_use,
            "pool MiB": after.pool_nbytes / 2**20,
            "K/V waste %": 100 * after.mean_waste,
            "cached prompt tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        }
        return Answer(times, [list(output.outputs[0].token_ids) for output in outputs], facts)

    def close(self) -> None:
        self._llm.close()

    def _purged(self) -> tuple[Engine | None, EngineStatistics | None]:
        try:
            engine = self._llm.engine
        except ConfigError:  # no engine before the first work
            return None, None
        engine.purge_cache()
        return engine, engine.statistics()


class Padded:
    """``model.generate`` over left-padded batches of requests sorted by length; each batch runs to its longest output.

    Args:
        model: loaded.
        batch_size: requests in a batch.
        by: ``"prompt"``: sorted by prompt length; ``"output"``: by output length, which a caller knows only when, as here, no
            request can end early.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int, by: str = "prompt") -> None:
        self._model: Any = model  # transformers' types do not know generate
        self._batch_size, self._by = batch_size, by

    @property
    def label(self) -> str:
        return f"generate, padded, sorted by {self._by}, batches of {self._batch_size}"

    def answer(self, workload: Workload) -> Answer:
        tokens: list[list[int]] = [[] for _ in workload.prompts]
        computed = 0
        watch = Watch()
        for batch in self._batches(workload):
            new = max(workload.output_lens[index] for index in batch)
            rows = self._generate([workload.prompts[index] for index in batch], new)
            for index, row in zip(batch, rows, strict=True):
                tokens[index] = row[: workload.output_lens[index]]
            computed += len(batch) * new
        times = watch.read()
        return Answer(times, tokens, {"new tokens computed for each wanted": computed / workload.num_new_tokens})

    def close(self) -> None:
        pass

    def _batches(self, workload: Workload) -> Iterator[list[int]]:
        prompts, outputs = [len(prompt) for prompt in workload.prompts], list(workload.output_lens)
        first, second = (prompts, outputs) if self._by == "prompt" else (outputs, prompts)
        order = sorted(range(workload.num_requests), key=lambda index: (first[index], second[index]))
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def _generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self._model.device
        config = _generation_config(new)
        result = self._model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        rows: list[list[int]] = result[:, width:].tolist()
        if any(len(row) != new for row in rows):
            raise RuntimeError(f"generate made {len(rows[0])} tokens where {new} were asked for")
        return rows


class ContinuousBatching:
    """transformers' continuous batching: the manager behind ``generate_batch``, which alone takes an output length for each request.

    The cache holds all requests at their longest, and more by the share that its scheduler wants free. Making the manager is not timed.

    Args:
        model: loaded.
        page_size: tokens in a page.
        max_batch_tokens: tokens computed in one step.
    """

    def __init__(self, model: PreTrainedModel, *, page_size: int, max_batch_tokens: int) -> None:
        self._model: Any = model
        self._page_size, self._max_batch_tokens = page_size, max_batch_tokens

    @property
    def label(self) -> str:
        return f"continuous batching, pages of {self._page_size}, {self._max_batch_tokens:,} tokens a step"

    def answer(self, workload: Workload) -> Answer:
        pages = sum(-(-length // self._page_size) + 1 for length in workload.total_lens)
        config = ContinuousBatchingConfig(
            page_size=self._page_size,
            num_blocks=math.ceil(pages / (1 - SAFETY)) + 1,
            max_batch_tokens=self._max_batch_tokens,
            max_requests_per_batch=workload.num_requests,
        )
        with self._model.continuous_batching_context_manager(
            generation_config=_generation_config(max(workload.output_lens)), continuous_batching_config=config, timeout=5
        ) as manager:
            watch = Watch()
            for index, (prompt, length) in enumerate(zip(workload.prompts, workload.output_lens, strict=True)):
                manager.add_request(list(prompt), request_id=str(index), max_new_tokens=length, eos_token_id=NEVER)
            results: dict[int, list[int]] = {}
            while len(results) < workload.num_requests:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"continuous batching failed on request {result.request_id}: {result.error}")
                    results[int(result.request_id)] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before its requests did")
            times = watch.read()
        return Answer(times, [results[index] for index in range(workload.num_requests)])

    def close(self) -> None:
        pass


def alone(model: PreTrainedModel, workload: Workload, index: int) -> list[int]:
    """The new tokens of one request by ``model.generate`` with nothing beside it: the truth that all are held against."""
    prompt = torch.tensor([workload.prompts[index]], device=model.device)
    new = workload.output_lens[index]
    generate: Any = model.generate
    result = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=_generation_config(new))
    tokens: list[int] = result[0, prompt.shape[1] :].tolist()
    return tokens


def _generation_config(new: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=NEVER, pad_token_id=0)  # type: ignore[no-untyped-call]
