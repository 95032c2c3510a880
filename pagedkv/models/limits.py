"""Numbers that bound what a model can be asked: positions, vocabulary, end-of-sequence ids. Reads configs, owns nothing."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the config states, prompt and output together; None when it states none."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a sequence, ascending: the generation config's, else the model config's, else none."""
    generation = getattr(model, "generation_config", None)
    value = getattr(generation, "eos_token_id", None)
    if value is None:
        value = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if value is None:
        return ()
    ids = {value} if isinstance(value, int) else {int(token) for token in value}
    return tuple(sorted(token for token in ids if token >= 0))  # some configs say -1 for none


def decoder_start_token_id(model: PreTrainedModel) -> int | None:
    """The id with which the decoder of an encoder-decoder begins, as ``generate`` finds it; None where nothing states one."""
    configs = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return None


def num_token_ids(model: PreTrainedModel) -> int:
    """How many token ids the model can read: rows of its input embedding; of the encoder, where it has one."""
    return _num_rows(model.get_input_embeddings())


def num_decoder_token_ids(model: PreTrainedModel) -> int:
    """The same of the decoder."""
    if not model.config.is_encoder_decoder:
        return num_token_ids(model)
    return _num_rows(model.get_decoder().get_input_embeddings())  # type: ignore[no-untyped-call]


def _num_rows(embedding: Any) -> int:
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else embedding.weight.shape[0])
