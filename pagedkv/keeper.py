"""The engine that an ``LLM`` works with: how large its pool is, and when it is another one.

Owns the engine's life. Does not own what it is asked (``LLM``), nor how blocks are counted (``sizing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import le

from pagedkv.checks import integer, number
from pagedkv.engine import Engine
from pagedkv.engine_config import EngineConfig
from pagedkv.errors import ConfigError
from pagedkv.models import ModelRunner
from pagedkv.models.memory import free_memory
from pagedkv.sizing import blocks_for_work, blocks_needed, fit_in_memory, pool_groups


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How large a pool is to be.

    Args:
        num_blocks: exactly so many blocks; or
        kv_cache_memory_bytes: as many as fit in so many bytes; or neither: what the work can use at once.
        memory_share: with neither, never more than this share of the free memory, from above 0 to 1.

    Raises:
        ConfigError: names the setting. What ``num_blocks`` can be is for ``EngineConfig`` to say.
    """

    num_blocks: int | None
    kv_cache_memory_bytes: int | None
    memory_share: float

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_blocks and kv_cache_memory_bytes were both given: give one")
        if self.kv_cache_memory_bytes is not None:
            integer("kv_cache_memory_bytes", self.kv_cache_memory_bytes, least=1)
        if not 0 < number("memory_share", self.memory_share, limit="from above 0 to 1") <= 1:
            raise ConfigError(f"memory_share is {self.memory_share}: it must be from above 0 to 1")


class EngineKeeper:
    """Keeps one engine: from the start where its pool has a size, else from the first work on.

    Args:
        make: makes an engine of these sizes.
        runner: the model that it runs.
        config: its sizes, but for the blocks.
        size: of its pool.
        max_model_len: what it lets a sequence be long.

    Raises:
        ConfigError: the bytes given are too few. ``PoolAllocationError``: the device refused them, or the blocks given.
    """

    def __init__(
        self, make: Callable[[EngineConfig], Engine], runner: ModelRunner, config: EngineConfig, size: PoolSize, *, max_model_len: int
    ) -> None:
        self._make = make
        self._runner = runner
        self._config = config
        self._limits = config.limits()
        self._memory_share = size.memory_share
        self._groups = pool_groups(runner)
        self._fixed: int | list[int] | None = size.num_blocks
        if size.kv_cache_memory_bytes is not None:
            needed = blocks_needed(self._groups, self._limits, block_size=runner.block_size, max_model_len=max_model_len)
            rows = self._limits.max_running
            self._fixed = self._fit(size.kv_cache_memory_bytes, needed, setting="kv_cache_memory_bytes", num_rows=rows)
        self._engine = None if self._fixed is None else self._new(self._fixed)

    @property
    def engine(self) -> Engine | None:
        """The latest; None before the first work where the pool is sized to it."""
        return self._engine

    def prepare(self, lengths: Iterable[tuple[int, int]], *, in_use: bool) -> Engine:
        """The engine for some work: another one where the last was broken, or is too small and not in use.

        Args:
            lengths: per sequence ``(tokens at its longest, how many such sequences)``.
            in_use: whether somebody waits for more of the engine that there is.

        Raises:
            ConfigError: not even the least blocks fit in the memory. ``PoolAllocationError``: the device refused them all the same.
        """
        if self._engine is not None and self._engine.is_broken:
            self._drop(self._engine)
        if self._fixed is None:
            return self._fitting(list(lengths), in_use=in_use)
        if self._engine is None:
            self._engine = self._new(self._fixed)
        return self._engine

    def close(self) -> None:
        """Give the pool's memory back; the engine can still be looked at."""
        if self._engine is not None:
            self._engine.close()

    def _fitting(self, lengths: list[tuple[int, int]], *, in_use: bool) -> Engine:
        """An engine with pools, and slots for recurrent state, as large as this work can use, or as large as they are already.

        A larger pool is a new one: what the old one had cached is gone.
        """
        engine, has_state = self._engine, bool(self._runner.states)
        blocks = blocks_for_work(lengths, self._groups, self._limits, block_size=self._runner.block_size)
        rows = min(sum(count for _, count in lengths), self._limits.max_running) if has_state else 0
        held, have_rows, have = 0, 0, [0] * len(blocks)
        if engine is not None:
            now = engine.statistics()
            held, have = now.pool_nbytes + now.state_nbytes, [group.num_blocks + 1 for group in now.cache.groups]
            have_rows = engine.config.max_num_seqs if has_state else 0
            rows, blocks = max(rows, have_rows), list(map(max, blocks, have))
            if (blocks == have and rows == have_rows) or in_use or now.num_running or now.num_waiting:
                return engine
        memory = int((free_memory(self._runner.device) + held) * self._memory_share)
        blocks = self._fit(memory, blocks, setting=f"memory_share={self._memory_share} of free memory", num_rows=rows)
        if engine is not None:
            if all(map(le, blocks, have)) and rows == have_rows:
                return engine
            self._drop(engine)  # should the larger pool be refused, the next work starts afresh
        self._engine = self._new(blocks, num_rows=rows)
        return self._engine

    def _fit(self, nbytes: int, needed: list[int], *, setting: str, num_rows: int) -> list[int]:
        state = sum(spec.nbytes for spec in self._runner.states) * num_rows
        return fit_in_memory(nbytes, needed, self._groups, setting=setting, state_nbytes=state)

    def _new(self, num_blocks: int | list[int], *, num_rows: int | None = None) -> Engine:
        config = replace(self._config, num_blocks=num_blocks)
        if num_rows is not None and self._runner.states:  # a slot of state each: no more sequences at once than there are
            config = replace(config, max_num_seqs=num_rows)
        return self._make(config)

    def _drop(self, engine: Engine) -> None:
        engine.close()
        self._engine = None
