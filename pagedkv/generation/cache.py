"""The cache that a user passes to ``model.generate(past_key_values=...)``.

Owns the answers to what transformers asks of a cache. Which blocks its rows have is ``rows.py``'s, and how a forward reads
them is decided by its pool, which sees every forward of the model before the model does.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from pagedkv.generation.pool import CachePool
from pagedkv.generation.rows import Rows
from pagedkv.generation.states import LayerStates
from pagedkv.models.adapters import AdaptedModel


class PagedCache(Cache):
    """K and V in blocks, for ``model.generate(..., past_key_values=cache)`` and for forwards of the model.

    It stands in for transformers' ``DynamicCache`` in greedy search, sampling, beam search, assisted decoding, chunked prefill
    and continued chats, with left padding, and gives the same tokens. What differs is what it stores: padding never, rows of the
    same tokens (beams of a prompt, several samples of one) once until they part, and behind that each only its own blocks. In
    place, where the model allows it, attention reads the blocks without gathering them, and only one of equal rows is computed.

    One cache belongs to one batch at a time. ``close()``, or the end of ``with``, gives all of its blocks back; so does the
    garbage collector at the next forward after it is gone. A copy (``copy.copy`` or ``copy.deepcopy``) shares all blocks:
    prefill a prompt once, and continue it in as many copies as you like.

    Args:
        source: a model, for which a pool of the cache's own is made, or a ``CachePool`` (``PagedCache.pool``), to share one: trying a
            model takes some forwards, which caches of one pool save.
        namespace: caches of one pool that give the same text find each other's prefixes, so that a forward skips what another has
            computed, as long as the model is not altered; None shares within the cache only.
        options: of the pool, see ``CachePool``, where ``source`` is a model.

    Raises:
        UnsupportedModelError: the model is refused; says why.
        ConfigError: an option that cannot work.

    Forwards raise ``OutOfBlocksError`` when the pool is too small; the cache is then as it was before the forward. One that fails in
    the model leaves it so as well, unless blocks were to be copied, when it is left empty.
    """

    def __init__(self, source: PreTrainedModel | AdaptedModel | CachePool, *, namespace: str | None = None, **options: Any) -> None:
        if isinstance(source, CachePool) and options:
            raise ConfigError(f"{', '.join(options)}: an option of the pool, which is there already")
        pool = source if isinstance(source, CachePool) else CachePool(source, **options)
        if pool.num_cross_layers:
            if pool is not source:
                pool.close()
            raise UnsupportedModelError(
                f"{type(pool.model).__name__} is an encoder-decoder model, which a cache of self-attention alone makes silently wrong: "
                "use PagedEncoderDecoderCache"
            )
        self._lay_out(pool, pool.open(namespace, closes_with_caches=pool is not source))

    @staticmethod
    def pool(model: PreTrainedModel | AdaptedModel, **options: Any) -> CachePool:
        """A pool that many caches share; options as for ``CachePool``."""
        return CachePool(model, **options)

    # What users ask.

    @property
    def block_pool(self) -> CachePool:
        """The pool that the blocks are from."""
        return self._pool

    @property
    def num_blocks(self) -> int:
        """Blocks that this cache holds in all layer groups, shared ones counted once."""
        with self._pool.using(self._rows) as rows:
            return rows.num_blocks

    def close(self) -> None:
        """Give every block back, and the pool's memory if the pool was made for this cache and its copies, and is the last of them.

        May be called again.
        """
        self._finalizer.detach()
        self._pool.release(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __copy__(self) -> PagedCache:
        return PagedCache.over(self._pool, self._pool.fork(self._rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        return self.__copy__()

    @classmethod
    def over(cls, pool: CachePool, rows: Rows) -> PagedCache:
        """A cache of rows that a pool has opened for it."""
        cache = cls.__new__(cls)
        cache._lay_out(pool, rows)
        return cache

    def __repr__(self) -> str:
        return f"PagedCache({self._rows!r})"

    def _lay_out(self, pool: CachePool, rows: Rows) -> None:
        # Cache.__init__ wants layer objects that hold K and V; there are none here.
        self.layer_class_to_replicate = None
        self.offloading = False
        self._pool = pool
        self._rows = rows
        self._finalizer = finalize(self, pool.abandon, rows)

    # What transformers asks.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store K and V ``[R, Hkv, Q, D]`` of a layer and return those of all columns.

        Raises:
            InvalidRequestError: the forward is none of the pool's model: of another model, or of a part of this one.
        """
        return self._pool.update(self._rows, key_states, value_states, layer_idx)

    def __len__(self) -> int:
        return self._pool.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included; the new ones of a forward count from its end on."""
        return self._pool.num_columns(self._rows)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the first new token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the columns that a mask covers: all of them, from the first."""
        return self.get_seq_length(layer_idx) + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, transformers' word for no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1, transformers' word for no limit (older spelling)."""
        return -1

    def reset(self) -> None:
        """Forget everything and give every block back; the cache can be used for another batch."""
        with self._pool.using(self._rows) as rows:
            rows.release()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row ``i`` what row ``beam_idx[i]`` was. Copies nothing."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, or those where a mask is True, in that order. Copies nothing."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        with self._pool.using(self._rows) as rows:
            rows.select(chosen.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make ``repeats`` rows of each. Copies nothing; the rows share everything until their tokens differ."""
        with self._pool.using(self._rows) as rows:
            rows.select(np.arange(rows.num_rows).repeat(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns and give back the blocks that only they used.

        Raises:
            InvalidRequestError: a positive number (transformers' former meaning, a length), or more columns than there are; or K and V
                behind a window would be needed again. After ``activate_past_recording`` the last forward can always be taken back.
        """
        if tokens_to_remove > 0:
            raise InvalidRequestError(f"crop({tokens_to_remove}): give the number of tokens to remove, as a negative number")
        with self._pool.using(self._rows) as rows:
            rows.crop(-int(tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Keep what ``crop`` needs: states of convolutions, and behind windows the K and V that the last forward would give back."""
        with self._pool.using(self._rows) as rows:
            rows.record()
        if self._kept is not None:
            self._kept.record()

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: every layer can be cropped."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first forward."""
        with self._pool.using(self._rows) as rows:
            return rows.num_rows or -1

    @property
    def is_compileable(self) -> bool:
        """False: transformers must neither compile the model for us nor prepare static masks."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: nothing is created lazily."""
        return True

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` leaves no trace: always, but for recurrent states."""
        return self._kept is None or self._kept.is_croppable

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]  # there it is an attribute, that nobody but the class itself sets
        """The layers of transformers' own that keep what is no K and V; none for most models."""
        return [] if self._kept is None else self._kept.cache.layers

    @property
    def is_sliding(self) -> list[bool]:
        """All False: masks are to cover all columns. Behind a window, where they hide everything, K and V are zeros."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have a state alone."""
        return [False] * len(self) if self._kept is None else self._kept.cache.is_linear

    @property
    def is_dummy(self) -> list[bool]:
        """Which layers have nothing."""
        return [False] * len(self) if self._kept is None else self._kept.cache.is_dummy

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer's state has taken in a token."""
        return self._states.has_previous_state(layer_idx, state_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A layer's convolutional state; None before its first token."""
        return self._states.get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take new columns into a layer's convolutional state."""
        return self._states.update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A layer's recurrent state; None before its first token."""
        return self._states.get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace a layer's recurrent state."""
        return self._states.update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store the new keys of a layer's indexer and return all."""
        return self._states.update_indexer(indexer_key_states, layer_idx)

    @property
    def _kept(self) -> LayerStates | None:
        """What layers keep beside K and V."""
        beside = self._rows.beside
        return beside if isinstance(beside, LayerStates) else None

    @property
    def _states(self) -> Cache:
        if self._kept is None:
            raise UnsupportedModelError("the model asks for states of layers, and had none when it was tried")
        return self._kept.cache
