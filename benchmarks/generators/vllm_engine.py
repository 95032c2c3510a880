"""vLLM's ``LLM.generate`` on the CPU. Prefix caching is on, as it is by default, and emptied between answers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `contest` and its neighbours are found

from contest import Answer, Contestant, Watch
from workloads import Workload

from generators.loop import Missing, Setup, serve
from generators.vllm_start import load_first_what_vllm_wants, loaded_first


class VllmEngine:
    """A ``Contestant``: all requests handed over at once, without tokenizer and detokenizing.

    Args:
        setup: ``options["compiled"]``: whether its model is compiled, by torch and the C++ compiler that it needs for that.
    """

    def __init__(self, setup: Setup) -> None:
        import vllm

        self._params: Any = vllm.SamplingParams
        compiled = bool(setup.options["compiled"])
        self.label = ", ".join([f"vLLM {vllm.__version__}", "compiled" if compiled else "eager", setup.dtype, *loaded_first()])
        self._llm: Any = vllm.LLM(
            model=setup.folder,
            dtype=setup.dtype,
            enforce_eager=not compiled,
            skip_tokenizer_init=True,
            max_model_len=setup.max_len,
            enable_prefix_caching=True,
            seed=0,
        )

    def answer(self, workload: Workload) -> Answer:
        """Generate everything, timed."""
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in workload.prompts]
        params = [self._params(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False) for length in workload.output_lens]
        self._llm.reset_prefix_cache()
        watch = Watch()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        times = watch.read()
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return Answer(times, [list(output.outputs[0].token_ids) for output in outputs], {"cached prompt tokens": cached})

    def close(self) -> None:
        """Nothing: its processes end with this one."""


def load(setup: Setup) -> Sequence[Contestant]:
    """One engine. Its logs are kept to what goes wrong."""
    if importlib.util.find_spec("vllm") is None:
        raise Missing("vllm is not installed in this interpreter")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # it leaves the number of threads as it was set
    return [VllmEngine(setup)]


if __name__ == "__main__":
    load_first_what_vllm_wants(__file__)
    serve(load)
