"""What the two parts of an encoder-decoder can be asked: tokens, positions, and the token that the decoder begins with. Owns no state."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.limits import decoder_start_token_id, num_decoder_token_ids
from pagedkv.models.positions import PositionReach, RotaryEmbeddings
from pagedkv.models.probe import ModelShape


@dataclass(frozen=True, slots=True)
class EncoderLimits:
    """Bounds of prompts and outputs.

    Attributes:
        start_token_id: what the decoder begins with; None where the model states nothing.
        num_decoder_token_ids: token ids from 0 that the decoder can read.
        max_source_tokens: tokens that the encoder has positions for; None for no limit.
        max_decoder_tokens: the same of the decoder, prompt and output together.
        nbytes_per_token: of K and V of self attention for a token of the decoder.
        nbytes_per_source_token: of K and V of cross attention for a token of the encoder.
    """

    start_token_id: int | None
    num_decoder_token_ids: int
    max_source_tokens: int | None
    max_decoder_tokens: int | None
    nbytes_per_token: int
    nbytes_per_source_token: int

    def positions(self, rotaries: RotaryEmbeddings) -> PositionReach:
        """How long both parts may be together."""
        if not rotaries.is_steady:
            raise UnsupportedModelError(
                "its rotary embeddings choose their frequencies by the longest row of a batch, which is not told apart with an encoder"
            )
        parts = (self.max_source_tokens, self.max_decoder_tokens)
        reach = None if None in parts else sum(part or 0 for part in parts)
        return PositionReach(reach, reach, None)


def encoder_limits(model: PreTrainedModel, shape: ModelShape) -> EncoderLimits | None:
    """Those of a model that has an encoder; None for others."""
    if shape.encoder is None:
        return None
    return EncoderLimits(
        start_token_id=decoder_start_token_id(model),
        num_decoder_token_ids=num_decoder_token_ids(model),
        max_source_tokens=shape.encoder.max_source_tokens,
        max_decoder_tokens=shape.encoder.max_decoder_tokens,
        nbytes_per_token=shape.nbytes_per_token(shape.dtype),
        nbytes_per_source_token=shape.nbytes_per_source_token(shape.dtype),
    )
