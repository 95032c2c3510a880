"""Published trace formats are read as their columns say, and a wrong line is named with its column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedkv.errors import InvalidRequestError, TraceError
from pagedkv.testing.trace_files import read_trace
from pagedkv.testing.traces import TraceRequest, make_trace

# Written for this test in the published columns; no line stands in a published file.
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [70, 71, 72]},
    {"timestamp": 1500, "input_length": 1200, "output_length": 7, "hash_ids": [70, 71, 99]},
    {"timestamp": 4000, "input_length": 3, "output_length": 1, "hash_ids": [8]},
]
BAILIAN = {
    "chat_id": 5,
    "parent_chat_id": -1,
    "timestamp": 61.5,
    "input_length": 33,
    "output_length": 2,
    "type": "text",
    "turn": 1,
    "hash_ids": [4, 5],
}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.9999999,10,3\n2024-05-10 00:00:02.5000000,20,4\n"
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "7,ChatGPT,40,9,49,API log\n9,GPT-4,50,0,50,API log\n\n8.5,GPT-4,60,2,62,Conversation log\n"
)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_read_mooncake_gives_seconds_and_ids_from_zero(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, lines(*MOONCAKE)))
    assert (trace.kind, trace.hash_block_size, trace.num_distinct_ids) == ("mooncake", 512, 5)
    assert trace.requests == (
        TraceRequest(0.0, 1030, 5, (0, 1, 2)),
        TraceRequest(0.5, 1200, 7, (0, 1, 3)),
        TraceRequest(3.0, 3, 1, (4,)),
    )
    assert trace.statistics().reuse == pytest.approx(2 / 7)


def test_read_bailian_is_told_from_mooncake_by_its_chats(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, lines(BAILIAN, {**BAILIAN, "timestamp": 62, "hash_ids": [4, 5, 6]})))
    assert (trace.kind, trace.hash_block_size) == ("qwen-bailian", 16)
    assert [(each.arrival_s, each.hash_ids) for each in trace.requests] == [(0.0, (0, 1)), (0.5, (0, 1, 2))]


def test_read_azure_takes_seven_digits_of_a_second(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "\ufeff" + AZURE))
    assert trace.kind == "azure"
    assert [(each.num_prompt_tokens, each.num_output_tokens) for each in trace.requests] == [(10, 3), (20, 4)]
    assert trace.requests[1].arrival_s == pytest.approx(1.5, abs=1e-5)


def test_read_burstgpt_sorts_arrivals_and_leaves_failures_out(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, BURSTGPT))
    assert (trace.kind, trace.num_skipped) == ("burstgpt", 1)
    assert [(each.arrival_s, each.num_prompt_tokens) for each in trace.requests] == [(0.0, 40), (1.5, 60)]


def test_read_stops_at_max_requests_and_obeys_the_kind_given(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, lines(*MOONCAKE)), max_requests=2).requests) == 2
    seconds = lines({"timestamp": 1, "input_length": 20, "output_length": 2, "hash_ids": [1, 2]})
    assert read_trace(written(tmp_path, seconds), "qwen-bailian").hash_block_size == 16


BAD_LINES = {
    "not an object": (lines(MOONCAKE[0], 5), 2, ""),
    "cut off": (lines(MOONCAKE[0]) + '{"timestamp": 1', 2, ""),
    "key missing": (lines(MOONCAKE[0], {"timestamp": 1, "input_length": 5, "hash_ids": [1]}), 2, "output_length"),
    "negative length": (lines({**MOONCAKE[0], "input_length": -1}), 1, "input_length"),
    "fraction": (lines({**MOONCAKE[0], "output_length": 1.5}), 1, "output_length"),
    "true": (lines({**MOONCAKE[0], "output_length": True}), 1, "output_length"),
    "too large": (lines({**MOONCAKE[0], "output_length": 2**31}), 1, "output_length"),
    "time not a number": (lines({**MOONCAKE[0], "timestamp": "soon"}), 1, "timestamp"),
    "time not finite": (lines(MOONCAKE[0]) + lines({**MOONCAKE[0], "timestamp": float("nan")}), 2, "timestamp"),
    "time a list": (lines({**MOONCAKE[0], "timestamp": []}), 1, "timestamp"),
    "ids missing": (lines(MOONCAKE[0], {**MOONCAKE[0], "hash_ids": None}), 2, "hash_ids"),
    "too few ids": (lines({**MOONCAKE[0], "hash_ids": [1]}), 1, "hash_ids"),
    "too many ids": (lines({**MOONCAKE[0], "hash_ids": [1, 2, 3, 4]}), 1, "hash_ids"),
    "id negative": (lines({**MOONCAKE[0], "hash_ids": [1, -2, 3]}), 1, "hash_ids"),
    "id a text": (lines({**MOONCAKE[0], "hash_ids": [1, "2" * 99, 3]}), 1, "hash_ids"),
    "row too short": (AZURE + "2024-05-10 00:00:03,5\n", 4, ""),
    "no date": (AZURE + "yesterday,5,6\n", 4, "TIMESTAMP"),
    "count with a sign": (AZURE + "2024-05-10 00:00:03,+5,6\n", 4, "ContextTokens"),
    "count empty": (AZURE + "2024-05-10 00:00:03,5,\n", 4, "GeneratedTokens"),
    "count of many digits": (AZURE + f"2024-05-10 00:00:03,5,{'9' * 5000}\n", 4, "GeneratedTokens"),
    "open quote": (AZURE + '"2024,5,6\n', 4, ""),
    "blank lines count": ("\n\n" + BURSTGPT + "\nx,GPT-4,1,1,2,API log\n", 9, "Timestamp"),
    "not UTF-8": (AZURE.encode() + b"2024-05-10 00:00:03,\xff,6\n", 4, ""),
    "empty": ("", 0, ""),
    "only blanks": ("\n \n", 0, ""),
    "only a header": (AZURE.split("\n")[0] + "\n", 0, ""),
    "unknown columns": ("a,b\n1,2\n", 0, ""),
    "only failures": (BURSTGPT.split("\n")[0] + "\n9,GPT-4,50,0,50,API log\n", 0, ""),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_read_bad_line_names_file_line_and_column(name: str, tmp_path: Path) -> None:
    text, line, column = BAD_LINES[name]
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.path, caught.value.line, caught.value.column) == (str(path), line, column), str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 250


def test_read_unknown_kind_or_limit_is_refused_before_the_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'sharegpt': it must be one of"):
        read_trace(tmp_path / "none", "sharegpt")
    with pytest.raises(InvalidRequestError, match="max_requests is 0"):
        read_trace(tmp_path / "none", max_requests=0)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none")


def test_prompt_tokens_are_equal_exactly_where_hash_ids_are() -> None:
    trace = make_trace("mine", 4, [TraceRequest(0, 9, 1, (7, 8, 9)), TraceRequest(1, 10, 1, (7, 8, 3)), TraceRequest(2, 6, 1, (7,))])
    first, second, third = (trace.prompt(index).tolist() for index in range(3))
    assert first[:8] == second[:8]
    assert first[8] != second[8]
    assert third[:4] == first[:4]
    assert len({*first, *second, *third}) == 5, "a prompt's tail without a hash id is its own"
    assert trace.own_token(1) not in {*first, *second, *third}


def test_shrink_keeps_the_blocks() -> None:
    trace = make_trace("mine", 8, [TraceRequest(0, 17, 9, (0, 1, 2))]).shrink(4)
    assert (trace.hash_block_size, trace.requests) == (2, (TraceRequest(0, 5, 3, (0, 1, 2)),))
    with pytest.raises(InvalidRequestError, match="factor is 3"):
        make_trace("mine", 8, [TraceRequest(0, 17, 9, (0, 1, 2))]).shrink(3)


def test_whole_blocks_need_hash_ids_and_room_for_the_last_token() -> None:
    trace = make_trace("mine", 8, [TraceRequest(0, 17, 9, (0, 1, 2)), TraceRequest(1, 5, 1)])
    assert trace.as_whole_blocks(3).requests == (TraceRequest(0, 10, 1, (0, 1, 2)),)
    with pytest.raises(InvalidRequestError, match="block_size is 1"):
        trace.as_whole_blocks(1)
    with pytest.raises(InvalidRequestError, match="must have hash ids"):
        make_trace("mine", 0, [TraceRequest(0, 5, 1)]).as_whole_blocks()
    with pytest.raises(InvalidRequestError, match="at least one request"):
        make_trace("mine", 0, [])
