"""Settings that every test shares: one thread, nothing from the network, and long sweeps that can be cut to a time."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

gc.disable()  # until all tests are collected: what is imported until then stays, and searching it for garbage takes seconds

SWEEP_SEED = 20261122

# The assertions of helper modules, too, hold under ``python -O``, where plain ones are not even compiled.
for helper in Path(__file__).parent.rglob("*.py"):
    if not helper.stem.startswith(("test_", "conftest")):
        pytest.register_assert_rewrite(helper.stem)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep-seconds",
        type=float,
        default=None,
        help="run the selected tests in an order drawn from a fixed seed and start no further one after so many seconds",
    )

    parser.addoption("--kernel-folder", type=Path, default=None, help="take the native kernels from here: other builds of the same source")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sweep-seconds") is not None:
        config.pluginmanager.register(Sweep(config.getoption("--sweep-seconds")), "sweep")
    if config.getoption("numprocesses", None):  # only hands out tests: its workers need not wait until it has imported torch
        return
    try:
        import torch
    except ImportError:  # the bookkeeping is tested without it
        return
    torch.set_num_threads(1)
    folder = config.getoption("--kernel-folder")
    if folder is not None:
        from pagedkv.attention.native import library

        library.FOLDER = folder


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


class Sweep:
    """Runs as much of a long sweep as fits into a time; what was left out is counted aloud, and counts as nothing else."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = 0.0
        self._started = self._selected = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        random.Random(SWEEP_SEED).shuffle(items)
        self._selected = len(items)
        self._deadline = time.monotonic() + self._seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self._started and time.monotonic() > self._deadline:
            return True
        self._started += 1
        return None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        left = self._selected - self._started
        terminalreporter.write_line(f"sweep: {self._started} of {self._selected} tests run in {self._seconds:.0f} s, {left} left out")
