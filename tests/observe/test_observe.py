"""Views of live sequences: what they say equals the books and the bytes, in text and in HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from pagedkv.core import KVCacheManager
from pagedkv.engine import Engine, EngineConfig
from pagedkv.errors import InvalidRequestError, UnknownHandleError
from pagedkv.models import CACHE_ARGUMENT, ModelRunner
from pagedkv.observe import SequenceView, inspect_sequence, view_sequence
from pagedkv.observe.view import shown_blocks
from pagedkv.sampling import SamplingParams
from pagedkv.storage import KVStorage, LayerSpec
from pagedkv.testing.models import tiny_model

PROMPT = [5, 9, 13, 2, 60, 33, 8, 71, 22, 4]
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(tiny_model("llama"), block_size=4)


@pytest.fixture
def engine(runner: ModelRunner) -> Engine:
    return Engine(runner, EngineConfig(num_blocks=40, max_num_seqs=4))


def test_view_of_a_running_request_equals_the_models_own_keys(engine: Engine, runner: ModelRunner) -> None:
    engine.add_request("a", PROMPT, LONG)
    for _ in range(4):
        engine.step()
    view = inspect_sequence(engine, "a", position=6, layer=1)
    assert view.sequence.num_computed_tokens == 13
    assert view.block_table == engine.snapshot().sequences[0].block_tables[0]
    assert view.slot == view.block_table[1] * 4 + 2 == view.slots[6]
    with torch.inference_mode():
        own = runner.model(torch.tensor([PROMPT]), use_cache=True)[CACHE_ARGUMENT].layers[1].keys[0, :, 6]
    torch.testing.assert_close(torch.tensor(view.key), own, rtol=1e-4, atol=1e-5)


def test_view_of_a_running_request_stays_when_the_engine_goes_on(engine: Engine) -> None:
    engine.add_request("a", PROMPT, LONG)
    engine.step()
    view = inspect_sequence(engine, "a")
    before = str(view)
    while engine.has_unfinished:
        engine.step()
    assert str(view) == before
    assert view.position == 9


def test_view_text_marks_the_position_and_shared_blocks(engine: Engine) -> None:
    engine.add_request("a", PROMPT, LONG)
    engine.step()
    engine.add_request("b", PROMPT[:9], LONG)
    engine.step()
    text = str(inspect_sequence(engine, "b", position=5))
    assert "request 'b', continuation 0: 10 tokens, 9 computed, 3 blocks of 4" in text
    assert re.search(r"^ > +1 +\d+  4-7 +2  full, published, shared$", text, flags=re.MULTILINE)
    assert re.search(r"1  1 of 4 slots used$", text, flags=re.MULTILINE)
    assert re.search(r"^ > +5 +33 ", text, flags=re.MULTILINE)
    assert "head 1:" in text


def test_view_of_each_continuation_is_its_own(engine: Engine) -> None:
    engine.add_request("a", PROMPT, SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True))
    for _ in range(3):
        engine.step()
    views = [inspect_sequence(engine, "a", index) for index in range(3)]
    assert len({view.sequence.seq for view in views}) == 3
    assert len({view.block_table[:2] for view in views}) == 1
    assert [view.num_holders[0][0] for view in views] == [3, 3, 3]
    with pytest.raises(InvalidRequestError, match="no continuation 3"):
        inspect_sequence(engine, "a", 3)


def test_view_of_what_holds_no_blocks_is_refused_with_the_reason(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="'nobody' has no continuation 0"):
        inspect_sequence(engine, "nobody")
    engine.add_request("a", PROMPT, LONG)
    with pytest.raises(InvalidRequestError, match="holds no blocks: it is waiting"):
        inspect_sequence(engine, "a")
    engine.step()
    engine.abort("a")
    with pytest.raises(InvalidRequestError, match="holds no blocks: it is finished"):
        inspect_sequence(engine, "a")


def test_view_of_a_position_or_layer_out_of_range_is_refused_with_the_limit(engine: Engine) -> None:
    engine.add_request("a", PROMPT, LONG)
    engine.step()
    for position in (-1, 10, 500):
        with pytest.raises(InvalidRequestError, match=f"position is {position}: K is stored for 10 of"):
            inspect_sequence(engine, "a", position=position)
    for layer in (-1, 2):
        with pytest.raises(InvalidRequestError, match=f"layer is {layer}: it must be from 0 to 1"):
            inspect_sequence(engine, "a", layer=layer)


def test_view_below_the_engine_needs_manager_and_storage_only() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_num_seqs=2)
    storage = KVStorage([LayerSpec(2, 3, 3)], num_blocks=9, block_size=4, dtype=torch.bfloat16, device="cpu")
    (seq,) = manager.open([[5, 6, 7, 8, 9]]).seqs.tolist()
    waiting = view_sequence(manager.snapshot(), seq, storage)
    assert (waiting.position, waiting.slot, waiting.block_id, waiting.key) == (None, None, 0, ())
    assert "nothing is computed yet" in str(waiting)
    extension = manager.extend([seq], [5])
    key = torch.arange(30, dtype=torch.bfloat16).view(5, 2, 3)
    storage.write(0, key, key, torch.from_numpy(extension.slot_mapping[0]))
    pending = view_sequence(manager.snapshot(), seq, storage)
    assert "pending" in pending._repr_html_()
    manager.complete([seq])
    view = view_sequence(manager.snapshot(), seq, storage)
    assert view.key == ((24.0, 25.0, 26.0), (27.0, 28.0, 29.0))
    assert view_sequence(manager.snapshot(), seq).key == ()
    with pytest.raises(UnknownHandleError, match="no sequence of handle 1"):
        view_sequence(manager.snapshot(), 1, storage)


class _Page(HTMLParser):
    """Refuses tags that are not closed in order, and collects what a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def _view(num_tokens: int, texts: tuple[str, ...] = ()) -> SequenceView:
    manager = KVCacheManager(num_blocks=200, block_size=4, max_num_seqs=2)
    opened = manager.open([list(range(num_tokens))])
    manager.extend(opened.seqs, [num_tokens])
    manager.complete(opened.seqs)
    view = view_sequence(manager.snapshot(), int(opened.seqs[0]))
    return SequenceView("<b>title</b>", view.sequence, view.num_holders, texts, position=1, key=((0.5, float("nan"), float("-inf")),))


def test_html_is_escaped_well_formed_and_needs_nothing_from_outside() -> None:
    html = _view(6, ("<script>alert(1)</script>", '"&', "\n", " a", "b", "\t"))._repr_html_()
    page = _Page()
    page.feed(html)
    page.close()
    assert not page.open
    assert page.tags <= {"div", "style", "p", "b", "table", "tr", "th", "td", "span", "i"}
    assert {"<script>alert(1)</script>", '"&', "↵", "·a", "⇥"} <= set(page.text)
    assert "http" not in html
    assert "url(" not in html
    assert html.count('class="token chosen"') == 2  # in the legend, and one token


def test_long_sequences_are_shown_in_part() -> None:
    view = _view(700)
    assert len(str(view).splitlines()) < 50
    assert view._repr_html_().count("<tr") < 60
    assert "..." in str(view)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_shown_blocks_hold_the_focus_and_both_ends(count: int) -> None:
    for focus in range(count):
        shown = shown_blocks(count, focus, most=8)
        indices = [index for index in shown if index is not None]
        assert {0, focus, count - 1} <= set(indices)
        assert indices == sorted(set(indices))
        assert len(indices) <= 8
    assert shown_blocks(0, 0, most=8) == []
