"""The input of a model's encoder. To the books it is the beginning of a sequence: a slot for each of its tokens, then those of the decoder.

Owns its tokens, and the K/V of cross attention that were made of them, between the encoder's run and the last of them getting its place.
"""

from __future__ import annotations

from torch import Tensor

from pagedkv.plan import Int32Array


class Source:
    """What one request gives to the encoder; its continuations share it.

    Args:
        token_ids: ``[E]`` int32.

    Attributes:
        token_ids: as given.
        unstored: K ``[Hkv, E, Dk]`` and V ``[Hkv, E, Dv]`` of each layer of cross attention, where the encoder has run and some of them
            have no slots yet: a prompt comes in chunks, an encoder reads all of it at once. None before and after.
    """

    __slots__ = ("token_ids", "unstored")

    def __init__(self, token_ids: Int32Array) -> None:
        self.token_ids = token_ids
        self.unstored: tuple[tuple[Tensor, Tensor], ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)
