"""A `SequenceView` as self-contained HTML for notebooks: no script, nothing from outside, everything escaped.

Owns the look only. Text takes the page's own colour and tints are translucent, so that it reads on light and on dark pages.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pagedkv.observe.view import shown_blocks

if TYPE_CHECKING:
    from pagedkv.observe.view import SequenceView

_SHOWN_BLOCKS = 48
_SHOWN_HEADS = 16
_SHOWN_NUMBERS = 128

_STYLE = """
.pagedkv-view { font: 13px/1.5 system-ui, sans-serif; color: inherit; max-width: 100%; overflow-x: auto; }
.pagedkv-view table { border-collapse: collapse; margin: 4px 0 12px; color: inherit; background: none; }
.pagedkv-view th, .pagedkv-view td { padding: 2px 8px; text-align: left; vertical-align: top; color: inherit; background: none;
  border: 0; border-bottom: 1px solid rgba(128, 128, 128, .3); }
.pagedkv-view td.number { text-align: right; font-variant-numeric: tabular-nums; }
.pagedkv-view td.state { min-width: 11em; }
.pagedkv-view .token { display: inline-block; margin: 1px; padding: 0 4px; border-radius: 3px; border: 1px solid rgba(128, 128, 128, .45);
  font: 12px/1.6 ui-monospace, monospace; white-space: pre; }
.pagedkv-view .shared .token { background: rgba(70, 130, 250, .28); }
.pagedkv-view .published .token { background: rgba(40, 170, 90, .28); }
.pagedkv-view .own .token { background: rgba(128, 128, 128, .12); }
.pagedkv-view .token.pending { border-style: dashed; }
.pagedkv-view .token.empty { background: none; border-style: dotted; opacity: .45; }
.pagedkv-view .token.chosen { outline: 2px solid rgb(230, 120, 20); }
.pagedkv-view .numbers { white-space: nowrap; line-height: 0; }
.pagedkv-view .numbers i { display: inline-block; width: 6px; height: 16px; }
.pagedkv-view p { margin: 4px 0; }
""".strip()


def render(view: SequenceView) -> str:
    """The whole view; O(tokens shown)."""
    parts = [f'<div class="pagedkv-view"><style>{_STYLE}</style><p><b>{escape(view.heading())}</b></p>', _legend()]
    for group in range(len(view.sequence.block_tables)):
        if len(view.sequence.block_tables) > 1:
            parts.append(f"<p>layer group {group}</p>")
        parts.append(_table(view, group))
    parts.append(f"<p>{escape(view.key_heading())}</p>")
    if view.key:
        parts.append(_key(view))
    return "".join(parts) + "</div>"


def _legend() -> str:
    kinds = (("shared", "shared with others"), ("published", "published, held by this sequence alone"), ("own", "its own"))
    samples = [f'<span class="{kind}"><span class="token">{words}</span></span>' for kind, words in kinds]
    marks = (("pending", "reserved, not computed yet"), ("empty", "empty slot"), ("chosen", "the chosen position"))
    samples += [f'<span class="token {mark}">{words}</span>' for mark, words in marks]
    return f"<p>{' '.join(samples)}</p>"


def _table(view: SequenceView, group: int) -> str:
    rows = ["<tr><th>index</th><th>block</th><th>held by</th><th>state</th><th>tokens (hover for position, token id and slot)</th></tr>"]
    table = view.sequence.block_tables[group]
    for index in shown_blocks(len(table), view.block_index, most=_SHOWN_BLOCKS):
        if index is None:
            rows.append('<tr><td class="number">…</td><td></td><td></td><td></td><td></td></tr>')
            continue
        state = view.block_state(index, group)
        kind = "shared" if "shared" in state else "published" if "published" in state else "own"
        numbers = "".join(f'<td class="number">{number}</td>' for number in (index, table[index], view.num_holders[group][index]))
        rows.append(f'<tr class="{kind}">{numbers}<td class="state">{escape(state)}</td><td>{_tokens(view, index, group)}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _tokens(view: SequenceView, index: int, group: int) -> str:
    sequence = view.sequence
    slots, size = sequence.slots(group), sequence.block_size
    spans = []
    for position in range(index * size, (index + 1) * size):
        if position >= len(slots):
            spans.append('<span class="token empty"> </span>')
            continue
        marks = "" if position < sequence.num_computed_tokens else " pending"
        if group == view.group and position == view.position:
            marks += " chosen"
        token = sequence.token_ids[position]
        hint = f"position {position}, token {token}, slot {slots[position]}"
        spans.append(f'<span class="token{marks}" title="{hint}">{escape(view.text_of(position) or str(token))}</span>')
    return "".join(spans)


def _key(view: SequenceView) -> str:
    """K as one row of coloured strips for each head: blue below zero, orange above, stronger the larger."""
    finite = [abs(number) for head in view.key for number in head if abs(number) < float("inf")]
    largest = max(finite, default=0.0) or 1.0
    rows = []
    for head, numbers in enumerate(view.key[:_SHOWN_HEADS]):
        strips = "".join(_strip(index, number, largest) for index, number in enumerate(numbers[:_SHOWN_NUMBERS]))
        more = " …" if len(numbers) > _SHOWN_NUMBERS else ""
        rows.append(f'<tr><td>head {head}</td><td class="numbers">{strips}{more}</td></tr>')
    if len(view.key) > _SHOWN_HEADS:
        rows.append(f"<tr><td>…</td><td>{len(view.key) - _SHOWN_HEADS} more heads</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _strip(index: int, number: float, largest: float) -> str:
    colour = "40, 110, 240" if number < 0 else "230, 120, 20"
    strength = abs(number) / largest
    alpha = f"{min(strength, 1.0):.2f}" if strength == strength else "1"  # a NaN is not equal to itself, and should be seen
    return f'<i style="background: rgba({colour}, {alpha})" title="[{index}] {number:+.5f}"></i>'
