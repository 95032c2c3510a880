"""GGUF files: converted once through transformers, then loaded from a cache folder.

Owns the cache's place, its keys and the conversion. It does not own loading (``loading.py``). A cached model is found by
the file's content, so a changed file is another model; a folder appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from pagedkv.errors import ConfigError

_LAYOUT = 1  # of the cached folder; a change of what is stored raises it
_COMPLETE = "config.json"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model is named by a GGUF file."""
    return os.fspath(path).lower().endswith(".gguf")


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/pagedkv``, else ``~/.cache/pagedkv``. Not created here."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pagedkv"


def converted_folder(path: str | os.PathLike[str]) -> Path:
    """The cached folder of a GGUF file: float32 safetensors, config and tokenizer. Converts on the first call.

    Args:
        path: a ``.gguf`` file.

    Raises:
        ConfigError: no such file, a package is missing (names the extra ``pagedkv[gguf]``), or transformers cannot read it.

    Cost: one read of the file for its digest; on the first call the conversion, and on disk four bytes a weight.
    """
    file = _existing(path)
    target = _target(file)
    if not (target / _COMPLETE).is_file():
        _convert(file, target)
    return target


def gguf_config(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a GGUF file, from the cache if it was converted, else from its header. Reads no weights.

    Raises:
        ConfigError: as ``converted_folder``.
    """
    file = _existing(path)
    target = _target(file)
    if (target / _COMPLETE).is_file():
        config: PreTrainedConfig = AutoConfig.from_pretrained(target)
        return config
    _need_packages()
    with _reading(file):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return config


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"model {os.fspath(path)!r}: there is no such GGUF file")
    return file


def _target(file: Path) -> Path:
    digest = hashlib.blake2b(digest_size=16)
    # Versions count: another transformers may map the same file to other weights.
    for part in (str(_LAYOUT), transformers.__version__, file.name, str(file.stat().st_size)):
        digest.update(f"{len(part)}:{part};".encode())
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return cache_folder() / digest.hexdigest()


def _need_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'pagedkv[gguf]'")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, NotImplementedError, OSError, ImportError) as error:
        raise ConfigError(f"transformers {transformers.__version__} cannot read {file.name}: {error}") from error


def _convert(file: Path, target: Path) -> None:
    _need_packages()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _reading(file):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = _dequantised(file)
        tokenizer.save_pretrained(work)
        model.save_pretrained(work)
        try:
            os.rename(work, target)  # whole or not at all; a second converter finds the name taken and drops its copy
        except OSError:
            if not (target / _COMPLETE).is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _dequantised(file: Path) -> PreTrainedModel:
    # Where transformers can keep a file's blocks packed it has to be told not to, and to forget where weights came from.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model
