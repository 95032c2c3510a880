"""pagedkv and transformers' two ways, as they are in ``contestants.py``, one of them in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `contest` and its neighbours are found

import torch
import transformers
from contest import Contestant
from contestants import ContinuousBatching, Ours, Padded

from generators.loop import Setup, serve
from pagedkv.models import load_model


def load(setup: Setup) -> Sequence[Contestant]:
    """The variants of the one that ``options["who"]`` names: ours, padded or continuous."""
    torch.set_num_threads(setup.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = load_model(setup.folder, dtype=getattr(torch, setup.dtype))
    options = setup.options
    if options["who"] == "ours":
        return [Ours(model, backend=options["backend"])]
    if options["who"] == "padded":
        return [Padded(model, batch_size=size) for size in options["batch_sizes"]]
    return [ContinuousBatching(model, page_size=page, max_batch_tokens=tokens) for page, tokens in options["pages"]]


if __name__ == "__main__":
    serve(load)
