"""Attention backends by name. It owns the names; each backend lives in its own module and is imported when asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from pagedkv.attention.protocol import AttentionBackend, AttentionSpec
from pagedkv.errors import UnsupportedBackendError
from pagedkv.storage.storage import as_device

_LOG = logging.getLogger(__name__)


def _reference() -> AttentionBackend:
    from pagedkv.attention.reference import ReferenceBackend

    return ReferenceBackend()


def _torch() -> AttentionBackend:
    from pagedkv.attention.torch_backend import TorchBackend

    return TorchBackend()


def _cpu() -> AttentionBackend:
    from pagedkv.attention.cpu_backend import CpuBackend

    return CpuBackend()


BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType({"reference": _reference, "torch": _torch, "cpu": _cpu})
"""Factories by name, in no order of preference. Each call makes a new instance with its own scratch memory."""


def get_backend(
    name: str | AttentionBackend = "auto", *, device: torch.device | str, specs: Sequence[AttentionSpec] = ()
) -> AttentionBackend:
    """An attention backend for a device.

    Args:
        name: ``"auto"`` for the fastest that is there and supports every one of ``specs``, a name of ``BACKENDS``, or a backend object,
            which is returned as it is.
        device: where the pools live.
        specs: the layers that will be run; only ``"auto"`` looks at them.

    Returns:
        a new instance, to be used by one engine. Where ``"auto"`` has to do without the fastest, it logs the reason.

    Raises:
        ConfigError: a device that torch does not know.
        UnsupportedBackendError: an unknown name (lists the known ones), or a named backend that cannot run here, with the reason.
    """
    if not isinstance(name, str):
        if not isinstance(name, AttentionBackend):
            raise UnsupportedBackendError(f"{name!r} is neither a name nor an object with the methods of AttentionBackend")
        return name
    if name == "auto":
        return _preferred(as_device(device), specs)
    factory = BACKENDS.get(name)
    if factory is None:
        raise UnsupportedBackendError(f"attention backend {name!r} is unknown: use one of {', '.join(['auto', *BACKENDS])}")
    return factory()


def _preferred(device: torch.device, specs: Sequence[AttentionSpec]) -> AttentionBackend:
    """The backend behind ``"auto"``: the native kernel on the CPU, torch elsewhere and for what the kernel does not know."""
    if device.type != "cpu":
        return _torch()
    try:
        backend = _cpu()
    except UnsupportedBackendError as error:
        _LOG.warning("%s; attention runs in plain torch, which is slower", error)
        return _torch()
    reasons = [reason for spec in specs if (reason := backend.supports(spec)) is not None]
    if not reasons:
        return backend
    _LOG.info("attention backend %r is passed over: %s", backend.name, reasons[0])
    return _torch()
