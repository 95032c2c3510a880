"""The inner side of the pipe: read a workload from standard input, answer it, write the answer. Standard library only.

One JSON object a line each way. The first line in says how to load, the first line out who answers in which variants; every further line in
is a workload and the number of the variant that is to answer it. A line out may be the reason why there is no answer. What the rival prints
itself goes to standard error, so that it cannot mix with the answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from contest import Contestant
from workloads import Workload


class Missing(Exception):
    """What is wanted is not there; the text says what."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How to load.

    Attributes:
        folder: of the model, as transformers saves one.
        gguf: the same model as a GGUF file; None when there is none.
        dtype: ``"float32"`` or ``"bfloat16"``, of weights and K/V.
        threads: that may compute.
        num_seqs: most requests of a workload.
        max_len: most tokens of a request, prompt and answer.
        num_tokens: most tokens that are alive at once.
        options: what only one project knows.
    """

    folder: str
    gguf: str | None
    dtype: str
    threads: int
    num_seqs: int
    max_len: int
    num_tokens: int
    options: dict[str, Any]


def serve(load: Callable[[Setup], Sequence[Contestant]]) -> None:
    """Load, then answer workloads.

    Args:
        load: makes the variants that can answer.
    """

    def begin(setup: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        variants = load(Setup(**setup))
        return {"labels": [variant.label for variant in variants]}, lambda order: _answer(variants[order["variant"]], order)

    converse(begin)


def converse(begin: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """Read an object a line and answer each, until standard input ends.

    Args:
        begin: given the first object, returns the answer to it and what answers all others. An exception from it, or from what it
            returns, is sent instead of the answer; ``Missing`` is said without a traceback's words.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        greeting, answer = begin(json.loads(sys.stdin.readline()))
    except Exception as error:
        _say(out, {"error": _reason(error)})
        return
    _say(out, greeting)
    for line in sys.stdin:
        try:
            _say(out, answer(json.loads(line)))
        except Exception as error:  # whatever a rival raises becomes a row of the table
            _say(out, {"error": _reason(error)})


def _answer(contestant: Contestant, order: dict[str, Any]) -> dict[str, Any]:
    prompts = tuple(tuple(prompt) for prompt in order["prompts"])
    answer = contestant.answer(Workload(order["name"], order["title"], prompts, tuple(order["output_lens"]), order["num_shared"]))
    given = tuple(map(len, answer.tokens))
    if given != tuple(order["output_lens"]):
        raise RuntimeError(f"it answered with {sum(given)} tokens in {len(given)} requests, where {sum(order['output_lens'])} were wanted")
    return asdict(answer)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"


def _say(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()
