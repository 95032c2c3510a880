"""The two functions that we register with transformers, and the switch that points a model at them for one forward.

Owns the registration and the delegation: with no active step (an ordinary forward, training, ``generate``, another
thread) the registered functions call what the model used before, with every argument as it came. It does not decide
what attention computes (``step.py``). A model is pointed at us only while a step runs, so that outside a step its
config is what it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pagedkv.errors import StepError, UnsupportedModelError
from pagedkv.models.context import AttentionCall, MaskFunction, active_step

# Keywords that change what attention computes and that paged attention does not know.
_REFUSED_KEYWORDS = ("position_bias", "indices", "head_mask")
_ATTRIBUTE = "_attn_implementation_internal"
_PREFIX = "pagedkv_"


class _Name(str):
    """A name of ours that outside of a step is equal to the former one, too.

    Some models choose their code by comparing the name, and a forward in another thread must choose what it did before.
    """

    former: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and (str.__eq__(self, other) or (active_step() is None and other == self.former))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # of its own name, under which the functions are registered


def implementation_name(previous: str) -> str:
    """The name under which our functions stand in for the implementation ``previous``.

    The former name is spelled in hexadecimal: modeling code tests names for substrings such as ``flash`` and ``sdpa``.
    """
    name = _Name(f"{_PREFIX}{previous.encode().hex()}")
    name.former = previous
    return name


def register(previous: str) -> str:
    """Register the attention and the mask function that stand in for ``previous``; returns their name. Idempotent."""
    name = implementation_name(previous)
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, _mask_function(previous))
        AttentionInterface.register(name, _attention_function(previous))
    return name


def attention_configs(model: PreTrainedModel) -> tuple[PreTrainedConfig, ...]:
    """The distinct config objects that the text part of a model reads its attention implementation from."""
    top = model.config
    text = top.get_text_config(decoder=True)
    other: set[int] = set()
    for key in top.sub_configs:
        sub = getattr(top, key, None)
        if isinstance(sub, PreTrainedConfig) and sub is not text:
            other.add(id(sub))
    found: dict[int, PreTrainedConfig] = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in other:
            found.setdefault(id(config), config)
    return tuple(found.values())


@contextmanager
def pointed_at_us(configs: tuple[PreTrainedConfig, ...]) -> Iterator[None]:
    """Switch the attention implementation of ``configs`` to ours for a ``with`` block, and back whatever happens.

    Raises:
        StepError: they are switched already, by a step of the same model that is still running.
    """
    before = [getattr(config, _ATTRIBUTE) for config in configs]
    if any(previous is not None and previous.startswith(_PREFIX) for previous in before):
        raise StepError("another step of the same model is running: steps of one model take turns")
    try:
        for config, previous in zip(configs, before, strict=True):
            setattr(config, _ATTRIBUTE, register(previous or "eager"))
        yield
    finally:
        for config, previous in zip(configs, before, strict=True):
            setattr(config, _ATTRIBUTE, previous)


def _mask_function(previous: str) -> Callable[..., object]:
    def pagedkv_mask(*args: Any, mask_function: MaskFunction | None = None, **kwargs: Any) -> object:
        step = active_step()
        if step is not None and mask_function is not None:
            return step.mask(mask_function, kwargs.get("q_length", 1), kwargs.get("device"))  # type: ignore[arg-type]
        former = ALL_MASK_ATTENTION_FUNCTIONS.get(previous)
        if former is None:
            return None  # an implementation without a mask function gets no mask from transformers either
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        return former(*args, **kwargs)

    return pagedkv_mask


def _attention_function(previous: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def pagedkv_attention(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        step = active_step()
        if step is None:
            return _former_function(module, previous)(module, query, key, value, attention_mask, **kwargs)
        return step.attend(_attention_call(module, query, key, value, attention_mask, kwargs)), None

    return pagedkv_attention


def _former_function(module: Module, previous: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Both names are looked up where the module's class is written: the eager function is each model's own (soft cap,
    # sinks), and a modeling file may override an implementation for itself.
    namespace = sys.modules[type(module).__module__]
    interface: Any = getattr(namespace, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager = getattr(namespace, "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]] | None = interface.get_interface(previous, eager)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} used attention {previous!r}, which cannot be found to call it outside a step")
    return function


def _attention_call(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> AttentionCall:
    for name in _REFUSED_KEYWORDS:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} passes {name}, which paged attention does not know")
    if mask is None and (kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False):
        raise UnsupportedModelError(f"{type(module).__name__} looks at later tokens (is_causal is False)")
    if kwargs.get("dropout"):
        raise UnsupportedModelError(f"{type(module).__name__} drops attention weights; a K/V cache is for inference: call model.eval()")
    softcap = kwargs.get("softcap")
    if softcap is None:
        softcap = getattr(module, "attn_logit_softcapping", None)
    scale = kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    if isinstance(window, bool) or (window is not None and window <= 0):
        window = None  # some models state only whether there is one; the mask has the width
    return AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        window=window,
        sinks=kwargs.get("s_aux"),
    )
