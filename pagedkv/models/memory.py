"""How much memory K/V takes, before anything is allocated, and how much is free.

Owns the arithmetic and its report. It does not own pools (``pagedkv.storage``); the layers' shapes come from ``probe.py``,
by a forward on the meta device when there is no model yet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pagedkv.attention import Mask
from pagedkv.checks import integer
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.groups import LayerGroups, group_layers
from pagedkv.models.limits import max_positions
from pagedkv.models.loading import DtypeName, load_config, model_class, parse_dtype
from pagedkv.models.pair_call import PairCall
from pagedkv.models.pair_probe import probe_pair
from pagedkv.models.probe import ModelShape, probe_model
from pagedkv.models.refusals import check_config, check_model
from pagedkv.storage import LayerSpec


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that K/V of a model takes, and what fits.

    Attributes:
        block_size: tokens per block.
        dtype: of K and V.
        layers: geometry of each layer that stores K/V, by layer group.
        windows: what the layers of each group read; None for everything. Behind a window blocks are given back.
        nbytes_per_token: all layers, K and V; of an encoder-decoder those of self attention, for a token of the decoder.
        nbytes_per_block: of one block of all layers.
        memory_bytes: what was asked about, or None.
        num_blocks: blocks that fit in ``memory_bytes``, the null block included, as many for each group; None without ``memory_bytes``, or
            where there is no K/V.
        num_tokens: tokens that these blocks hold (the null block holds none), inside of all windows; None where ``num_blocks`` is.
        max_model_len: the length that was asked about, or None.
        nbytes_per_sequence: what a sequence of ``max_model_len`` holds at most between two steps, with its recurrent state; None if no
            length was asked about.
        num_sequences: such sequences that fit at once; None unless both were asked.
        state_nbytes: recurrent state of one sequence, whatever its length.
        nbytes_per_source_token: of an encoder-decoder, K and V of cross attention for a token of the encoder; a sequence's tokens are those
            of both parts. 0 for others.
    """

    block_size: int
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]
    windows: tuple[Mask | None, ...]
    nbytes_per_token: int
    nbytes_per_block: int
    memory_bytes: int | None
    num_blocks: int | None
    num_tokens: int | None
    max_model_len: int | None
    nbytes_per_sequence: int | None
    num_sequences: int | None
    state_nbytes: int = 0
    nbytes_per_source_token: int = 0

    @property
    def num_layers(self) -> int:
        """Layers that store K/V."""
        return len(self.layers)

    def __str__(self) -> str:
        each = f"{_size(self.nbytes_per_token)} per token"
        if self.nbytes_per_source_token:
            each += f" of the decoder, {_size(self.nbytes_per_source_token)} per token of the encoder"
        lines = [
            f"K/V of {self.num_layers} layers in {str(self.dtype).removeprefix('torch.')}: {each}, "
            f"{_size(self.nbytes_per_block)} per block of {self.block_size}"
        ]
        if self.state_nbytes:
            lines.append(f"recurrent state of a sequence: {_size(self.state_nbytes)}, whatever its length")
        if self.memory_bytes is not None and self.nbytes_per_block:
            lines.append(f"{_size(self.memory_bytes)} hold {self.num_blocks:,} blocks, {self.num_tokens:,} tokens")
        if self.max_model_len is not None and self.nbytes_per_sequence is not None:
            length = f"a sequence of {self.max_model_len:,} tokens takes {_size(self.nbytes_per_sequence)}"
            whole = -(-self.max_model_len // self.block_size) * self.nbytes_per_block + self.state_nbytes
            if whole > self.nbytes_per_sequence:
                windows = " and ".join(f"{mask.size:,} ({mask.kind})" for mask in self.windows if mask is not None)
                length = f"{length}, {_size(whole)} if layers with windows of {windows} kept everything"
            lines.append(length if self.num_sequences is None else f"{length}; {self.num_sequences:,} fit at once")
        return "\n".join(lines)


def plan_memory(
    model_or_config: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
    *,
    block_size: int = 16,
    dtype: DtypeName = None,
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
) -> MemoryPlan:
    """Bytes of K/V per token and per block, and how many tokens fit, before anything is allocated.

    Args:
        model_or_config: a loaded model, a config, or a hub id, folder or GGUF file, of which only the config is read.
        block_size: tokens per block, at least 1.
        dtype: of K and V; None for what the model stores.
        memory_bytes: memory for the pools, to learn what fits.
        max_model_len: tokens of one sequence, to learn how many such sequences fit.

    Returns:
        the plan; ``print`` it to read it.

    Raises:
        ConfigError: a number out of range, or nothing of that name.
        UnsupportedModelError: a model that cannot be run, with the reason.

    Cost: a forward of 3 tokens for a loaded model; for a config, the construction of the model on the meta device.
    """
    for name, value in (("block_size", block_size), ("memory_bytes", memory_bytes), ("max_model_len", max_model_len)):
        if value is not None or name == "block_size":
            integer(name, value, least=1)
    shape, positions = _shape(model_or_config)
    groups = group_layers(shape, max_positions=positions)
    stored = parse_dtype(dtype) or shape.dtype
    per_block = block_size * sum(layer.nbytes_per_token(stored) for layer in shape.layers)
    state = sum(spec.nbytes for spec in shape.states)
    num_blocks = None if memory_bytes is None or not per_block else memory_bytes // per_block
    each = None
    if max_model_len is not None:
        each = nbytes_per_sequence(groups, max_model_len, block_size=block_size, dtype=stored) + state
    fits = None if each is None or memory_bytes is None else max(memory_bytes - per_block, 0) // each
    return MemoryPlan(
        block_size=block_size,
        dtype=stored,
        layers=groups.layers,
        windows=groups.windows,
        nbytes_per_token=shape.nbytes_per_token(stored),
        nbytes_per_block=per_block,
        memory_bytes=memory_bytes,
        num_blocks=num_blocks,
        num_tokens=None if num_blocks is None else max(num_blocks - 1, 0) * block_size,
        max_model_len=max_model_len,
        nbytes_per_sequence=each,
        num_sequences=fits,
        state_nbytes=state,
        nbytes_per_source_token=shape.nbytes_per_source_token(stored),
    )


def nbytes_per_sequence(groups: LayerGroups, num_tokens: int, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K/V that a sequence of so many tokens holds at most between two steps, with the block that it writes next."""
    whole = -(-num_tokens // block_size)
    blocks = [whole if mask is None else min(whole, -(-(mask.size - 1) // block_size) + 1) for mask in groups.windows]
    return sum(blocks[layer.group] * block_size * layer.nbytes_per_token(dtype) for layer in groups.layers)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _shape(model_or_config: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str]) -> tuple[ModelShape, int | None]:
    """What a model stores, and its longest sequence."""
    if isinstance(model_or_config, (str, os.PathLike)):
        model_or_config = load_config(model_or_config)
    if isinstance(model_or_config, PreTrainedConfig):
        model_or_config = _without_weights(model_or_config)
    model = check_model(model_or_config)
    shape = probe_pair(PairCall(model)) if model.config.is_encoder_decoder else probe_model(model)
    return shape, max_positions(model.config)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    check_config(config, name=type(config).__name__)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UnsupportedModelError(f"{type(config).__name__}: {error}") from error
    model.eval()  # type: ignore[no-untyped-call]
    torch.nn.Module.to(model, "meta")  # some parameters are made on a device of the model's own choice
    return model


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" or size >= 100 else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{nbytes} B"
