from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import masking_utils

from pagedkv.attention import Mask
from pagedkv.errors import UnsupportedModelError
from pagedkv.models import classify_mask
from pagedkv.models.context import AttentionCall
from pagedkv.models.masks import MaskCarriers, resolve_mask
from pagedkv.models.step import OptionsTable

WINDOWS = (1, 2, 7, 8, 127, 4096, 100_003)


def test_causal_mask_function_is_causal() -> None:
    assert classify_mask(masking_utils.causal_mask_function) == Mask.causal()


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_mask_function_is_sliding_of_its_window(window: int) -> None:
    assert classify_mask(masking_utils.sliding_window_causal_mask_function(window)) == Mask.sliding(window)


@pytest.mark.parametrize("chunk", [2, 7, 8, 8192])
def test_chunked_mask_function_is_chunked_of_its_size(chunk: int) -> None:
    function = masking_utils.chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64))
    assert classify_mask(function) == Mask.chunked(chunk)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(8),
        masking_utils.chunked_causal_mask_function(8, torch.tensor([3])),
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q == 5) & (k == 7)),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k % 3 != 1),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (h == 0) | (k > q - 3)),
        masking_utils.and_masks(masking_utils.causal_mask_function, masking_utils.padding_mask_function(torch.ones(1, 9).bool())),
        masking_utils.and_masks(masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(None)),
    ],
    ids=["bidirectional", "sliding-both-ways", "chunks-off-zero", "extra-pair", "holes", "per-head", "padding", "no-window"],
)
def test_other_mask_functions_are_of_no_known_kind(function: object) -> None:
    assert classify_mask(function) is None  # type: ignore[arg-type]


def test_carrier_is_known_again_after_slicing_and_for_a_new_closure() -> None:
    carriers = MaskCarriers()
    first = carriers.carrier(masking_utils.sliding_window_causal_mask_function(8), 5, None)
    other = carriers.carrier(masking_utils.sliding_window_causal_mask_function(9), 5, None)
    assert first.shape == (1, 1, 5, 1)
    assert carriers.mask_of(first[:, :, 2:, :1]) == Mask.sliding(8)
    assert carriers.mask_of(other) == Mask.sliding(9)
    again = carriers.carrier(masking_utils.sliding_window_causal_mask_function(8), 3, None)
    assert carriers.mask_of(again) == Mask.sliding(8)
    assert carriers.masks == (Mask.sliding(8), Mask.sliding(9))


def test_carrier_that_was_computed_on_is_refused() -> None:
    carriers = MaskCarriers()
    carrier = carriers.carrier(masking_utils.causal_mask_function, 4, None)
    with pytest.raises(UnsupportedModelError, match="computes on its attention mask"):
        carriers.mask_of(carrier + 1)


def test_unknown_mask_is_refused_only_when_it_is_used() -> None:
    carriers = MaskCarriers()
    carrier = carriers.carrier(masking_utils.bidirectional_mask_function, 4, None)
    with pytest.raises(UnsupportedModelError, match="none of causal"):
        carriers.mask_of(carrier)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_carrier_with_which_a_model_may_compute_is_one_number_on_its_device(device: str) -> None:
    carrier = MaskCarriers(harmless=True).carrier(masking_utils.causal_mask_function, 4000, torch.device(device))
    assert carrier.shape == (1, 1, 1, 1)  # a row for each token would become a square of all tokens
    assert carrier.device.type == device


def _call(mask: torch.Tensor | None, window: int | None) -> AttentionCall:
    empty = torch.zeros(1, 1, 1, 1)
    return AttentionCall(
        module=torch.nn.Identity(), query=empty, key=empty, value=empty, mask=mask, scale=1.0, softcap=None, window=window, sinks=None
    )


def test_options_are_found_again_for_the_same_slopes_and_made_anew_for_others() -> None:
    table, slopes = OptionsTable(MaskCarriers()), torch.tensor([0.5, 0.25])
    first, other, none = (table.find(replace(_call(None, None), alibi_slopes=given)) for given in (slopes, slopes.clone(), None))
    assert table.find(replace(_call(None, None), alibi_slopes=slopes)) is first
    assert first.alibi_slopes is not None
    assert torch.equal(first.alibi_slopes, slopes)
    assert other is not first
    assert none.alibi_slopes is None


def test_window_stated_by_the_module_must_agree_with_the_mask() -> None:
    carriers = MaskCarriers()
    sliding = carriers.carrier(masking_utils.sliding_window_causal_mask_function(8), 4, None)
    causal = carriers.carrier(masking_utils.causal_mask_function, 4, None)
    assert resolve_mask(_call(sliding, 8), carriers) == Mask.sliding(8)
    assert resolve_mask(_call(sliding, None), carriers) == Mask.sliding(8)
    assert resolve_mask(_call(None, 8), carriers) == Mask.sliding(8)
    assert resolve_mask(_call(None, None), carriers) == Mask.causal()
    for mask, window in ((sliding, 7), (causal, 8)):
        with pytest.raises(UnsupportedModelError, match="states a sliding window"):
            resolve_mask(_call(mask, window), carriers)
