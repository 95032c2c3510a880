"""nano-vLLM's scheduler and block manager, unchanged, without its model runner.

Its package imports CUDA-only kernels at the top, so the package object is made here and only ``nanovllm.engine.scheduler`` is loaded.
Its configuration object insists on blocks of a multiple of 256 tokens and on a model folder; the scheduler itself does not, and is given
the five values that it reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `rivals` is found

from rivals.workload import BLOCK_SIZE, VOCAB_SIZE, DecodeHarness, Workload, measure, report_main


def available() -> str | None:
    """None when the scheduler can be imported, else the reason."""
    if importlib.util.find_spec("nanovllm") is None:
        return "nanovllm is not importable: pass the folder of its source"
    for dependency in ("xxhash", "transformers"):
        if importlib.util.find_spec(dependency) is None:
            return f"nanovllm needs {dependency}, which is not installed"
    return None


def decode_step_times(num_running: int, steps: int, seed: int) -> list[float]:
    """Seconds per planned and completed decode step."""
    return measure(Workload(num_running, steps, seed), NanoHarness)


def version() -> str:
    """Its version, from the installed package or from the build file beside its source."""
    try:
        return metadata.version("nano-vllm")
    except metadata.PackageNotFoundError:
        spec = importlib.util.find_spec("nanovllm")
        build_file = Path(spec.origin).parent.parent / "pyproject.toml" if spec is not None and spec.origin else None
        if build_file is None or not build_file.exists():
            return "unknown"
        return f"{tomllib.loads(build_file.read_text())['project']['version']} (source)"


def _engine() -> tuple[ModuleType, ModuleType, ModuleType]:
    if "nanovllm" not in sys.modules:
        spec = importlib.util.find_spec("nanovllm")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("nanovllm is not importable: pass the folder of its source")
        package = ModuleType("nanovllm")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["nanovllm"] = package
    names = ("nanovllm.engine.scheduler", "nanovllm.engine.sequence", "nanovllm.sampling_params")
    scheduler, sequence, sampling = (importlib.import_module(name) for name in names)
    return scheduler, sequence, sampling


class NanoHarness(DecodeHarness):
    """Its scheduler as ``LLMEngine.step`` drives it: ``schedule``, then ``postprocess``."""

    def __init__(self, workload: Workload) -> None:
        scheduler, self._sequence, self._sampling = _engine()
        self._sequence.Sequence.block_size = BLOCK_SIZE
        config = SimpleNamespace(
            max_num_seqs=workload.num_running,
            max_num_batched_tokens=workload.num_prompt_tokens,
            eos=-1,
            kvcache_block_size=BLOCK_SIZE,
            num_kvcache_blocks=workload.num_blocks,
        )
        self._scheduler = scheduler.Scheduler(config)
        self._workload = workload
        self._rng = workload.sampled()

    def prefill(self) -> None:
        params = self._sampling.SamplingParams(max_tokens=self._workload.max_new_tokens, ignore_eos=True)
        for prompt in self._workload.prompts():
            self._scheduler.add(self._sequence.Sequence(prompt, params))
        while self._scheduler.waiting:
            plan = self.plan()
            self.complete(plan, self.answer(plan))

    def plan(self) -> Any:
        return self._scheduler.schedule()

    def answer(self, plan: Any) -> Any:
        return [self._rng.randrange(VOCAB_SIZE) for _ in plan[0]]

    def complete(self, plan: Any, answer: Any) -> None:
        seqs, is_prefill = plan
        self._scheduler.postprocess(seqs, answer, is_prefill)

    def num_running(self, plan: Any) -> int:
        seqs, is_prefill = plan
        return 0 if is_prefill else len(seqs)


if __name__ == "__main__":
    report_main(__doc__.splitlines()[0], available=available, version=version, times=decode_step_times)
