"""The kit's own verdict: the subject under test broke a promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedkv.testing.conformance_cases import StepCase
    from pagedkv.testing.lives import Life
    from pagedkv.testing.programs import Program


class ViolationError(Exception):
    """A promise was broken by the object under test, not by its caller.

    Not a ``PagedKVError``: code that handles the library's refusals must not swallow a failed check. Where the failure happened (seed,
    operation) is told by ``__notes__``.

    Args:
        kind: which oracle says so, one machine-readable word: ``"audit"``, ``"reference"``, ``"tokens"``, ``"ownership"``, ``"liveness"``,
            ``"fault"``, ``"accounting"``, ...
        message: what was expected and what was found.

    Attributes:
        program: the shortest ``pagedkv.testing.programs.Program`` found that ends in this violation, where a stress run raised it.
        life: the ``pagedkv.testing.lives.Life`` that ends in this violation, where a simulation raised it.
        case: the simplest ``pagedkv.testing.conformance_cases.StepCase`` found, where a check of an attention backend raised it.
    """

    program: Program | None = None
    life: Life | None = None
    case: StepCase | None = None

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
