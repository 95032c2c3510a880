"""Attention backends by name. It owns the names; each backend lives in its own module and is imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from pagedkv.attention.protocol import AttentionBackend
from pagedkv.errors import UnsupportedBackendError


def _reference() -> AttentionBackend:
    from pagedkv.attention.reference import ReferenceBackend

    return ReferenceBackend()


def _torch() -> AttentionBackend:
    from pagedkv.attention.torch_backend import TorchBackend

    return TorchBackend()


BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType({"reference": _reference, "torch": _torch})
"""Factories by name, in no order of preference. Each call makes a new instance with its own scratch memory."""


def get_backend(name: str | AttentionBackend = "auto", *, device: torch.device | str) -> AttentionBackend:
    """An attention backend for a device.

    Args:
        name: ``"auto"`` for the fastest that runs everywhere on this device, a name of ``BACKENDS``, or a backend object,
            which is returned as it is.
        device: where the pools live.

    Returns:
        a new instance, to be used by one engine.

    Raises:
        UnsupportedBackendError: an unknown name; lists the known ones.
    """
    if not isinstance(name, str):
        if not isinstance(name, AttentionBackend):
            raise UnsupportedBackendError(f"{name!r} is neither a name nor an object with the methods of AttentionBackend")
        return name
    factory = BACKENDS.get(_preferred(torch.device(device)) if name == "auto" else name)
    if factory is None:
        raise UnsupportedBackendError(f"attention backend {name!r} is unknown: use one of {', '.join(['auto', *BACKENDS])}")
    return factory()


def _preferred(device: torch.device) -> str:
    """The name behind ``"auto"`` on a device."""
    return "torch"
