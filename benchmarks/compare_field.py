"""Who takes part in ``compare.py``, and how each is started: the options, the processes, and the files that some of them need.

Owns who is enlisted. Does not own the contest, nor how a project is called well (``generators/``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Report, numbers, pairs
from contest import BATCH_SIZES, PAGES, Contestant
from elsewhere import Elsewhere, FailedError
from float_gguf import write_float_gguf
from generators.loop import Setup

OURS, PADDED, CONTINUOUS = "pagedkv", "generate", "continuous batching"
VLLM, OPENVINO, LLAMA = "vLLM", "OpenVINO", "llama.cpp"
PARTIES = (OURS, PADDED, CONTINUOUS, VLLM, OPENVINO, LLAMA)
OPENVINO_BATCH_TOKENS = 2_048


@dataclass(frozen=True, slots=True)
class Party:
    """One column of the comparison: a process and the ways in which it can answer. Named after one of ``PARTIES``, then a setting."""

    name: str
    process: Elsewhere
    variants: Sequence[Contestant]

    def close(self) -> None:
        """End its process."""
        self.process.close()


def add_party_options(parser: argparse.ArgumentParser) -> None:
    """The options that say who takes part and where it is found."""
    parser.add_argument("--backends", type=_words, default=["auto"], help="attention of pagedkv: each takes part, the first is the measure")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' two ways out")
    parser.add_argument("--batch-sizes", type=numbers, default=BATCH_SIZES, help="padded batches that are tried")
    parser.add_argument("--pages", type=pairs, default=PAGES, help="continuous batching: PAGE_SIZExTOKENS_A_STEP,... that are tried")
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument("--vllm-modes", type=_words, default=["eager"], help="some of eager,compiled")
    parser.add_argument("--openvino-python", metavar="PATH", help="interpreter that has openvino-genai")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server")


def enlist(report: Report, args: argparse.Namespace, *, setup: Setup, config: dict[str, Any], scratch: Path) -> list[Party]:
    """Start everybody, ours first; says why the others do not take part.

    Raises:
        SystemExit: pagedkv itself does not start.
    """
    field: list[Party] = []
    for name, process in _processes(report, args, setup=setup, config=config, scratch=scratch):
        try:
            party = Party(name, process, process.variants())
        except FailedError as error:
            if not field:
                raise SystemExit(f"{name} does not start: {error}") from error
            report.note(f"{name}: left out, {error}")
            report.figure(f"{name}, left out", str(error))
        else:
            field.append(party)
            print(f"loaded {name}: " + "; ".join(variant.label for variant in party.variants), flush=True)
    return field


def _processes(
    report: Report, args: argparse.Namespace, *, setup: Setup, config: dict[str, Any], scratch: Path
) -> Iterator[tuple[str, Elsewhere]]:
    wait = args.timeout

    def here(**options: Any) -> Elsewhere:
        return Elsewhere("here", replace(setup, options=options), timeout_s=wait)

    for backend in args.backends:
        yield OURS if backend == args.backends[0] else f"{OURS}, {backend}", here(who="ours", backend=backend)
    if not args.no_transformers:
        yield PADDED, here(who="padded", batch_sizes=sorted({min(size, setup.num_seqs) for size in args.batch_sizes}))
        yield CONTINUOUS, here(who="continuous", pages=args.pages)
    rivals = {VLLM: args.vllm_python, OPENVINO: args.openvino_python, LLAMA: args.llama_server}
    for name, path in rivals.items():
        if path is None:
            report.note(f"{name}: left out, no option says where it is")
            report.figure(f"{name}, left out", "no option says where it is")
    if args.vllm_python is not None:
        for mode in args.vllm_modes:
            options = {"compiled": mode == "compiled"}
            yield f"{VLLM}, {mode}", Elsewhere("vllm_engine", replace(setup, options=options), python=args.vllm_python, timeout_s=wait)
    if args.openvino_python is not None:
        options = {"bytes_per_token": _bytes_per_token(config, setup.dtype), "batch_tokens": OPENVINO_BATCH_TOKENS}
        readable = replace(setup, gguf=_float_file(setup.gguf, "float16", scratch), options=options)
        yield OPENVINO, Elsewhere("openvino_genai", readable, python=args.openvino_python, timeout_s=wait)
    if args.llama_server is not None:
        readable = replace(setup, gguf=_float_file(setup.gguf, setup.dtype, scratch), options={"server": args.llama_server})
        yield LLAMA, Elsewhere("llama_server", readable, timeout_s=wait)


def _float_file(source: str | None, dtype: str, scratch: Path) -> str | None:
    """The same model as a GGUF file of numbers, which lives as long as ``scratch``."""
    if source is None:
        return None
    target = scratch / f"{dtype}.gguf"
    if not target.exists():
        write_float_gguf(Path(source), target, dtype=dtype)
    return str(target)


def _bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * heads * width * 2 * (4 if dtype == "float32" else 2))


def _words(text: str) -> list[str]:
    return text.split(",")
