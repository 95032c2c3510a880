"""Programs for a manager: a configuration and operations, all of them small frozen values, to be run, cut down, saved and run again.

An operation names sequences and pins by their place among those that are alive, counted modulo their number, and counts modulo what is
possible. So an operation means something after any others were taken out of the program; where it cannot mean anything (nobody is alive,
no step is waiting), it is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from pagedkv.core import Window
from pagedkv.errors import InvalidRequestError

NAMESPACES = ("", "tenant", "other")
_FORMAT = "pagedkv program 1"


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """The manager that a program is for. Tiny on purpose: the fewer the blocks and the tokens, the more often things meet.

    Attributes:
        num_blocks: blocks of each layer group, the null block included.
        block_size: tokens in a block.
        max_num_seqs: sequences alive at once.
        prefix_caching: whether full blocks are published.
        vocabulary: different tokens that are drawn; the manager does not know of it.
        windows: how far back each layer group looks: 0 for everything, as the first group always and those that are not mentioned; a number
            of positions for a sliding window, and less than 0 for chunks of so many.
    """

    num_blocks: tuple[int, ...]
    block_size: int
    max_num_seqs: int
    prefix_caching: bool = True
    vocabulary: int = 2
    windows: tuple[int, ...] = (0,)

    def window(self, group: int) -> Window | None:
        """The window of a layer group."""
        size = self.windows[group] if group < len(self.windows) else 0
        return Window("sliding" if size > 0 else "chunked", abs(size)) if size else None

    @property
    def max_seq_len(self) -> int:
        """Tokens that one sequence can have: what every pool can hold whose sequences keep everything."""
        return (min(count for group, count in enumerate(self.num_blocks) if self.window(group) is None) - 1) * self.block_size


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt is made of.

    Attributes:
        tokens: its last tokens, at least one.
        like: the live sequence that it begins like.
        keep: how many of that one's tokens come first, modulo their number and one; -1 for all.
        namespace: index into ``NAMESPACES``.
    """

    tokens: tuple[int, ...]
    like: int = 0
    keep: int = 0
    namespace: int = 0

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 0:
            raise InvalidRequestError(f"a prompt ends with {self.tokens}: at least one token is needed, none of them below 0")


@dataclass(frozen=True, slots=True)
class Open:
    """Start sequences."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Extend:
    """Reserve slots for the next known tokens of some sequences: a step begins, whose forward pass is still to come.

    Attributes:
        seqs: which ones; those whose tokens all have slots are left out.
        counts: how many tokens more than one, modulo what is possible; used in turn.
    """

    seqs: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Complete:
    """The forward pass of the waiting step happens.

    Attributes:
        tokens: next tokens of its sequences, used in turn; -1 for none.
        only: so many of its sequences are completed and the others cancelled; all are completed when None.
    """

    tokens: tuple[int, ...]
    only: int | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """The forward pass of the waiting step fails, after or before its block copies were made."""

    copies_made: bool


@dataclass(frozen=True, slots=True)
class Decode:
    """A whole step of sequences that know just one token without a slot.

    Attributes:
        tokens: their next tokens, used in turn; -1 for none.
        joining: whether all such sequences take part; else those of the last decode step alone, where all of them still can.
    """

    tokens: tuple[int, ...]
    joining: bool = True


@dataclass(frozen=True, slots=True)
class Append:
    """One more token becomes known."""

    seq: int
    token: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Sequences that share all that one has; ``count`` at least 1."""

    seq: int
    count: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Forget a sequence's tokens behind the first ``length``, modulo their number, and one; so -1 keeps all and -2 forgets the last."""

    seq: int
    length: int


@dataclass(frozen=True, slots=True)
class Release:
    """End sequences; one that a waiting step computes is aborted in the middle of it."""

    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pin:
    """Hold the cached prefix of a live sequence's tokens."""

    seq: int
    namespace: int


@dataclass(frozen=True, slots=True)
class Unpin:
    """Let go of a pin, and try it a second time."""

    pin: int


@dataclass(frozen=True, slots=True)
class Purge:
    """Forget all that a namespace has published."""

    namespace: int


@dataclass(frozen=True, slots=True)
class Distrust:
    """Forget what sequences have published and all that continues it, as if it had been computed wrong."""

    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatchPrefix:
    """Look a prompt up; the answer must be the reference's, and nothing may change."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Misuse:
    """A call that must be refused without a change.

    Attributes:
        kind: which one, modulo the number of kinds: handles released or never given out, counts and tokens out of range.
        pick: which handle or sequence it is tried with.
    """

    kind: int
    pick: int


Operation = (
    Open | Extend | Complete | Cancel | Decode | Append | Fork | Truncate | Release | Pin | Unpin | Purge | Distrust | MatchPrefix | Misuse
)
OPERATIONS: dict[str, type[Operation]] = {
    "open": Open,
    "extend": Extend,
    "complete": Complete,
    "cancel": Cancel,
    "decode": Decode,
    "append": Append,
    "fork": Fork,
    "truncate": Truncate,
    "release": Release,
    "pin": Pin,
    "unpin": Unpin,
    "purge": Purge,
    "distrust": Distrust,
    "match": MatchPrefix,
    "misuse": Misuse,
}
NAMES: dict[type[Operation], str] = {kind: name for name, kind in OPERATIONS.items()}


@dataclass(frozen=True, slots=True)
class Program:
    """A manager and what is done to it, in order. Runs the same way every time.

    >>> program = Program(ManagerConfig((4,), 2, 2), (Open((Prompt((1, 0, 1)),)), Decode((1,))))
    >>> Program.from_json(program.to_json()) == program
    True
    """

    config: ManagerConfig
    operations: tuple[Operation, ...]

    def to_json(self) -> str:
        """The program as text, one operation a line."""
        head = json.dumps({"format": _FORMAT, "config": asdict(self.config)})[:-1]
        lines = [json.dumps({"op": NAMES[type(operation)], **asdict(operation)}) for operation in self.operations]
        return f'{head}, "operations": [\n' + ",\n".join(lines) + "\n]}\n"

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Read ``to_json``'s text.

        Raises:
            InvalidRequestError: it is not a program; says what is wrong with it.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise InvalidRequestError(f"a program of format {data['format']!r} cannot be read: {_FORMAT!r} can")
            operations = []
            for line in data["operations"]:
                values = {name: _frozen(value) for name, value in line.items() if name != "op"}
                operations.append(_made(OPERATIONS[line["op"]], values))
            return cls(_made(ManagerConfig, {name: _frozen(value) for name, value in data["config"].items()}), tuple(operations))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(f"not a program: {type(error).__name__} {error}") from error


def save_program(program: Program, path: str | Path) -> None:
    """Write a program to a file as JSON."""
    Path(path).write_text(program.to_json(), encoding="utf-8")


def load_program(path: str | Path) -> Program:
    """Read a program from a file; raises ``InvalidRequestError`` where it holds something else, ``OSError`` where it cannot be read."""
    return Program.from_json(Path(path).read_text(encoding="utf-8"))


def _frozen(value: object) -> object:
    """JSON's lists as tuples, its objects as prompts."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return _made(Prompt, {name: _frozen(item) for name, item in value.items()})
    return value


def _made(kind: type[_Made], values: dict[str, object]) -> _Made:
    made = kind(**cast(Any, values))  # checked below, against the annotations
    for field in fields(made):
        if not _FITS[str(field.type)](getattr(made, field.name)):
            raise InvalidRequestError(f"{kind.__name__}.{field.name} is {getattr(made, field.name)!r}: {field.type} is needed")
    return made


_Made = TypeVar("_Made", bound="Operation | Prompt | ManagerConfig")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_filled(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(fits, value))


# By annotation: what a field read from a file must be.
_FITS: dict[str, Callable[[object], bool]] = {
    "int": _is_int,
    "bool": lambda value: isinstance(value, bool),
    "int | None": lambda value: value is None or _is_int(value),
    "tuple[int, ...]": lambda value: _is_filled(value, _is_int),
    "Prompt": lambda value: isinstance(value, Prompt),
    "tuple[Prompt, ...]": lambda value: _is_filled(value, lambda item: isinstance(item, Prompt)),
}
