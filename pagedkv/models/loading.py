"""Models and tokenizers from what a user names: a hub id, a folder, a GGUF file, or objects that are loaded already.

Owns the choice of the loader. It does not own GGUF conversion (``gguf.py``) nor whether a model can be run (``runner.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pagedkv.checks import shown
from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models.adapters import AdaptedModel, unwrapped
from pagedkv.models.gguf import converted_folder, gguf_config, is_gguf
from pagedkv.models.refusals import check_config
from pagedkv.storage.storage import as_device

ModelName = str | os.PathLike[str]
DtypeName = str | torch.dtype | None
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_model(
    model: ModelName | PreTrainedModel | AdaptedModel,
    *,
    dtype: DtypeName = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A model in evaluation mode, loaded if it is not yet.

    Args:
        model: hub id, folder, ``.gguf`` file, or a loaded model, which is returned as it is, or one in a wrapper (PEFT's),
            which is unwrapped.
        dtype: of the weights: a torch dtype, its name, or None / ``"auto"`` for the checkpoint's own (float32 for GGUF).
        device: where to; None for ``"cuda"`` when there is one, else ``"cpu"``.

    Returns:
        the model.

    Raises:
        ConfigError: nothing of that name, an unknown dtype, or a loaded model that is of another dtype or elsewhere than asked.
        UnsupportedModelError: transformers has no causal language model for it, it needs code of its own, or its files do not hold the
            weights that its config states.

    Cost: reads the weights; for a GGUF file see ``converted_folder``.
    """
    wanted = parse_dtype(dtype)
    if isinstance(model, AdaptedModel):
        model = unwrapped(model)
    if isinstance(model, PreTrainedModel):
        return _as_asked(model, dtype=wanted, device=device)
    if not isinstance(model, (str, os.PathLike)):
        raise UnsupportedModelError(f"{type(model).__name__} is neither a name of a model nor a transformers PreTrainedModel")
    folder = _folder(model)
    target = as_device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _refused(f"model {os.fspath(model)!r}"):
        config = load_config(folder)
        check_config(config, name=f"model {os.fspath(model)!r}")
        pair: Any = model_class(config).from_pretrained(
            folder,
            dtype="auto" if wanted is None else wanted,
            trust_remote_code=False,  # None asks on the terminal
            ignore_mismatched_sizes=True,  # to name them
            output_loading_info=True,
        )
    loaded: PreTrainedModel = pair[0]
    _check_loaded(pair[1], name=f"model {os.fspath(model)!r}")
    loaded.to(target)  # type: ignore[arg-type]
    loaded.eval()  # type: ignore[no-untyped-call]
    return loaded


def load_tokenizer(
    tokenizer: ModelName | PreTrainedTokenizerBase | None = None,
    *,
    model: ModelName | PreTrainedModel | AdaptedModel,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that goes with a model.

    Args:
        tokenizer: hub id, folder, ``.gguf`` file, or a loaded tokenizer, which is returned as it is; None for the model's own.
        model: what was given to ``load_model``.

    Returns:
        the tokenizer; None when none was named and the model is a loaded one or a folder without tokenizer files: token
        ids go in and come out.

    Raises:
        ConfigError: nothing of that name.
    """
    if tokenizer is None:
        if isinstance(model, PreTrainedModel | AdaptedModel):
            return None
        tokenizer = model
        if Path(tokenizer).is_dir() and not any((Path(tokenizer) / name).is_file() for name in _TOKENIZER_FILES):
            return None
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if not isinstance(tokenizer, str | os.PathLike):
        raise ConfigError(f"tokenizer is {shown(tokenizer)}: it must be a name, a folder, or a transformers tokenizer")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_folder(tokenizer), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {os.fspath(tokenizer)!r} cannot be loaded: {error}") from error
    return loaded


def load_config(model: ModelName) -> PreTrainedConfig:
    """The config of a hub id, folder or GGUF file; no weights are read.

    Raises:
        ConfigError: nothing of that name.
        UnsupportedModelError: transformers does not know the config, or finds it wrong.
    """
    if is_gguf(model):
        return gguf_config(model)
    with _refused(f"model {os.fspath(model)!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(os.fspath(model), trust_remote_code=False)
    return config


def model_class(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] | type[AutoModelForSeq2SeqLM]:
    """The class of transformers that makes a model with a language model head of a config: of one with images, where there is no other."""
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    known, with_images = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if type(config) in with_images and type(config) not in known else AutoModelForCausalLM


def parse_dtype(dtype: DtypeName) -> torch.dtype | None:
    """A floating dtype from itself or its name; None for None and ``"auto"``. Raises ``ConfigError`` for anything else."""
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r}: use a floating torch dtype or one of {', '.join(['auto', *_DTYPES])}")
    return found


def _folder(name: ModelName) -> str:
    return os.fspath(converted_folder(name)) if is_gguf(name) else os.fspath(name)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn what transformers raises over files that it cannot use into errors of ours."""
    try:
        yield
    except ConfigError:
        raise  # refused already, further in; to Python it is a ValueError
    except OSError as error:
        raise ConfigError(f"{name} cannot be loaded: {error}") from error
    except (ValueError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} needs code from its own repository, which is never run here: load it with "
                "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) if you trust it, and pass the model"
            ) from error
        raise UnsupportedModelError(f"{name}: {error}") from error


def _check_loaded(info: Mapping[str, Any], *, name: str) -> None:
    """Raise ``UnsupportedModelError`` for weights that transformers had to invent: the config states other shapes than the files have."""
    mismatched = {str(key): f"is {tuple(found)} and should be {tuple(stated)}" for key, found, stated in info["mismatched_keys"]}
    missing = {str(key): "is missing" for key in info["missing_keys"]}
    wrong = sorted((missing | mismatched).items())
    if wrong:
        shown = ", ".join(f"{key} {what}" for key, what in wrong[:3])
        raise UnsupportedModelError(f"{name}: {len(wrong)} of the weights that its config states are not in its files: {shown}")


def _as_asked(model: PreTrainedModel, *, dtype: torch.dtype | None, device: str | torch.device | None) -> PreTrainedModel:
    # The model is the caller's: it is never cast or moved behind their back.
    if dtype is not None and model.dtype != dtype:
        raise ConfigError(f"dtype is {dtype} but the loaded model is {model.dtype}: leave dtype out or cast the model")
    if device is not None:
        wanted = as_device(device)
        if wanted.type != model.device.type or (wanted.index is not None and wanted.index != model.device.index):
            raise ConfigError(f"device is {wanted} but the loaded model is on {model.device}: leave device out or move the model")
    return model
