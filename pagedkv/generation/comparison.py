"""Whether a model computes the same over blocks as over transformers' cache, in numbers. Owns the bound."""

from __future__ import annotations

import torch

from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.generation.cache import PagedCache
from pagedkv.generation.encoder_decoder import PagedEncoderDecoderCache
from pagedkv.generation.pool import CachePool
from pagedkv.generation.trial import Reference, run_trial

# Largest logit difference, relative to the largest logit.
_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_BOUND = 5e-2


def compare(pool: CachePool, reference: Reference) -> None:
    """Run the same tokens over blocks, which hold NaN until they are written.

    Raises:
        UnsupportedModelError: the logits are others.
    """
    name = type(pool.model).__name__
    pool.fill_free_blocks(float("nan"))
    with PagedEncoderDecoderCache(pool) if pool.num_cross_layers else PagedCache(pool) as cache:
        try:
            logits = run_trial(pool.model, cache)
        except ConfigError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"{name} failed over a paged cache: {type(error).__name__}: {error}") from error
    bound = _BOUNDS.get(reference.dtype, _HALF_BOUND)
    for step, (ours, own) in enumerate(zip(logits, reference.logits, strict=True)):
        finite = own.isfinite()
        worst = float((ours - own).masked_fill(~finite, 0.0).abs().max() / own[finite].abs().max().clamp_min(1e-30))
        if not worst <= bound or not torch.equal(ours[~finite], own[~finite]):
            raise UnsupportedModelError(
                f"{name} computes other logits over blocks than over transformers' cache: forward {step} differs by {worst:.2g} of the "
                f"largest (allowed {bound:.0e})"
            )
