"""Random programs over real storage: every slot of every layer holds what it should."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pagedkv.testing.generators import OperationGenerator, random_config
from pagedkv.testing.manager_driver import ManagerDriver
from pagedkv.testing.storage_oracle import StorageOracle
from pagedkv.testing.violations import ViolationError


@pytest.mark.parametrize("block_size", [1, 3])
def test_programs_over_real_storage_read_what_they_wrote(block_size: int) -> None:
    rng = random.Random(block_size)
    config = replace(random_config(rng), block_size=block_size)
    driver, operations = ManagerDriver(config, storage_factory=StorageOracle), OperationGenerator(rng, config)
    while driver.num_operations < 200:
        driver.run(operations.draw(driver))
    driver.close()


@pytest.mark.parametrize("layer", [0, 1])
def test_storage_oracle_sees_one_wrong_number_of_one_layer(layer: int) -> None:
    oracle = StorageOracle([3], 2)
    stamps = oracle.stamps("", [7, 8])
    oracle.write([[2, 3]], stamps)
    oracle.verify(0, [1], stamps)
    oracle.storage.layers[layer].value[1, 1, 1, 0] += 1
    with pytest.raises(ViolationError, match="position 1, block 1 holds nothing") as caught:
        oracle.verify(0, [1], stamps)
    assert caught.value.kind == "tokens"
