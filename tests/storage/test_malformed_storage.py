"""What storage, attention and their values do not take. Afterwards the same storage holds and gives back what it held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from malformed_support import Case, Unprintable, named, table

from pagedkv.attention import AttendOptions, AttentionSpec, Mask, get_backend
from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedBackendError
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec

LAYER = LayerSpec(num_kv_heads=1, key_dim=2, value_dim=2)
ROWS = torch.ones(1, 1, 2)
SLOT = torch.tensor([4])


def storage(**options: Any) -> KVStorage:
    return KVStorage(**{"layers": [LAYER], "num_blocks": 4, "block_size": 2, "dtype": torch.float32, "device": "cpu", **options})


def spec(**options: Any) -> AttentionSpec:
    known = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "block_size": 4, "dtype": torch.float32, "device_type": "cpu"}
    return AttentionSpec(**{**known, "mask": Mask.causal(), **options})


def options(**given: Any) -> AttendOptions:
    return AttendOptions(**{"mask": Mask.causal(), "scale": 0.5, **given})


NAN, INF = float("nan"), float("inf")
VALUES = table(
    *(
        (f"storage {name} is {value!r}", ConfigError, name, lambda _, n=name, v=value: storage(**{n: v}))
        for name, values in {
            "layers": ([], None, 5, [5], "a"),
            "num_blocks": (1, 2**31, 1.5, "4", None, True, [4, 4]),
            "block_size": (0, 1.5, "2", None, True),
            "dtype": ("float32", torch.int32, None, 5),
            "device": ("nonsense", 1.5, None),
        }.items()
        for value in values
    ),
    *(
        (f"LayerSpec {name} is {value!r}", ConfigError, f"LayerSpec.{name}", lambda _, n=name, v=value: LayerSpec(**{**sizes(), n: v}))
        for name in ("num_kv_heads", "key_dim", "value_dim")
        for value in (0, -1, 1.5, "2", None, True)
    ),
    *((f"group is {v!r}", ConfigError, "LayerSpec.group", lambda _, v=v: LayerSpec(1, 2, 2, group=v)) for v in (-1, 0.0, None)),
    *(
        (f"AttentionSpec {name} is {value!r}", ConfigError, f"AttentionSpec.{name}", lambda _, n=name, v=value: spec(**{n: v}))
        for name, values in {
            "num_heads": (0, 1.5, "4", True),
            "num_kv_heads": (0, None),
            "key_dim": (0, "a"),
            "value_dim": (-1,),
            "block_size": (0, 2.0),
            "dtype": ("float32", None),
            "device_type": (5, None),
            "mask": ("causal", None),
            "softcap": (0, -1, INF, NAN, "a", True),
            "scale": (INF, NAN, "a", True),
            "sinks": (1, None),
            "alibi": ("yes",),
        }.items()
        for value in values
    ),
    *(
        (f"AttendOptions {name} is {value!r}", ConfigError, f"AttendOptions.{name}", lambda _, n=name, v=value: options(**{n: v}))
        for name, values in {
            "mask": ("causal", None),
            "scale": (INF, NAN, None, "a"),
            "softcap": (0, -1, INF, NAN, "a"),
            "sinks": ([1.0], 5),
            "alibi_slopes": ("a",),
        }.items()
        for value in values
    ),
    ("mask of no kind", ConfigError, "mask kind 'all'", lambda _: Mask("all")),  # type: ignore[arg-type]
    ("mask of an unprintable kind", ConfigError, "mask kind", lambda _: Mask(5)),  # type: ignore[arg-type]
    ("window 0", ConfigError, "mask size 0", lambda _: Mask.sliding(0)),
    ("window -1", ConfigError, "mask size is -1", lambda _: Mask.sliding(-1)),
    ("window float", ConfigError, "mask size is 1.5", lambda _: Mask.sliding(1.5)),  # type: ignore[arg-type]
    ("window text", ConfigError, "mask size is '8'", lambda _: Mask.sliding("8")),  # type: ignore[arg-type]
    ("chunk None", ConfigError, "mask size is None", lambda _: Mask.chunked(None)),  # type: ignore[arg-type]
    ("causal of a size", ConfigError, "causal has size 0", lambda _: Mask("causal", 3)),
    ("batches of 0", ConfigError, "block_size is 0", lambda _: BatchBuilder("cpu", 0)),
    ("batches of text", ConfigError, "block_size is 'a'", lambda _: BatchBuilder("cpu", "a")),  # type: ignore[arg-type]
    ("batches nowhere", ConfigError, "device is 'nonsense'", lambda _: BatchBuilder("nonsense", 4)),
    ("backend nowhere", ConfigError, "device is 'nonsense'", lambda _: get_backend(device="nonsense")),
    ("backend unknown", UnsupportedBackendError, "'nonsense' is unknown", lambda _: get_backend("nonsense", device="cpu")),
    ("backend None", UnsupportedBackendError, "None is neither a name", lambda _: get_backend(None, device="cpu")),  # type: ignore[arg-type]
)


def sizes() -> dict[str, Any]:
    return {"num_kv_heads": 1, "key_dim": 2, "value_dim": 2}


@named(VALUES)
def test_value_that_cannot_be_is_refused_by_name(case: Case) -> None:
    case.hold(None)


STORAGE = table(
    *(
        (f"write layer {v!r}", InvalidRequestError, "layer is", lambda s, v=v: s.write(v, ROWS, ROWS, SLOT))
        for v in (-1, 1, 0.0, None, True)
    ),
    ("write key None", InvalidRequestError, "key is None", lambda s: s.write(0, None, ROWS, SLOT)),
    ("write value list", InvalidRequestError, "value is [[[1.0]]]", lambda s: s.write(0, ROWS, [[[1.0]]], SLOT)),
    ("write slots list", InvalidRequestError, "slots is [4]", lambda s: s.write(0, ROWS, ROWS, [4])),
    ("write slots float", InvalidRequestError, "slots are torch.float32", lambda s: s.write(0, ROWS, ROWS, SLOT.float())),
    ("write slots square", InvalidRequestError, "a flat int64 tensor", lambda s: s.write(0, ROWS, ROWS, SLOT[None])),
    ("write the null block", InvalidRequestError, "the null block never", lambda s: s.write(0, ROWS, ROWS, SLOT - 3)),
    ("write a negative slot", InvalidRequestError, "slots reach from -1", lambda s: s.write(0, ROWS, ROWS, SLOT - 5)),
    ("write beyond", InvalidRequestError, "slots reach from 8", lambda s: s.write(0, ROWS, ROWS, SLOT + 4)),
    ("write another shape", InvalidRequestError, "do not fit", lambda s: s.write(0, ROWS[0], ROWS, SLOT)),
    ("write another dtype", InvalidRequestError, "K is torch.float64", lambda s: s.write(0, ROWS.double(), ROWS, SLOT)),
    ("write a gradient", InvalidRequestError, "requires a gradient", lambda s: s.write(0, ROWS.clone().requires_grad_(), ROWS, SLOT)),
    ("gather layer -1", InvalidRequestError, "layer is -1", lambda s: s.gather(-1, [1], 2)),
    ("gather length -1", InvalidRequestError, "length is -1", lambda s: s.gather(0, [1], -1)),
    ("gather length beyond", InvalidRequestError, "length 3", lambda s: s.gather(0, [1], 3)),
    ("gather length float", InvalidRequestError, "length is 1.5", lambda s: s.gather(0, [1], 1.5)),
    ("gather a block beyond", InvalidRequestError, "block ids reach", lambda s: s.gather(0, [4], 2)),
    ("gather a negative block", InvalidRequestError, "block ids reach", lambda s: s.gather(0, [-1], 2)),
    ("gather None", InvalidRequestError, "block ids", lambda s: s.gather(0, None, 2)),
    ("gather text", InvalidRequestError, "block ids", lambda s: s.gather(0, "a", 2)),
    ("gather ragged", InvalidRequestError, "block ids", lambda s: s.gather(0, [[1], [1, 2]], 2)),
    ("gather the unprintable", InvalidRequestError, "block ids", lambda s: s.gather(0, Unprintable(), 2)),
    ("fill the null block", InvalidRequestError, "block ids reach", lambda s: s.fill([0], 1.0)),
    ("fill floats", InvalidRequestError, "block ids must be a flat list of integers, got float64", lambda s: s.fill([1.5], 1.0)),
    ("fill with text", InvalidRequestError, "value is 'a'", lambda s: s.fill([1], "a")),
    ("fill with None", InvalidRequestError, "value is None", lambda s: s.fill([1], None)),
    ("fill group 1", InvalidRequestError, "group is 1", lambda s: s.fill([1], 0.0, group=1)),
    ("fill group -1", InvalidRequestError, "group is -1", lambda s: s.fill([1], 0.0, group=-1)),
    ("copy None", InvalidRequestError, "copies is None", lambda s: s.copy_blocks(None)),
    ("copy a number", InvalidRequestError, "copies is 5", lambda s: s.copy_blocks(5)),
    ("copy of two groups", InvalidRequestError, "2 entries for 1", lambda s: s.copy_blocks([np.zeros((0, 2), np.int32)] * 2)),
    ("copy flat", InvalidRequestError, "in 2 dimensions, got int64 of shape (2,)", lambda s: s.copy_blocks([np.array([1, 2])])),
    ("copy triples", InvalidRequestError, "[C, 2] is needed", lambda s: s.copy_blocks([np.array([[1, 2, 3]])])),
    (
        "copy floats",
        InvalidRequestError,
        "must be integers in 2 dimensions, got float64",
        lambda s: s.copy_blocks([np.array([[1.0, 2.0]])]),
    ),
    ("copy a number for a group", InvalidRequestError, "copies of group 0", lambda s: s.copy_blocks([5])),
    ("copy None for a group", InvalidRequestError, "copies of group 0", lambda s: s.copy_blocks([None])),
    ("copy into one twice", InvalidRequestError, "write a block twice", lambda s: s.copy_blocks([np.array([[1, 3], [2, 3]])])),
    ("copy from beyond", InvalidRequestError, "block ids reach", lambda s: s.copy_blocks([np.array([[9, 3]])])),
    ("copy into the null block", InvalidRequestError, "block ids reach", lambda s: s.copy_blocks([np.array([[1, 0]])])),
)


@pytest.fixture(scope="module")
def held() -> KVStorage:
    return storage()


@named(STORAGE)
def test_storage_with_malformed_input_changes_nothing(case: Case, held: KVStorage) -> None:
    held.fill([1, 2, 3], 7.0)
    case.hold(held)
    assert held.layers[0].key[1:].eq(7).all()
    assert held.layers[0].value[1:].eq(7).all()
    assert not held.layers[0].key[0].any()
    held.write(0, ROWS, ROWS * 2, SLOT)
    key, value = held.gather(0, [2], 2)
    assert key.tolist() == [[[1.0, 1.0], [7.0, 7.0]]]
    assert value.tolist() == [[[2.0, 2.0], [7.0, 7.0]]]
