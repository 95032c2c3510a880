"""Layers are grouped by what they keep: by the widest mask that reads them, where there is one."""

from __future__ import annotations

import pytest
import torch

from pagedkv.attention import Mask
from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.models.groups import group_layers
from pagedkv.models.probe import ModelShape
from pagedkv.storage import LayerSpec
from pagedkv.testing.models import WINDOW, tiny_model

ALL, NEAR, FAR, CHUNK = Mask.causal(), Mask.sliding(4), Mask.sliding(9), Mask.chunked(4)


def shape_of(*layer_masks: set[Mask]) -> ModelShape:
    count = len(layer_masks)
    return ModelShape(
        tuple(range(count)), (LayerSpec(1, 2, 2),) * count, torch.float32, 9, masks=tuple(tuple(masks) for masks in layer_masks)
    )


@pytest.mark.parametrize(
    ("layer_masks", "groups", "windows"),
    [
        ([{ALL}, {ALL}], [0, 0], [None]),
        ([{NEAR}, {ALL}, {NEAR}], [1, 0, 1], [None, NEAR]),
        ([{NEAR}, {NEAR}], [1, 1], [None, NEAR]),
        ([{FAR}, {CHUNK}, {NEAR}, {ALL}], [3, 1, 2, 0], [None, CHUNK, NEAR, FAR]),
        ([{NEAR, FAR}, {FAR}], [1, 1], [None, FAR]),
        ([{NEAR, ALL}], [0], [None]),
        ([{NEAR, CHUNK}], [0], [None]),
        ([{CHUNK, Mask.chunked(6)}], [0], [None]),
        ([set(), {NEAR}], [0, 1], [None, NEAR]),
    ],
)
def test_layers_are_grouped_by_the_widest_mask_that_reads_them(
    layer_masks: list[set[Mask]], groups: list[int], windows: list[Mask | None]
) -> None:
    grouped = group_layers(shape_of(*layer_masks), max_positions=100)
    assert [layer.group for layer in grouped.layers] == groups
    assert list(grouped.windows) == windows


def test_window_as_long_as_the_longest_sequence_makes_no_group() -> None:
    assert group_layers(shape_of({FAR}, {NEAR}), max_positions=9).windows == (None, NEAR)
    assert group_layers(shape_of({FAR}, {NEAR}), max_positions=None).windows == (None, NEAR, FAR)


def test_runner_makes_one_table_or_one_for_each_group() -> None:
    runner = ModelRunner(tiny_model("gemma3"), block_size=4)
    assert runner.windows == (None, Mask.sliding(WINDOW))
    assert [layer.group for layer in runner.grouped_layers] == [1, 0]
    assert [pool.num_blocks for pool in runner.new_storage(5).layers] == [5, 5]
    assert [pool.num_blocks for pool in runner.new_storage([9, 5]).layers] == [5, 9]
    with pytest.raises(ConfigError, match="num_blocks has 3 entries for 2 layer groups"):
        runner.new_storage([9, 5, 5])


def test_layer_that_reads_with_another_mask_than_in_the_probe_is_refused() -> None:
    from pagedkv.engine import Engine, EngineConfig
    from pagedkv.errors import StepError

    model = tiny_model("mistral")
    engine = Engine(ModelRunner(model, block_size=4), EngineConfig(num_blocks=20))
    engine.add_request("a", list(range(3, 30)))
    model.config.sliding_window = 2 * WINDOW
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 2 * WINDOW
    with pytest.raises((UnsupportedModelError, StepError), match="which it did not in the probe: K/V may be gone"):
        engine.step()
