"""`SequenceView`: one sequence's tokens, block table, slots and a slice of K, frozen, as text or for a notebook.

Owns what is told about a sequence and its form as text. It does not own the form as HTML (``html.py``) and reads nothing itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagedkv.core import NULL_BLOCK, SequenceSnapshot

_SHOWN_BLOCKS = 24
_SHOWN_NUMBERS = 8


@dataclass(frozen=True, slots=True)
class SequenceView:
    """What a sequence looked like at one moment; ``print`` it, or end a notebook's cell with it.

    Attributes:
        title: whose it is.
        sequence: tokens, lengths and block tables.
        num_holders: per group, how many hold each block of the table; a block that others hold as well is shared.
        texts: each token as text; empty without a tokenizer.
        position: the chosen position; None as long as nothing is computed.
        layer: the chosen layer.
        group: its layer group, whose table places the position.
        key: ``[Hkv][Dk]`` K of the position in the layer, as stored; empty without a storage or a position.
    """

    title: str
    sequence: SequenceSnapshot
    num_holders: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] = ()
    position: int | None = None
    layer: int = 0
    group: int = 0
    key: tuple[tuple[float, ...], ...] = ()

    @property
    def block_table(self) -> tuple[int, ...]:
        """Physical ids of the sequence's blocks in the layer's group, by logical index."""
        return self.sequence.block_tables[self.group]

    @property
    def slots(self) -> tuple[int, ...]:
        """The physical slot of every position that has one, ``block_id * block_size + offset``."""
        return self.sequence.slots(self.group)

    @property
    def block_index(self) -> int:
        """Logical index of the block that holds the position, or of the first block."""
        return 0 if self.position is None else self.position // self.sequence.block_size

    @property
    def block_id(self) -> int:
        """Physical id of that block; the null block when there is none."""
        return self.block_table[self.block_index] if self.block_table else NULL_BLOCK

    @property
    def slot(self) -> int | None:
        """The position's physical slot."""
        return None if self.position is None else self.slots[self.position]

    def block_state(self, index: int, group: int = 0) -> str:
        """What is the case with the block of a logical index, in words."""
        sequence, block = self.sequence, self.sequence.block_tables[group][index]
        if block == NULL_BLOCK:
            return "given back"
        used = min(sequence.num_reserved_tokens - index * sequence.block_size, sequence.block_size)
        words = [f"{used} of {sequence.block_size} slots used" if used < sequence.block_size else "full"]
        if index < sequence.num_published_blocks:
            words.append("published")
        if self.num_holders[group][index] > 1:
            words.append("shared")
        return ", ".join(words)

    def text_of(self, position: int) -> str:
        """A position's token as visible text, or an empty string without a tokenizer."""
        if position >= len(self.texts):
            return ""
        return self.texts[position].replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")

    def heading(self) -> str:
        """One line: whose it is and how long."""
        sequence = self.sequence
        return (
            f"{self.title}: {sequence.num_tokens} tokens, {sequence.num_computed_tokens} computed, "
            f"{len(self.block_table)} blocks of {sequence.block_size}"
        )

    def key_heading(self) -> str:
        """One line: where the position's K is, and how to get there."""
        if self.position is None:
            return "nothing is computed yet, so there is no K"
        size = self.sequence.block_size
        block, offset = self.block_id, self.position % size
        place = (
            f"position {self.position}, layer {self.layer}: block {block}, offset {offset}, slot {block} * {size} + {offset} = {self.slot}"
        )
        if not self.key:
            return place
        return f"{place}; K is layers[{self.layer}].key[{block}, :, {offset}], {len(self.key)} heads of {len(self.key[0])}"

    def __str__(self) -> str:
        lines = [self.heading()]
        for group in range(len(self.sequence.block_tables)):
            lines += ["", *self._table_lines(group)]
        if self.position is not None:
            lines += ["", *self._token_lines()]
        lines += ["", self.key_heading()]
        for head, numbers in enumerate(self.key):
            more = " ..." if len(numbers) > _SHOWN_NUMBERS else ""
            first = " ".join(f"{number:+8.4f}" for number in numbers[:_SHOWN_NUMBERS])
            lines.append(f"  head {head}: {first}{more}  (length {math.hypot(*numbers):.3f})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from pagedkv.observe.html import render

        return render(self)

    def _table_lines(self, group: int) -> list[str]:
        table, size = self.sequence.block_tables[group], self.sequence.block_size
        name = "block table" if len(self.sequence.block_tables) == 1 else f"block table of group {group}"
        lines = [f"{name}", "   index   block  positions    held by  state"]
        for index in shown_blocks(len(table), self.block_index, most=_SHOWN_BLOCKS):
            if index is None:
                lines.append("     ...")
                continue
            mark = ">" if group == self.group and index == self.block_index else " "
            last = min((index + 1) * size, self.sequence.num_reserved_tokens) - 1
            positions = f"{index * size}-{last}"
            lines.append(
                f" {mark} {index:5d} {table[index]:7d}  {positions:<11} {self.num_holders[group][index]:8d}  "
                + self.block_state(index, group)
            )
        return lines

    def _token_lines(self) -> list[str]:
        size, slots = self.sequence.block_size, self.slots
        lines = [f"tokens of block {self.block_id}", "  position   token  offset    slot  text"]
        first = self.block_index * size
        for position in range(first, min(first + size, len(slots))):
            mark = ">" if position == self.position else " "
            token, text = self.sequence.token_ids[position], self.text_of(position)
            lines.append(f" {mark} {position:7d} {token:7d} {position % size:7d} {slots[position]:7d}  {text}".rstrip())
        return lines


def shown_blocks(count: int, focus: int, *, most: int) -> list[int | None]:
    """Indices below ``count`` to show, at most ``most`` and one: the ends and those around ``focus``; None stands for a gap.

    >>> shown_blocks(100, 50, most=8)
    [0, None, 48, 49, 50, 51, 52, None, 99]
    """
    if count <= most:
        return list(range(count))
    around = max((most - 3) // 2, 0)
    wanted = sorted({0, count - 1, *range(max(focus - around, 0), min(focus + around + 1, count))})
    shown: list[int | None] = []
    for before, index in zip([-1, *wanted], wanted, strict=False):
        if index > before + 1:
            shown.append(None)
        shown.append(index)
    return shown
