"""Numbers that bound what a model can be asked: positions, vocabulary, end-of-sequence ids. Reads configs, owns nothing."""

from __future__ import annotations

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


def num_token_ids(model: PreTrainedModel) -> int:
    """How many token ids the model can read: rows of its input embedding."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else embedding.weight.shape[0])  # type: ignore[index]
