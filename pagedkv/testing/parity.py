"""Whether a model gives the same tokens over paged K/V as alone: every mix of requests that an engine knows, against ``generate``.

Owns the prompts, the mixes and the comparison. The truth is transformers' own ``generate`` of each prompt alone, never code of
ours; where its cached and its cache-less form disagree there is none, and the report says so. Tokens alone are a weak witness for a
model that repeats itself, so the probability of each is compared as well. transformers is imported when something is run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from pagedkv.engine import Engine
from pagedkv.engine_config import EngineConfig
from pagedkv.errors import PagedKVError
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_MARGIN = 1e-3
"""Between the two best logits, relative to the largest: a hundred times the noise of float32, so equal tokens mean equal sums."""
MOST_LOGPROB_ERROR = 1e-2
"""Of the natural logarithm of a token's probability; the noise of float32 is a hundredth of it."""

_BLOCK_SIZE = 4
_LENGTHS = (5, 13, 9, 21)
_SHARED, _OWN = 14, 6  # tokens that a prompt of the prefix mix has in common with the longest one, and its own
_FORKED, _FORKS = 11, 3
_NUM_NEW = 12
_BUDGET = 8  # tokens of a step, fewer than most prompts have
_LONGEST = max(_LENGTHS) + _NUM_NEW + 1  # some models state none; the decoder of an encoder-decoder begins with a token of its own
_PREEMPT_AFTER = 5  # steps, so that the first request has tokens of its own
_DRAWS = 20

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Alone:
    """What ``generate`` says to one prompt.

    Attributes:
        prompt: token ids; of an encoder-decoder, its encoder's.
        token_ids: greedy continuation, stops not looked at.
        logprobs: of each of them.
        margin: smallest distance of the two best logits of a step, relative to the largest logit.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margin: float


@dataclass(frozen=True, slots=True)
class MixReport:
    """One mix of requests.

    Attributes:
        name: ``"ragged"``: prompts of several lengths, in chunks where the model allows it, beside decodes; ``"prefix"``: prompts whose
            beginning was served before; ``"fork"``: several continuations of one prompt; ``"preempted"``: a pool too small for all at once,
            and one request whose blocks are taken away in any case.
        num_outputs: continuations that were compared.
        difference: the first that was not as alone, in words; None when all were.
        error: what the engine raised, in words; None when nothing.
        max_logprob_error: of the compared tokens.
        num_preemptions: how often blocks were taken away.
        num_cached_tokens: prompt tokens that the prefix cache served.
    """

    name: str
    num_outputs: int = 0
    difference: str | None = None
    error: str | None = None
    max_logprob_error: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0


class References:
    """What a model says alone, each prompt asked once.

    Args:
        model: a language model in evaluation mode, a decoder or an encoder-decoder.
        num_token_ids: prompts are drawn from the token ids below, 0 to 2 left out.
        seed: of the prompts.

    Attributes:
        longest: tokens of the longest prompt with its continuation.
        prompts: of several lengths.
        related: begins as the last of them does.
        forked: one more, to be continued several times.
    """

    longest = _LONGEST

    def __init__(self, model: PreTrainedModel, *, num_token_ids: int, seed: int = 0) -> None:
        self._model = model
        self._ids = range(3, num_token_ids)
        self._random = random.Random(seed)
        self._known: dict[Prompt, Alone] = {}
        self.prompts = tuple(self._draw((), length) for length in _LENGTHS)
        self.related = self._draw(self.prompts[-1][:_SHARED], _OWN)
        self.forked = self._draw((), _FORKED)

    def __getitem__(self, prompt: Prompt) -> Alone:
        if prompt not in self._known:
            self._known[prompt] = generate_alone(self._model, prompt)
        return self._known[prompt]

    def inconsistency(self) -> str | None:
        """How ``generate`` with a cache differs from itself without; None when it does not."""
        for prompt in (*self.prompts, self.related, self.forked):
            found = _difference(self[prompt], generate_alone(self._model, prompt, use_cache=False))
            if found is not None:
                return f"without a cache {found}"
        return None

    def _draw(self, head: Prompt, count: int) -> Prompt:
        """``head`` and random tokens, drawn again until no step of the reference is close to a tie."""
        for _ in range(_DRAWS):
            prompt = (*head, *(self._random.choice(self._ids) for _ in range(count)))
            if self[prompt].margin >= LEAST_MARGIN:
                return prompt
        raise ValueError(f"every continuation of {_DRAWS} prompts comes close to a tie: the weights are too flat to judge tokens by")


def generate_alone(model: PreTrainedModel, prompt: Prompt, *, num_new: int = _NUM_NEW, use_cache: bool = True) -> Alone:
    """Greedy tokens of transformers' own loop for one prompt.

    Args:
        model: in evaluation mode.
        prompt: token ids.
        num_new: tokens to generate; nothing ends them earlier.
        use_cache: False runs all tokens anew for each.
    """
    from transformers import GenerationConfig

    from pagedkv.models.limits import decoder_start_token_id

    ids = torch.tensor([prompt], device=model.device)
    loop = cast("Callable[..., Any]", model.generate)
    own, is_pair = model.generation_config, model.config.is_encoder_decoder
    begins = {"decoder_start_token_id": decoder_start_token_id(model)} if is_pair else {}
    # A checkpoint's defaults (tokens that are forced or suppressed) are wishes, not what the model computes.
    model.generation_config = GenerationConfig(pad_token_id=0, **begins)  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            found = loop(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_new,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
    finally:
        model.generation_config = own
    logits = torch.stack(found.logits, dim=1)[0].float()
    best, chosen = logits.topk(2).values, found.sequences[0, 1 if is_pair else len(prompt) :]
    return Alone(
        prompt=prompt,
        token_ids=tuple(chosen.tolist()),
        logprobs=tuple(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()),
        margin=float(((best[:, 0] - best[:, 1]) / logits.masked_fill(logits.isinf(), 0.0).abs().amax(dim=1)).min()),
    )


def run_mixes(runner: ModelRunner, references: References) -> tuple[MixReport, ...]:
    """Run every mix and compare each continuation with what its prompt gives alone.

    Args:
        runner: the model over blocks of 4 tokens, as ``parity_runner`` makes it.
        references: of the same model.

    Cost: some 60 steps.
    """
    needed = [-(-(len(prompt) + 1 + _NUM_NEW) // _BLOCK_SIZE) for prompt in references.prompts]
    roomy = _Mixes(runner, references, num_blocks=4 * sum(needed))
    reports = [
        roomy.run("ragged", references.prompts),
        roomy.run("prefix", (references.related, references.prompts[-1], references.prompts[1])),
        roomy.run("fork", (references.forked, references.prompts[2]), n=_FORKS),
    ]
    roomy.close()
    tight = _Mixes(runner, references, num_blocks=max(needed) + 4)
    reports.append(tight.run("preempted", references.prompts, preempt=True))
    tight.close()
    return tuple(reports)


def parity_runner(model: PreTrainedModel) -> ModelRunner:
    """A model made ready with blocks of 4 tokens, so that short prompts fill several.

    Raises:
        UnsupportedModelError: the model is refused; says why.
    """
    return ModelRunner(model, block_size=_BLOCK_SIZE)


class _Mixes:
    """One engine, its pool NaN wherever nothing valid is, and the mixes that are run on it one after the other."""

    def __init__(self, runner: ModelRunner, references: References, *, num_blocks: int) -> None:
        budget = _LONGEST if runner.tier.recurrent_state == "whole" else _BUDGET  # there prompts cannot be cut
        config = EngineConfig(num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=_LONGEST, check="audit")
        self._engine = Engine(runner, config)
        self._references = references
        self._num_requests = 0

    def run(self, name: str, prompts: Sequence[Prompt], *, n: int = 1, preempt: bool = False) -> MixReport:
        before = self._engine.statistics().num_preemptions
        try:
            outputs = self._outputs(
                prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_NUM_NEW, logprobs=0, n=n), preempt
            )
        except PagedKVError as error:
            return MixReport(name, error=f"{type(error).__name__}: {error}")
        pairs = [(self._references[output.prompt_token_ids], _as_alone(output, index)) for output in outputs for index in range(n)]
        found = [_difference(alone, ours) for alone, ours in pairs]
        failed = [str(output.error) for output in outputs if output.error is not None]
        return MixReport(
            name,
            num_outputs=len(pairs),
            difference=next((difference for difference in found if difference is not None), None) if not failed else None,
            error=failed[0] if failed else None,
            max_logprob_error=max((_logprob_error(alone, ours) for alone, ours in pairs), default=0.0),
            num_preemptions=self._engine.statistics().num_preemptions - before,
            num_cached_tokens=sum(output.num_cached_tokens for output in outputs),
        )

    def _outputs(self, prompts: Sequence[Prompt], params: SamplingParams, preempt: bool) -> list[RequestOutput]:
        done: list[RequestOutput] = []
        steps = 0
        for prompt in prompts:
            self._engine.add_request(str(self._num_requests), {"prompt_token_ids": list(prompt)}, params, stream=False)
            self._num_requests += 1
        while self._engine.has_unfinished:
            done += [output for output in self._engine.step() if output.finished]
            steps += 1
            if preempt and steps == _PREEMPT_AFTER:  # where windowed layers need so little that the pool suffices
                self._engine.preempt(str(self._num_requests - len(prompts)))
        return done

    def close(self) -> None:
        self._engine.close()


def _as_alone(output: RequestOutput, index: int) -> Alone:
    sample = output.outputs[index]
    pairs = zip(sample.token_ids, sample.logprobs or (), strict=False)
    logprobs = tuple(position[token].logprob for token, position in pairs)
    return Alone(output.prompt_token_ids, sample.token_ids, logprobs, margin=0.0)


def _logprob_error(alone: Alone, other: Alone) -> float:
    """The largest, as long as the tokens agree: after that they are of different texts."""
    worst = 0.0
    for want, got, wanted, found in zip(alone.token_ids, other.token_ids, alone.logprobs, other.logprobs, strict=False):
        if want != got:
            break
        worst = max(worst, abs(wanted - found))
    return worst


def _difference(alone: Alone, other: Alone) -> str | None:
    where = f"a prompt of {len(alone.prompt)} tokens"
    if alone.token_ids != other.token_ids:
        agree = zip(alone.token_ids, other.token_ids, strict=False)
        place = next((place for place, (want, got) in enumerate(agree) if want != got), min(len(alone.token_ids), len(other.token_ids)))
        return f"{where} goes on with {other.token_ids[place:][:4]} at its output {place}, alone with {alone.token_ids[place:][:4]}"
    error = _logprob_error(alone, other)
    return f"{where} gives a logprob that is {error:.2g} off, tokens as alone" if not error <= MOST_LOGPROB_ERROR else None
