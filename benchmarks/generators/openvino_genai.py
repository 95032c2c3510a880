"""OpenVINO GenAI's continuous batching on the CPU, from a GGUF file with float16 weights: it reads no other float type.

It widens or narrows them to what it computes in. It has no way to empty its prefix cache; the tokens change from round to round instead.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `contest` is found; this folder would hide the real one

from contest import Answer, Contestant, Watch
from workloads import Workload

from generators.loop import Missing, Setup, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
SPARE_GIB = 1  # of K/V beside what the largest workload needs


class Pipeline:
    """A ``Contestant``: all requests handed over at once as token ids.

    Args:
        setup: ``options["bytes_per_token"]``: of K/V in ``setup.dtype``.
    """

    def __init__(self, setup: Setup) -> None:
        import openvino
        import openvino_genai

        self._openvino: Any = openvino
        self._genai: Any = openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = setup.num_tokens * setup.options["bytes_per_token"] // 2**30 + 1 + SPARE_GIB
        scheduling.max_num_seqs = setup.num_seqs
        scheduling.max_num_batched_tokens = setup.options["batch_tokens"]
        scheduling.enable_prefix_caching = True
        precision = PRECISIONS[setup.dtype]
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": setup.threads,
        }
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(setup.gguf, scheduling, "CPU", properties)
        self.label = f"OpenVINO GenAI {openvino_genai.__version__.split('-')[0]}, {setup.dtype}, weights from float16"

    def answer(self, workload: Workload) -> Answer:
        """Generate everything, timed."""
        import numpy as np

        prompts = [self._openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in workload.prompts]
        configs = []
        for length in workload.output_lens:
            config = self._genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            configs.append(config)
        watch = Watch()
        results = self._pipeline.generate(prompts, configs)
        return Answer(watch.read(), [list(result.m_generation_ids[0]) for result in results])

    def close(self) -> None:
        """Nothing: its memory ends with this process."""


def load(setup: Setup) -> Sequence[Contestant]:
    """One pipeline."""
    if importlib.util.find_spec("openvino_genai") is None:
        raise Missing("openvino_genai is not installed in this interpreter")
    if setup.gguf is None:
        raise Missing("it is given its model as a GGUF file, and this model has none")
    return [Pipeline(setup)]


if __name__ == "__main__":
    serve(load)
