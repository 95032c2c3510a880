"""Whether a model goes on from recurrent state with several tokens at once, or by one token only.

Some layers of transformers read their state for a single new token, and start afresh for more: right when a prompt comes in one piece,
silently wrong when it comes in two. Numbers alone may not show it where weights are small; NaN does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pagedkv.models.call import ModelCall
from pagedkv.models.context import OwnAttention, activate
from pagedkv.models.states import CONV, RECURRENT, StatefulCache, is_of_kind
from pagedkv.storage import StateSpec

RecurrentState = Literal["none", "chunked", "whole"]


def reads_state_in_chunks(call: ModelCall, specs: tuple[StateSpec, ...]) -> bool:
    """Whether whatever a model reads of its state for one new token, it reads for two as well.

    State of NaN makes NaN of every logit that depends on it, in each kind of state by itself.

    Args:
        call: how to call the model.
        specs: its state.

    Cost: up to four forwards of one or two tokens.
    """
    return all(not _reads(call, specs, kind, num_tokens=1) or _reads(call, specs, kind, num_tokens=2) for kind in (CONV, RECURRENT))


def _reads(call: ModelCall, specs: tuple[StateSpec, ...], kind: str, *, num_tokens: int) -> bool:
    device = call.model.device
    states = {spec.name: torch.zeros(1, *spec.shape, dtype=spec.dtype, device=device) for spec in specs}
    _poison(states, kind)
    step = OwnAttention()  # it sees the new tokens alone
    positions = torch.arange(num_tokens, device=device)
    cache = StatefulCache(step, 0, config=call.model.config, states=states)
    with activate(step):
        logits = call(torch.zeros_like(positions)[None], positions[None], cache=cache, columns=positions)
    return not bool(logits.isfinite().all())


def _poison(states: Mapping[str, Tensor], kind: str) -> None:
    for name, tensor in states.items():
        if is_of_kind(name, kind):
            tensor.fill_(float("nan"))
