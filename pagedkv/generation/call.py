"""The arguments of one forward of a model over a cache, read once: which tokens come, which columns are seen, what is wanted.

Owns the reading and the refusal of what makes no sense. It changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.checks import shown
from pagedkv.errors import InvalidRequestError
from pagedkv.models.call import CACHE_ARGUMENTS, model_cache_argument
from pagedkv.plan import BoolArray, Int64Array

# Arguments that neither change what K and V of a token are, nor ask for more than logits.
_PLAIN = frozenset(
    ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", "cache_position", *CACHE_ARGUMENTS)
)
# In an encoder-decoder model the names of the encoder's own arguments, and "decoder_" before those above.
_ENCODER = frozenset(("input_ids", "attention_mask", "encoder_outputs", "decoder_input_ids", "decoder_attention_mask"))
# Those that leave K and V alone, but want what only the model's own attention has.
_OUTPUTS = frozenset(("output_attentions", "output_hidden_states", "labels"))


@dataclass(slots=True, eq=False)
class ForwardCall:
    """One forward, of ``R`` rows with ``Q`` new columns behind ``C`` cached ones.

    Attributes:
        arguments: by name.
        num_rows, num_new_columns: ``R`` and ``Q``.
        seen: ``[R, C + Q]`` bool, what the attention mask shows; None for all.
        own_mask: whether the attention mask is none of columns, so that each layer reads what the caller says.
        token_ids: ``[R, Q]`` int64; None when the input is not tokens, or something beside them may change K and V.
        positions: ``[R or 1, Q]`` int64; None when the model is to count by itself.
        only_logits: whether nothing is asked for that only the model's own attention has.
    """

    arguments: dict[str, Any]
    num_rows: int
    num_new_columns: int
    seen: BoolArray | None
    own_mask: bool
    token_ids: Int64Array | None
    positions: Int64Array | None
    only_logits: bool

    @property
    def new_seen(self) -> BoolArray:
        """``[R, Q]`` bool, the new columns that are tokens."""
        if self.seen is None:
            return np.ones((self.num_rows, self.num_new_columns), dtype=np.bool_)
        return self.seen[:, self.seen.shape[1] - self.num_new_columns :]

    @property
    def old_seen(self) -> BoolArray | None:
        """``[R, C]`` bool, the cached columns that are seen; None for all."""
        return None if self.seen is None else self.seen[:, : self.seen.shape[1] - self.num_new_columns]

    @property
    def wanted_columns(self) -> Int64Array:
        """The new columns whose logits are wanted, in that order."""
        columns: Int64Array = np.arange(self.num_new_columns)
        keep = self.arguments.get("logits_to_keep")
        if isinstance(keep, Tensor) and keep.ndim == 1:
            columns = columns[keep.cpu().numpy()]
        elif keep:
            columns = columns[-int(keep) :]
        return columns

    def counts_from(self, lengths: Int64Array, num_columns: int, *, takes_positions: bool) -> bool:
        """Whether every token's position is its place in its own sequence.

        Args:
            lengths: ``[R]`` tokens that each row has stored.
            num_columns: cached columns, ``C``.
            takes_positions: whether the model takes ``position_ids``; one that does not finds them by itself.
        """
        if not takes_positions:
            return True
        seen = self.new_seen
        places = lengths[:, None] + np.cumsum(seen, axis=1) - 1
        given = np.arange(num_columns, num_columns + self.num_new_columns)[None] if self.positions is None else self.positions
        if given.ndim != 2 or given.shape[1] != self.num_new_columns or len(given) not in (1, self.num_rows):
            return False
        return bool(((given == places) | ~seen).all())


class ForwardReader:
    """Reads the arguments of one model's forwards.

    Args:
        model: whose signature counts.

    Raises:
        UnsupportedModelError: the model takes no cache.

    Attributes:
        cache_argument: what the model calls its cache.
        takes_positions, takes_logits_to_keep: whether it takes ``position_ids`` and ``logits_to_keep``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._signature = inspect.signature(model.forward)
        self.cache_argument = model_cache_argument(model)
        self._prefix = "decoder_" if model.config.is_encoder_decoder else ""
        self._plain = _PLAIN | _OUTPUTS | _ENCODER if self._prefix else _PLAIN | _OUTPUTS
        self.takes_positions = f"{self._prefix}position_ids" in self._signature.parameters
        self.takes_logits_to_keep = "logits_to_keep" in self._signature.parameters

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, the cache by the one that the model knows; transformers itself takes older ones for a while."""
        bound = dict(kwargs)
        if args:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            for name, parameter in self._signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    bound = {**bound, **bound.pop(name, {})}
        if self.cache_argument not in bound:
            given = next((name for name in CACHE_ARGUMENTS if name in bound), None)
            if given is not None:
                bound[self.cache_argument] = bound.pop(given)
        return dict(bound)

    def read(self, arguments: dict[str, Any], num_columns: int) -> ForwardCall:
        """Read the arguments of a forward over a cache of ``num_columns`` columns.

        Raises:
            InvalidRequestError: no input, no use of the cache, or a mask of other columns.
        """
        if arguments.get("use_cache") is False:
            raise InvalidRequestError("use_cache is False, of the call or of the model: pass use_cache=True with a PagedCache")
        tokens, embeddings = arguments.get(f"{self._prefix}input_ids"), arguments.get(f"{self._prefix}inputs_embeds")
        source = tokens if embeddings is None else embeddings
        if not isinstance(source, Tensor) or source.ndim < 2 or not source.shape[0] or not source.shape[1]:
            name = f"{self._prefix}input_ids"
            raise InvalidRequestError(f"a forward over a PagedCache needs {name} of shape [rows, columns], got {shown(source)}")
        num_rows, num_new = int(source.shape[0]), int(source.shape[1])
        given = {name for name, value in arguments.items() if value is not None and value is not False}
        mask = arguments.get(f"{self._prefix}attention_mask")
        plain_mask = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        only_tokens = embeddings is None and plain_mask and given <= self._plain
        positions = arguments.get(f"{self._prefix}position_ids")
        return ForwardCall(
            arguments=arguments,
            num_rows=num_rows,
            num_new_columns=num_new,
            seen=_seen(mask, num_rows, num_columns + num_new) if plain_mask else None,
            own_mask=not plain_mask,
            token_ids=_token_ids(tokens) if only_tokens else None,
            positions=positions.cpu().numpy() if isinstance(positions, Tensor) else None,
            only_logits=not given & _OUTPUTS,
        )


def _seen(mask: Tensor | None, num_rows: int, num_columns: int) -> BoolArray | None:
    if mask is None:
        return None
    if tuple(mask.shape) != (num_rows, num_columns):
        raise InvalidRequestError(
            f"attention_mask is {list(mask.shape)}: [{num_rows}, {num_columns}] is needed, for the cached columns and the new ones"
        )
    seen: BoolArray = (mask != 0).cpu().numpy()
    return seen


def _token_ids(tokens: Any) -> Int64Array | None:
    if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        return None
    ids: Int64Array = tokens.to(torch.int64).cpu().numpy()
    return None if ids.min() < 0 else ids  # ids below 0 stand for something else, an image say
