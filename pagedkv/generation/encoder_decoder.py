"""The cache for ``generate`` of encoder-decoder models: self attention and cross attention, both in blocks.

Owns the pairing. A cache of self attention alone must never reach such a model: transformers would take it as it is and
compute cross attention from the decoder's K and V, without a word.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel

from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.generation.cache import PagedCache
from pagedkv.generation.cross import CrossAttention
from pagedkv.generation.pool import CachePool
from pagedkv.generation.rows import Rows
from pagedkv.models.cross_cache import CrossCache


class PagedEncoderDecoderCache(EncoderDecoderCache):
    """K and V in blocks for ``generate(..., past_key_values=cache)`` of an encoder-decoder model.

    As ``PagedCache`` for decoders, and the K and V of cross attention are stored once for each different input, not once for each beam
    of it, and not for its padding. Forwards are dense. One that fails leaves the cache empty.

    Args:
        source: a model, for which a pool of the cache's own is made, or a ``CachePool`` of one.
        options: of the pool, see ``CachePool``, where ``source`` is a model.

    Raises:
        UnsupportedModelError: the model is refused, or no encoder-decoder; says why.
        ConfigError: an option that cannot work.
    """

    def __init__(self, source: PreTrainedModel | CachePool, **options: Any) -> None:
        # EncoderDecoderCache.__init__ looks into layers that hold tensors; there are none here.
        pool = source if isinstance(source, CachePool) else CachePool(source, **options)
        if not pool.num_cross_layers:
            raise UnsupportedModelError(f"{type(pool.model).__name__} is no encoder-decoder model: use PagedCache")
        if isinstance(source, CachePool) and options:
            raise ConfigError(f"{', '.join(options)}: an option of the pool, which is there already")
        self._adopt(PagedCache.over(pool, pool.open(None, closes_with_caches=pool is not source)))

    def _adopt(self, cache: PagedCache) -> None:
        self._decoder = cache
        self.self_attention_cache = cache  # type: ignore[assignment]  # typed there as a DynamicCache, which it need not be
        self.cross_attention_cache = _CrossCache(cache)  # type: ignore[assignment]  # likewise

    @property
    def is_updated(self) -> dict[int, bool]:  # type: ignore[override]  # there it is an attribute, that nobody but the class itself sets
        """By layer, whether the K and V of cross attention are stored."""
        return _cross(self._rows).is_updated

    @property
    def block_pool(self) -> CachePool:
        """The pool that the blocks are from."""
        return self._decoder.block_pool

    def close(self) -> None:
        """Give every block back; as for ``PagedCache``."""
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __copy__(self) -> PagedEncoderDecoderCache:
        copy = PagedEncoderDecoderCache.__new__(PagedEncoderDecoderCache)
        copy._adopt(self._decoder.__copy__())
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedEncoderDecoderCache:
        return self.__copy__()

    # The rows of both parts are those of self attention, which cross attention follows.

    def reset(self) -> None:
        """Forget everything and give every block back."""
        self._decoder.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make row ``i`` what row ``beam_idx[i]`` was. Copies nothing."""
        self._decoder.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns of the decoder."""
        self._decoder.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make ``repeats`` rows of each. Copies nothing."""
        self._decoder.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices. Copies nothing."""
        self._decoder.batch_select_indices(indices)

    @property
    def _rows(self) -> Rows:
        return self._decoder._rows


class _CrossCache(CrossCache):
    """What the model stores K and V of cross attention in, and takes them from."""

    def __init__(self, cache: PagedCache) -> None:
        super().__init__(cache.block_pool.num_cross_layers, lambda layer: _cross(cache._rows).read(layer))
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store K and V ``[R, Hkv, S, D]`` of a layer."""
        return _cross(self._cache._rows).update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the encoder that a layer has stored."""
        cross = _cross(self._cache._rows)
        return cross.num_columns if cross.is_updated.get(layer_idx) else 0


def _cross(rows: Rows) -> CrossAttention:
    if not isinstance(rows.beside, CrossAttention):
        raise TypeError("the rows have no cross attention beside them")
    return rows.beside
