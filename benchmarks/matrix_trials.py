"""One architecture on trial: over our engine in every mix, and in transformers' continuous batching, against its own ``generate``.

Owns the verdicts. Each trial runs in a process of its own.
"""

from __future__ import annotations

import logging
import resource
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
        inconsistent: whether ``generate`` says something else without a cache, so that nobody can be right.
    """

    kind: str
    detail: str = ""
    tier: str = ""
    mixes: tuple[MixReport, ...] = ()
    expected: tuple[tuple[Prompt, tuple[int, ...]], ...] = field(default=(), repr=False)
    inconsistent: bool = False


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
    except Exception as error:
        return _without_reference(model, error)
    verdict = _judge_engine(model, references, inconsistency)
    expected = tuple((prompt, references[prompt].token_ids) for prompt in references.prompts)
    detail = f"{verdict.detail} (besides, generate contradicts itself: {inconsistency})" if inconsistency else verdict.detail
    return replace(verdict, detail=detail, expected=expected, inconsistent=inconsistency is not None)


def _judge_engine(model: PreTrainedModel, references: References, inconsistency: str | None) -> Verdict:
    try:
        runner = parity_runner(model)
    except (UnsupportedModelError, UnsupportedBackendError) as error:
        return Verdict(REFUSED, str(error))
    except Exception as error:
        return Verdict(FAILS, _words(error))
    if runner.max_positions_reason is not None and runner.max_positions is not None and runner.max_positions < references.longest:
        return Verdict(REFUSED, f"beyond {runner.max_positions} tokens: {runner.max_positions_reason}", _tier(runner))
    mixes = run_mixes(runner, references)
    different = [f"{mix.name}: {mix.difference}" for mix in mixes if mix.difference is not None]
    failed = [f"{mix.name}: {mix.error}" for mix in mixes if mix.error is not None]
    if different:
        return Verdict(WRONG if inconsistency is None else INCONSISTENT, different[0], _tier(runner), mixes)
    return Verdict(FAILS, failed[0], _tier(runner), mixes) if failed else Verdict(RIGHT, "", _tier(runner), mixes)


def _without_reference(model: PreTrainedModel, error: Exception) -> Verdict:
    own = f"its own generate fails: {_words(error)}"
    try:
        return Verdict(NO_REFERENCE, own, _tier(parity_runner(model)))
    except (UnsupportedModelError, UnsupportedBackendError) as refusal:
        return Verdict(REFUSED, f"{refusal} (besides, {own})")


def try_seq2seq(model_type: str, seed: int) -> Verdict:
    """An encoder-decoder, whose encoder reads the prompts; or a decoder that hears (it is in the same list), on text."""
    _quiet()
    try:
        model = shrunk_seq2seq_model(model_type, seed=seed)
    except Exception as error:
        return Verdict(NOT_BUILT, _words(error))
    return _judge_model(model, seed)


def try_continuous_batching(
    model_type: str, seed: int, implementation: str, expected: Sequence[tuple[Prompt, tuple[int, ...]]], inconsistent: bool
) -> Verdict:
    """A decoder in transformers' ``generate_batch``, with the sizes that ours had: blocks of 4 tokens, steps of few."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    _quiet()
    prompts, wanted = [list(prompt) for prompt, _ in expected], [list(tokens) for _, tokens in expected]
    try:
        model: Any = shrunk_model(model_type, seed=seed, attn_implementation=implementation)
        model.generation_config = GenerationConfig(pad_token_id=0)  # no tokens that its defaults force, as in the reference
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
    if equal == len(wanted):
        return Verdict(RIGHT)
    return Verdict(INCONSISTENT if inconsistent else WRONG, f"{equal} of {len(wanted)} outputs as alone, no error given")


def _tier(runner: ModelRunner) -> str:
    tier = runner.tier
    parts = [tier.name]
    if tier.adapters:
        parts.append("by an adapter")
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
