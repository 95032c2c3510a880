"""One architecture on trial: over our engine in every mix, and in transformers' continuous batching, against its own ``generate``.

Owns the verdicts. Each trial runs in a process of its own.
"""

from __future__ import annotations

import logging
import resource
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from pagedkv.errors import PagedKVError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.testing.architectures import shrunk_model, shrunk_seq2seq_model
from pagedkv.testing.parity import MixReport, Prompt, References, parity_runner, run_mixes

NUM_TOKEN_IDS = 90  # of 97: the ids above are left to whatever an architecture takes for special

_MOST_BYTES = 12 * 2**30

RIGHT, WRONG, REFUSED, FAILS = "right", "WRONG", "refused", "fails"
INCONSISTENT, NO_REFERENCE, NOT_BUILT = "own cache inconsistent", "own generate fails", "not built"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an architecture.

    Attributes:
        kind: one of the words above.
        detail: why, in words; empty for a right one.
        tier: how it runs where it runs.
        mixes: what each mix of requests gave.
        expected: prompts and what ``generate`` says to each, for whoever is tried next.
    """

    kind: str
    detail: str = ""
    tier: str = ""
    mixes: tuple[MixReport, ...] = ()
    expected: tuple[tuple[Prompt, tuple[int, ...]], ...] = field(default=(), repr=False)


def try_ours(model_type: str, seed: int) -> Verdict:
    """A decoder through ``ModelRunner`` and ``Engine``."""
    _quiet()
    try:
        model = shrunk_model(model_type, seed=seed)
    except Exception as error:
        return Verdict(NOT_BUILT, _words(error))
    return _judge_model(model, seed)


def _judge_model(model: PreTrainedModel, seed: int) -> Verdict:
    try:
        references = References(model, num_token_ids=NUM_TOKEN_IDS, seed=seed)
        inconsistency = references.inconsistency()
        own = f" (besides, generate contradicts itself: {inconsistency})" if inconsistency else ""
        expected = tuple((prompt, references[prompt].token_ids) for prompt in references.prompts)
    except Exception as error:
        references, own, expected = None, f" (besides, its own generate fails: {_words(error)})", ()
    try:
        runner = parity_runner(model)
    except (UnsupportedModelError, UnsupportedBackendError) as error:
        return Verdict(REFUSED, str(error) + own, expected=expected)
    except Exception as error:
        return Verdict(FAILS, _words(error), expected=expected)
    if references is None:
        return Verdict(NO_REFERENCE, own, _tier(runner))
    if runner.max_positions_reason is not None and runner.max_positions is not None and runner.max_positions < references.longest:
        return Verdict(REFUSED, f"beyond {runner.max_positions} tokens: {runner.max_positions_reason}", _tier(runner), expected=expected)
    mixes = run_mixes(runner, references)
    kind, detail = _judged(mixes, inconsistency)
    return Verdict(kind, detail, _tier(runner), mixes, expected)


def _judged(mixes: Sequence[MixReport], inconsistency: str | None) -> tuple[str, str]:
    different = [f"{mix.name}: {mix.difference}" for mix in mixes if mix.difference is not None]
    failed = [f"{mix.name}: {mix.error}" for mix in mixes if mix.error is not None]
    if different:
        return (WRONG, different[0]) if inconsistency is None else (INCONSISTENT, f"{inconsistency}; ours: {different[0]}")
    return (FAILS, failed[0]) if failed else (RIGHT, "")


def try_seq2seq(model_type: str, seed: int) -> Verdict:
    """An encoder-decoder: whether it builds, and what is said to it. A decoder that hears (it is in the same list) is run on text."""
    _quiet()
    try:
        model = shrunk_seq2seq_model(model_type, seed=seed)
    except Exception as error:
        return Verdict(NOT_BUILT, _words(error))
    if not model.config.is_encoder_decoder:
        return _judge_model(model, seed)
    try:
        return Verdict(FAILS, "it is not refused, and no mixes for encoder-decoders are known", _tier(parity_runner(model)))
    except (UnsupportedModelError, UnsupportedBackendError) as error:
        return Verdict(REFUSED, str(error))
    except Exception as error:
        return Verdict(FAILS, _words(error))


def try_continuous_batching(model_type: str, seed: int, implementation: str, expected: Sequence[tuple[Prompt, tuple[int, ...]]]) -> Verdict:
    """A decoder in transformers' ``generate_batch``, with the sizes that ours had: blocks of 4 tokens, steps of few."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    _quiet()
    prompts, wanted = [list(prompt) for prompt, _ in expected], [list(tokens) for _, tokens in expected]
    try:
        model: Any = shrunk_model(model_type, seed=seed, attn_implementation=implementation)
        found = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(max_new_tokens=len(wanted[0]), do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=24, allow_block_sharing=True),
        )
    except (ValueError, NotImplementedError) as error:
        return Verdict(REFUSED, _words(error))
    except Exception as error:
        return Verdict(FAILS, _words(error))
    errors = [str(output.error) for output in found.values() if output.error]
    if errors or len(found) < len(wanted):
        return Verdict(FAILS, errors[0] if errors else f"{len(found)} of {len(wanted)} results")
    equal = sum(list(output.generated_tokens) == tokens for output, tokens in zip(found.values(), wanted, strict=True))
    return Verdict(RIGHT) if equal == len(wanted) else Verdict(WRONG, f"{equal} of {len(wanted)} outputs as alone, no error given")


def _tier(runner: ModelRunner) -> str:
    tier = runner.tier
    parts = [tier.name]
    if "gathered" in tier.layers:
        parts.append("layers gathered")
    if tier.recurrent_state != "none":
        parts.append("with state" if tier.recurrent_state == "chunked" else "with state, prompts whole")
    return ", ".join(parts)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PagedKVError) else f"{type(error).__name__}: {text}"


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))  # what was not shrunk is refused by itself
