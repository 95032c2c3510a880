"""Looking inside: what a sequence holds, where, and the bytes behind it. Reads everything, changes nothing."""

from __future__ import annotations

from pagedkv.observe.inspection import inspect_sequence, view_sequence
from pagedkv.observe.view import SequenceView

__all__ = ["SequenceView", "inspect_sequence", "view_sequence"]
