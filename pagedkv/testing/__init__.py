"""Public helpers for tests of code that uses pagedkv. Import the submodule that is wanted; nothing is imported here."""

from __future__ import annotations
