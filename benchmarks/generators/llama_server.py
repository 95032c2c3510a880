"""llama.cpp's server on the loopback address, asked for all requests at once, each over a connection of its own.

It runs as many slots as the workload has requests, each as long as the longest, and is started again, untimed, where those numbers change.
Its slots keep their last prompt; the tokens change from round to round, so that this serves no later answer.

Told to ignore the end of sequence, it forbids the tokens that end one, where all others may make them and go on: its tokens may differ from
such a place on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `contest` and its neighbours are found

from contest import Answer, Contestant, Watch
from workloads import Workload

from generators.loop import Missing, Setup, serve

STORED = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
STARTING_S = 120.0
ROUNDING = 256  # its contexts are multiples of this


class LlamaServer:
    """A ``Contestant``.

    Args:
        setup: ``options["server"]``: path of the program.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._shape = (0, 0)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.label = f"llama.cpp {_version(setup.options['server'])}, {setup.dtype}"

    def answer(self, workload: Workload) -> Answer:
        """Generate everything, timed from the first connection to the last answer."""
        shape = (workload.num_requests, -(-(max(workload.total_lens) + 1) // ROUNDING) * ROUNDING)
        if shape != self._shape:
            self._restart(shape)
        bodies = [
            json.dumps(
                {"prompt": prompt, "n_predict": length, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": True}
            )
            for prompt, length in zip(workload.prompts, workload.output_lens, strict=True)
        ]
        with ThreadPoolExecutor(workload.num_requests) as pool:
            watch = Watch()
            results = list(pool.map(self._complete, bodies))
            times = watch.read()
        return Answer(times, [result["tokens"] for result in results])

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _complete(self, body: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"the server answered with status {response.status}: {text[:200]}")
        result: dict[str, Any] = json.loads(text)
        return result

    def _restart(self, shape: tuple[int, int]) -> None:
        self.close()
        slots, length = self._shape = shape
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        kind, threads = STORED[self._setup.dtype], str(self._setup.threads)
        command = [self._setup.options["server"], "--model", str(self._setup.gguf), "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * length), "--threads", threads, "--threads-batch", threads]
        command += ["--cache-type-k", kind, "--cache-type-v", kind, "--threads-http", str(slots + 2)]
        command += ["--cache-ram", "0", "--no-webui", "--log-verbosity", "0"]
        self._process = subprocess.Popen(command, stdout=sys.stderr)
        self._wait()

    def _wait(self) -> None:
        deadline = monotonic() + STARTING_S
        while monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            with contextlib.suppress(OSError), contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return
            sleep(0.1)
        self._shape = (0, 0)
        raise RuntimeError("the server did not start")


def _version(server: str) -> str:
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")]
    return lines[0].partition(":")[2].split("(")[0].strip() if lines else "of unknown version"


def load(setup: Setup) -> Sequence[Contestant]:
    """One server."""
    if not Path(setup.options["server"]).is_file():
        raise Missing("there is no such program")
    if setup.gguf is None:
        raise Missing("it reads its model from a GGUF file, and this model has none")
    return [LlamaServer(setup)]


if __name__ == "__main__":
    serve(load)
