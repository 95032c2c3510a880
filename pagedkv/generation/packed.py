"""A forward that runs packed: the new tokens of all sequences in one row, attention in place, logits laid out as the caller wants them.

Owns the translation there and back. Padding is not computed, rows that are the same are computed once, and what the prefix cache
holds not at all. How a packed step runs is the model runner's.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.core import KVCacheManager
from pagedkv.errors import StepError
from pagedkv.generation.call import ForwardCall, ForwardReader
from pagedkv.generation.growth import Growth
from pagedkv.generation.rows import Rows
from pagedkv.models import ModelRunner
from pagedkv.models.call import logits_of
from pagedkv.plan import Int64Array, StepPlan
from pagedkv.storage import BatchBuilder, KVStorage


class PackedReading:
    """Makes packed forwards of one pool.

    Args:
        runner: of a packed model.
        reader: of its arguments.

    Attributes:
        counts_columns: whether padding between the tokens of a row may count: transformers takes it for a part of a window, and a model
            that is given no positions for a distance.
    """

    def __init__(self, runner: ModelRunner, reader: ForwardReader) -> None:
        self._runner = runner
        self._reader = reader
        self._longest = runner.max_positions
        self.counts_columns = bool(runner.report.windows or runner.report.windows_not_crossed) or not reader.takes_positions
        self._batches = BatchBuilder(runner.device, runner.block_size)

    def close(self) -> None:
        """Free what the runner holds beside the model."""
        self._runner.close()

    def can_run(self, call: ForwardCall, rows: Rows) -> bool:
        """Whether a forward comes out packed as it would otherwise.

        It asks for nothing but logits of tokens, some of them no padding. And no row is longer than the runner serves: beyond, some models
        choose other frequencies for a whole batch.
        """
        if call.token_ids is None or not call.only_logits or not call.new_seen[:, call.wanted_columns].any():
            return False
        longest = int((rows.lengths(call.num_rows) + np.count_nonzero(call.new_seen, axis=1)).max())
        return self._longest is None or longest <= self._longest

    def begin(self, call: ForwardCall, growth: Growth, manager: KVCacheManager, storage: KVStorage) -> PackedForward:
        """Start a forward; it runs until ``finish`` or ``abandon``.

        Raises:
            StepError: another step of the model is running.
        """
        logits, places = _wanted_logits(call, growth)
        plan = _plan(call, growth, manager, logits)
        batch = self._batches.build(plan)
        with ExitStack() as stack:
            cache = stack.enter_context(self._runner.step(batch, storage))
            arguments: dict[str, Any] = {"input_ids": batch.token_ids[None], self._reader.cache_argument: cache, "use_cache": True}
            if self._reader.takes_positions:
                arguments["position_ids"] = batch.positions[None]
            if self._reader.takes_logits_to_keep:
                arguments["logits_to_keep"] = batch.logits_indices
            if "return_dict" in call.arguments:
                arguments["return_dict"] = call.arguments["return_dict"]
            rows = None if self._reader.takes_logits_to_keep else batch.logits_indices
            return PackedForward(
                arguments, stack.pop_all(), cache=cache, caller=call.arguments[self._reader.cache_argument], places=places, rows=rows
            )


class PackedForward:
    """One packed forward that has begun.

    Args:
        arguments: of the model, in place of the caller's.
        step: what ends with it.
        cache: of the step, in place of the caller's.
        caller: the cache that the caller passed.
        places: ``[R, n]`` int64 where the logits of each row's wanted columns are among those that are computed; -1 for padding.
        rows: ``[K]`` int64 which of the model's logits those are; None for all.
    """

    def __init__(
        self, arguments: dict[str, Any], step: ExitStack, *, cache: Any, caller: Any, places: Int64Array, rows: Tensor | None
    ) -> None:
        self.arguments = arguments
        self._step = step
        self._cache = cache
        self._caller = caller
        self._places = places
        self._rows = rows

    def finish(self, output: Any) -> Any:
        """End the step; returns the model's output as the caller would have had it.

        Raises:
            UnsupportedModelError: not every layer was stored and read.
        """
        self._step.close()
        logits = logits_of(output)

        def translated(value: Any) -> Any:
            if value is logits:
                return self._laid_out(logits[0] if self._rows is None else logits[0, self._rows])
            return self._caller if value is self._cache else value

        if isinstance(output, tuple):
            return tuple(map(translated, output))
        for name, value in output.items():
            output[name] = translated(value)
        return output

    def abandon(self) -> None:
        """End the step because the forward failed."""
        error = StepError("the forward failed")
        self._step.__exit__(StepError, error, None)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Refuses: the model was given another cache."""
        raise StepError("the model reached the caller's cache in a forward that runs packed")

    def _laid_out(self, logits: Tensor) -> Tensor:
        """``[K, V]`` computed logits as ``[R, n, V]``, zeros for padding."""
        places = torch.from_numpy(self._places).to(logits.device)
        spread = logits[places.clamp_min(0)]
        return spread if (self._places >= 0).all() else spread.masked_fill((places < 0)[..., None], 0.0)


def _wanted_logits(call: ForwardCall, growth: Growth) -> tuple[Int64Array, Int64Array]:
    """Packed tokens whose logits are wanted ``[K]``, and for each row and wanted column the place of its logits among them ``[R, n]``."""
    token = np.full((len(growth.seqs), call.num_new_columns), -1, dtype=np.int64)
    sequences = np.repeat(growth.active, growth.computed)
    token[sequences, growth.token_columns] = np.arange(len(sequences))
    wanted = token[:, call.wanted_columns]
    computed = wanted >= 0
    places = np.where(computed, np.cumsum(computed).reshape(computed.shape) - 1, -1)
    return wanted[computed], places[growth.owner]


def _plan(call: ForwardCall, growth: Growth, manager: KVCacheManager, logits: Int64Array) -> StepPlan:
    extension, token_ids = growth.extension, call.token_ids
    if extension is None or token_ids is None:
        raise StepError("a packed forward was begun without tokens")
    seqs = growth.seqs[growth.active]
    every = np.arange(len(seqs), dtype=np.int64)
    return StepPlan(
        step=0,
        seqs=seqs,
        rows=manager.rows_of(seqs),
        token_ids=token_ids[growth.token_rows, growth.token_columns].astype(np.int32),
        positions=extension.positions,
        query_lens=growth.computed,
        seq_lens=extension.seq_lens,
        cu_seqlens_q=np.concatenate([[0], np.cumsum(growth.computed)]).astype(np.int32),
        slot_mapping=extension.slot_mapping,
        block_tables=manager.table.block_tables,
        copies=extension.copies,
        num_decodes=int(np.count_nonzero(growth.computed == 1)),
        logits_indices=logits,
        sampling_seqs=every[:0],
        sampling_logits=every[:0],
    )
