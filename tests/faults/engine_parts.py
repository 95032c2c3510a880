"""What an engine is made of: the modules whose every line is made to fail while it works."""

from __future__ import annotations

import sys
from types import ModuleType

import pagedkv.engine

# Values, and words that are checked: nothing of an engine's state is in there.
_STATELESS = {"pagedkv.checks", "pagedkv.errors", "pagedkv.outputs", "pagedkv.plan", "pagedkv.prompts"}


def _parts() -> tuple[ModuleType, ...]:
    """The engine, and what it takes from modules that lie beside it, so that what moves out of it goes on being struck."""
    homes = {each.__module__ for each in vars(pagedkv.engine).values() if hasattr(each, "__module__")}
    beside = sorted(home for home in homes - _STATELESS if home.startswith("pagedkv.") and home.count(".") == 1)
    return tuple(module for home in beside if not hasattr(module := sys.modules[home], "__path__"))


ENGINE_PARTS = _parts()
