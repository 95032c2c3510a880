"""Programs that generate text, each run as a script in a process of its own, by an interpreter of its own where it needs one.

One module per project; ``loop`` is what they share on their side of the pipe. Nothing of a rival loads before its script runs.
"""

from __future__ import annotations
