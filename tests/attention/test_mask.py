from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv.attention import Mask
from pagedkv.errors import ConfigError

MASKS = [Mask.causal(), Mask.sliding(1), Mask.sliding(4), Mask.sliding(100), Mask.chunked(1), Mask.chunked(4), Mask.chunked(100)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_first_visible_every_position_is_the_first_that_visible_shows(mask: Mask) -> None:
    positions = torch.arange(20)
    seen = mask.visible(positions[:, None], positions[None, :])
    for position in range(20):
        visible = seen[position].nonzero().flatten().tolist()
        assert visible == list(range(mask.first_visible(position), position + 1))
    each = mask.first_visible_each(np.arange(20, dtype=np.int64))
    assert each.tolist() == [mask.first_visible(position) for position in range(20)]


def test_mask_equal_values_are_one_key() -> None:
    assert len({Mask.sliding(4), Mask.sliding(4), Mask.chunked(4), Mask.causal(), Mask.causal()}) == 3


@pytest.mark.parametrize(("kind", "size"), [("causal", 3), ("sliding", 0), ("chunked", -1), ("full", 0)])
def test_mask_size_or_kind_that_cannot_be_is_refused(kind: str, size: int) -> None:
    with pytest.raises(ConfigError, match="mask"):
        Mask(kind, size)  # type: ignore[arg-type]
