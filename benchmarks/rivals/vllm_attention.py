"""vLLM's attention operator for the CPU, called alone on a pool in its own layout: blocks of 32 tokens, K and V behind each other.

Driven as its attention backend does it: K and V stored by its own operator, scheduler metadata once per step, then a call a layer.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `generators` is found; this folder would hide the real vllm

from contest import second_pass
from generators.loop import converse
from generators.vllm_start import load_first_what_vllm_wants

BLOCK_SIZE = 32


class Operator:
    """One shape, over as many layers as hold so many bytes.

    Args:
        order: the fields of ``attention_work.Shape``, and ``nbytes``.
        generator: of all numbers, and of the order of blocks.
    """

    def __init__(self, order: dict[str, Any], generator: Any) -> None:
        import torch
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self._torch, self._ops = torch, _custom_ops
        self._order, self._dtype = order, getattr(torch, order["dtype"])
        heads, dim, lengths = order["num_kv_heads"], order["dim"], order["seq_lens"]
        self.num_layers = max(2, math.ceil(order["nbytes"] / (sum(lengths) * heads * dim * 2 * self._dtype.itemsize)))
        self._isa = _get_attn_isa(self._dtype, BLOCK_SIZE, dim, "auto")
        self._dense: tuple[Any, ...] = ()  # of the first layer
        needed = [-(-length // BLOCK_SIZE) for length in lengths]
        ids = (torch.randperm(sum(needed), generator=generator) + 1).to(torch.int32)
        self._tables = torch.nn.utils.rnn.pad_sequence(list(torch.split(ids, needed)), batch_first=True)
        slots = [self._slots(seq, length) for seq, length in enumerate(lengths)]
        self._layers = [self._layer(sum(needed) + 1, torch.cat(slots), generator) for _ in range(self.num_layers)]
        self._starts = torch.tensor([0, *order["query_lens"]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._lengths = torch.tensor(lengths, dtype=torch.int32)
        self._query = torch.randn(sum(order["query_lens"]), order["num_heads"], dim, generator=generator).to(self._dtype)
        self._output = torch.empty_like(self._query)
        self._metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=order["num_heads"],
            num_kv_heads=heads,
            head_dim=dim,
            seq_lens=self._lengths,
            dtype=self._dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )

    def attend(self, layer: int) -> None:
        """One call."""
        key, value = self._layers[layer]
        self._ops.cpu_attention_with_kv_cache(
            query=self._query,
            key_cache=key,
            value_cache=value,
            output=self._output,
            query_start_loc=self._starts,
            seq_lens=self._lengths,
            scale=self._order["dim"] ** -0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._tables,
            softcap=0,
            scheduler_metadata=self._metadata,
            s_aux=None,
        )

    def error(self) -> float:
        """Largest difference from torch's attention, in the first layer's first sequence."""
        self.attend(0)
        new, length = self._order["query_lens"][0], self._order["seq_lens"][0]
        query, key, value = (
            tensor.float().transpose(0, 1)[None] for tensor in (self._query[:new], *(part[:length] for part in self._dense))
        )
        mask = self._torch.arange(length) <= self._torch.arange(length - new, length)[:, None]
        attention = self._torch.nn.functional.scaled_dot_product_attention
        truth = attention(query, key, value, mask, enable_gqa=True)[0].transpose(0, 1)
        return float((self._output[:new].float() - truth).abs().max())

    def _slots(self, seq: int, length: int) -> Any:
        positions = self._torch.arange(length)
        return self._tables[seq, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE

    def _layer(self, num_blocks: int, slots: Any, generator: Any) -> tuple[Any, Any]:
        torch, heads, dim = self._torch, self._order["num_kv_heads"], self._order["dim"]
        pool = torch.zeros(num_blocks, heads, BLOCK_SIZE * 2, dim, dtype=self._dtype)
        keys, values = pool.chunk(2, dim=2)
        key, value = (torch.randn(len(slots), heads, dim, generator=generator).to(self._dtype) for _ in range(2))
        self._ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, self._isa)
        self._dense = self._dense or (key, value)
        return keys, values


def begin(setup: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Import vLLM and its operators."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.cpu._init_amx()  # the system wants to be asked for tiles; in vLLM's worker the first product of its model has done so
    generator = torch.Generator().manual_seed(setup["seed"])

    latest: list[Operator] = []

    def answer(order: dict[str, Any]) -> dict[str, Any]:
        """With a shape, how far its result is off; without, the seconds of each call in a pass over all layers of the latest shape."""
        if order:
            latest.clear()  # before another takes as much memory
            torch.set_num_threads(order["threads"])
            latest.append(Operator(order, generator))
            return {"difference": latest[0].error()}
        (operator,) = latest
        return {"seconds": second_pass(operator.attend, operator.num_layers)}

    return {"version": str(vllm.__version__)}, answer


if __name__ == "__main__":
    load_first_what_vllm_wants(__file__)
    converse(begin)
