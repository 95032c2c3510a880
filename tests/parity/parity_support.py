"""Prompts, references and the loop of the parity tests. A reference is transformers' own ``generate``, each prompt alone, never ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from pagedkv.engine import Engine, EngineConfig
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams
from pagedkv.testing.models import tiny_model
from pagedkv.testing.poison import PoisonBackend

MAX_NEW = 16
LEAST_MARGIN = 1e-3
"""Between the two best logits, relative to the largest: a hundred times the noise of float32, so that equal tokens mean equal sums."""

TRUNK = 72  # tokens that the prompts of the family share, in part
LENGTHS = (1, 3, 8, 15, 16, 17, 26, 40, 61, 63)
FAMILY = ((3, 2), (8, 1), (17, 6), (32, 5), (40, 1), (58, 4), (66, 3))  # tokens of the trunk, tokens of one's own

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    token_ids: tuple[int, ...]
    margin: float


@dataclass
class Oracle:
    """One model, its prompts, and what ``generate`` says to each; everything is made once. ``backend``: who attends."""

    name: str
    model: PreTrainedModel
    backend: str | PoisonBackend = "auto"
    references: dict[Prompt, Reference] = field(default_factory=dict)
    runners: dict[int, ModelRunner] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    family: tuple[Prompt, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.prompts + self.family))

    def prompt_of(self, length: int) -> Prompt:
        """The prompt of its own, not of the family, that has this length."""
        return self.prompts[LENGTHS.index(length)]

    def runner(self, block_size: int) -> ModelRunner:
        """The model over pages; with the backend that poisons, over pages whose stale slots are NaN."""
        if block_size not in self.runners:
            self.runners[block_size] = ModelRunner(self.model, backend=self.backend, block_size=block_size)
        return self.runners[block_size]

    def reference(self, prompt: Prompt) -> Reference:
        if prompt not in self.references:
            self.references[prompt] = generate(self.model, prompt)
        return self.references[prompt]

    def clear_prompt(self, rng: random.Random, head: Prompt, count: int) -> Prompt:
        """``head`` and ``count`` random tokens, drawn again until no step of the reference is close to a tie."""
        for _ in range(50):
            prompt = (*head, *(rng.randrange(3, 97) for _ in range(count)))
            if self.reference(prompt).margin >= 2 * LEAST_MARGIN:
                return prompt
        raise AssertionError(f"{self.name}: every continuation of {head} nearly ties")


def make_oracle(name: str, model: PreTrainedModel | None = None) -> Oracle:
    """Of one of the tiny models that are read in place, or of a given one, in the tier that suits it."""
    oracle = Oracle(name, tiny_model(name), PoisonBackend()) if model is None else Oracle(name, model)
    rng = random.Random(f"parity {name}")
    oracle.prompts = tuple(oracle.clear_prompt(rng, (), length) for length in LENGTHS)
    trunk = oracle.clear_prompt(rng, (), TRUNK)
    oracle.family = (trunk, *(oracle.clear_prompt(rng, trunk[:shared], own) for shared, own in FAMILY))
    return oracle


def generate(model: PreTrainedModel, prompt: Sequence[int], *, eos: int | None = None, max_new: int = MAX_NEW) -> Reference:
    """Greedy tokens of transformers' own loop and cache, with the smallest relative margin between the two best logits."""
    ids = torch.tensor([list(prompt)])
    loop: Callable[..., Any] = model.generate
    result = loop(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(result.logits, dim=1)[0]
    best = logits.topk(2).values
    margin = ((best[:, 0] - best[:, 1]) / logits.abs().amax(dim=1)).min()
    return Reference(tuple(result.sequences[0, len(prompt) :].tolist()), float(margin))


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_NEW, **options})


def expected(oracle: Oracle, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
    """The reference up to ``max_tokens``, and up to and with the first stop id."""
    tokens = oracle.reference(prompt).token_ids[: params.max_tokens]
    for place, token in enumerate(tokens):
        if token in (params.stop_token_ids or ()):
            return tokens[: place + 1]
    return tokens


def new_engine(oracle: Oracle, block_size: int, num_blocks: int, **options: Any) -> Engine:
    """An engine whose pools, one for each layer group, hold NaN wherever nothing was written."""
    policy = options.pop("policy", None)
    runner = oracle.runner(block_size)
    longest = runner.max_positions or TRUNK + 4 * MAX_NEW  # models with ALiBi state none
    engine = Engine(runner, EngineConfig(num_blocks=[num_blocks] * len(runner.windows), max_model_len=longest, **options), policy=policy)
    engine.fill_free_blocks(float("nan"))
    return engine


def poisoned_step(engine: Engine) -> list[RequestOutput]:
    """One step; then the account is checked, and what was freed is NaN."""
    outputs = engine.step()
    groups = engine.statistics().cache.groups
    for group in groups:
        assert group.num_free + group.num_evictable + group.num_in_use == group.num_blocks, f"blocks do not sum to the pool: {group}"
    engine.check()
    assert engine.fill_free_blocks(float("nan")) == sum(group.num_free for group in groups)
    return outputs


def run_all(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left."""
    ended: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
    return ended


def blocks_to_fit(block_size: int, num_tokens: int) -> int:
    """The smallest pool, null block included, that takes one request of so many tokens in all."""
    return -(-num_tokens // block_size) + 1


def assert_tokens(got: Sequence[int], want: Sequence[int], *, where: str, prompt: Prompt) -> None:
    if tuple(got) == tuple(want):
        return
    place = next((at for at, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), min(len(got), len(want)))
    ours = got[place] if place < len(got) else "nothing"
    theirs = want[place] if place < len(want) else "nothing"
    raise AssertionError(
        f"{where}: token {place} of the output is {ours}, generate says {theirs}\n  prompt ({len(prompt)}): {list(prompt)}\n"
        f"  got  {list(got)}\n  want {list(want)}"
    )
