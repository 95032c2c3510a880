"""What a machine has to hold bytes with. It owns nothing."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

LARGE_PAGE_NBYTES = 2 << 20  # of x86-64, and of aarch64 with its usual small pages; where they are larger, the advice covers fewer


def physical_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def zeros(num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero-filled buffer ``[num_rows, width]``, on Linux in large pages where the system has them to give.

    Blocks are read in random order: with small pages, the processor has to look up where nearly each of them lies.

    Raises:
        RuntimeError: the device refused the memory.
    """
    buffer = torch.empty(num_rows, width, dtype=dtype, device=device)
    if buffer.device.type == "cpu":
        _ask_for_large_pages(buffer)  # before it is written: pages are given then
    return buffer.zero_()


def _ask_for_large_pages(buffer: Tensor) -> None:
    """Nothing depends on the answer."""
    first = -(-buffer.data_ptr() // LARGE_PAGE_NBYTES) * LARGE_PAGE_NBYTES
    end = (buffer.data_ptr() + buffer.nbytes) // LARGE_PAGE_NBYTES * LARGE_PAGE_NBYTES
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux
    if advice is not None and end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)
