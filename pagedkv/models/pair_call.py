"""How an encoder-decoder is called during a step: which arguments its forward takes, learned once.

Owns the argument lists of the encoder, and of the decoder with and without a cache. It does not own what happens inside.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.call import cache_argument, logits_of

ANY_TOKEN = 3
"""Of the decoder, where only what it makes of the encoder matters; none that a model is likely to take for padding."""
_NEEDED = ("encoder_outputs", "attention_mask", "decoder_input_ids")


class PairCall:
    """Calls an encoder-decoder language model on rows of tokens.

    Args:
        model: the model; its signature is read here, once.

    Raises:
        UnsupportedModelError: its encoder reads no tokens, or its forward lacks an argument that ``generate`` gives to such models.

    Attributes:
        model: the model.
        takes_mask: whether it takes its ``mask_argument``, so that rows of the decoder can be of several lengths.
    """

    mask_argument = "decoder_attention_mask"

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if model.main_input_name != "input_ids":
            raise UnsupportedModelError(f"the encoder of {name} reads {model.main_input_name}: only tokens are supported")
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        missing = [argument for argument in (*_NEEDED, self._cache_argument) if argument not in parameters]
        if missing:
            raise UnsupportedModelError(f"{name}.forward takes no {' and no '.join(missing)}, which an encoder-decoder is run with")
        self.model = model
        self.takes_mask = self.mask_argument in parameters
        self._output: type[ModelOutput] = BaseModelOutput  # of the encoder: some decoders ask it for more than hidden states
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._use_cache = "use_cache" in parameters or passes_on
        self._takes_positions = "decoder_position_ids" in parameters

    def encode(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the encoder makes of ``[R, E]`` int64 tokens, ``[R, E, H]``; ``mask [R, E]`` int64 is 1 where one is; None: everywhere."""
        encoder: Any = self.model.get_encoder()
        with torch.no_grad():
            output = encoder(input_ids=token_ids, attention_mask=mask, return_dict=True)
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != token_ids.shape:
            raise UnsupportedModelError(f"the encoder of {type(self.model).__name__} gives no hidden state for each of its tokens")
        self._output = type(output)
        return states

    def stored(self, states: Tensor, mask: Tensor | None, decoder_ids: Tensor) -> tuple[EncoderDecoderCache, Tensor]:
        """transformers' own caches after the decoder's first forward, which holds K and V of cross attention, and its logits.

        Args:
            states: ``[R, E, H]`` of the encoder.
            mask: ``[R, E]`` int64, 1 where there is a token; None for everywhere.
            decoder_ids: ``[R, Q]`` int64.
        """
        # Without a config: that of some models says how many layers the encoder has. So the caches find out by themselves.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cache, self.decode(states, mask, decoder_ids, cache=cache)

    def decode(
        self,
        states: Tensor,
        mask: Tensor | None,
        decoder_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor | None = None,
        decoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder on some rows.

        Args:
            states: ``[R, E, H]`` of the encoder.
            mask: ``[R, E]`` int64, 1 where there is a token; None for everywhere.
            decoder_ids: ``[R, Q]`` int64.
            cache: what the model stores K/V in and gets them from.
            positions: ``[R, Q]`` int64; not passed on to a model that takes none.
            decoder_mask: ``[R, K]`` int64, 1 for the keys of each row that are there; None when all are.

        Returns:
            ``[R, Q, V]`` logits.
        """
        arguments: dict[str, Any] = {"encoder_outputs": self._output(last_hidden_state=states), "attention_mask": mask}
        if positions is not None and self._takes_positions:
            arguments["decoder_position_ids"] = positions
        if decoder_mask is not None:
            arguments["decoder_attention_mask"] = decoder_mask
        if self._use_cache:
            arguments["use_cache"] = True
        with torch.no_grad():
            return logits_of(self.model(decoder_input_ids=decoder_ids, **{self._cache_argument: cache}, **arguments))

    def plain(self, source: Tensor, token_ids: Tensor) -> Tensor:
        """Logits ``[T, V]`` of one decoder sequence by the model's own forward, without any cache."""
        arguments: dict[str, Any] = {"use_cache": False} if self._use_cache else {}
        with torch.no_grad():
            mask = torch.ones_like(source)[None]
            return logits_of(self.model(input_ids=source[None], attention_mask=mask, decoder_input_ids=token_ids[None], **arguments))[0]
