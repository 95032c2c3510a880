"""From a prompt and its parameters to a request of the scheduler; what the model cannot serve is refused here.

Owns no state: what is live is the scheduler's, how long it may be the lengths' to say, and its name the namespaces'.
"""

from __future__ import annotations

from collections.abc import Mapping

from pagedkv.errors import InvalidRequestError
from pagedkv.lengths import Lengths
from pagedkv.models import ModelRunner
from pagedkv.namespaces import namespace_of
from pagedkv.prompts import DecoderRules, Encoder, ParsedPrompt, Prompt, parse_prompt
from pagedkv.sampling import SamplingParams
from pagedkv.scheduling import Request

# Parameters that look at the tokens of the prompt, and their values that do not.
_NEED_PROMPT_TOKENS: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "prompt_logprobs": (None,),
    "bad_words": (None, (), []),
    "generation_kwargs": ({},),
}


class Intake:
    """Takes in what one model is asked for.

    Args:
        runner: the model.
        lengths: of its sequences.
        tokenizer: for texts; None for token ids only.
    """

    def __init__(self, runner: ModelRunner, lengths: Lengths, tokenizer: Encoder | None) -> None:
        self._runner = runner
        self._lengths = lengths
        self._tokenizer = tokenizer
        self._rules = _decoder_rules(runner)

    def parse(self, prompt: Prompt | ParsedPrompt) -> ParsedPrompt:
        """A prompt in one form; raises ``InvalidRequestError`` for one that the model cannot read."""
        return parse_prompt(
            prompt,
            tokenizer=self._tokenizer,
            num_token_ids=self._runner.num_token_ids,
            max_model_len=self._lengths.max_model_len,
            limit_reason=self._lengths.reason,
            decoder=self._rules,
        )

    def check(self, parsed: ParsedPrompt, params: SamplingParams) -> None:
        """Raise ``InvalidRequestError`` for parameters that cannot be served, or not for this prompt."""
        params.check_vocabulary(self._runner.vocab_size)
        needs_text = [name for name in ("stop", "bad_words") if getattr(params, name)]
        if needs_text and (self._tokenizer is None or ("stop" in needs_text and not params.detokenize)):
            raise InvalidRequestError(f"{' and '.join(needs_text)} need text: give a tokenizer and leave detokenize on, or use token ids")
        needs_tokens = [name for name, off in _NEED_PROMPT_TOKENS.items() if getattr(params, name) not in off]
        if parsed.embeds is not None and needs_tokens:
            raise InvalidRequestError(f"{' and '.join(needs_tokens)} need the tokens of the prompt, which prompt_embeds does not tell")
        if parsed.decoder_token_ids is not None and params.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs: the prompt of an encoder-decoder is read by its encoder, which predicts no tokens")

    def request(self, request_id: str, parsed: ParsedPrompt, params: SamplingParams, *, priority: int, number: int) -> Request:
        """What the scheduler is asked for.

        Args:
            request_id: names it.
            parsed: the prompt.
            params: how to sample.
            priority: lower goes first, under a policy that looks at it.
            number: no other request's; see ``namespace_of``.
        """
        is_far = self._lengths.is_far(len(parsed.token_ids))
        room = self._lengths.longest(is_far=is_far) - parsed.num_tokens
        if self._rules is not None and (most := self._rules.room(parsed)) is not None:
            room = min(room, most)
        return Request(
            request_id,
            parsed.sequence,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            min_tokens=params.min_tokens,
            eos_token_ids=() if params.ignore_eos else self._runner.eos_token_ids,
            stop_token_ids=tuple(params.stop_token_ids or ()),
            n=params.n,
            priority=priority,
            namespace=namespace_of(parsed, is_far=is_far, number=number),
            wants_prompt_logits=params.prompt_logprobs is not None,
        )


def _decoder_rules(runner: ModelRunner) -> DecoderRules | None:
    """What prompts of an encoder-decoder have to keep to; None for others."""
    limits = runner.encoder
    if limits is None:
        return None
    return DecoderRules(limits.start_token_id, limits.num_decoder_token_ids, limits.max_source_tokens, limits.max_decoder_tokens)
