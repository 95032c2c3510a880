"""Reading published traces: which formats there are, how they are told apart, and what makes a line wrong. Owns no state.

==============  =====================================================================================  =================================
kind            columns or keys                                                                        published by
==============  =====================================================================================  =================================
mooncake        timestamp (ms), input_length, output_length, hash_ids (512 tokens each)                Mooncake, FAST 2025
qwen-bailian    the same with seconds and 16 tokens an id; also chat_id, parent_chat_id, type, turn    Alibaba Cloud, ATC 2025
azure           TIMESTAMP, ContextTokens, GeneratedTokens                                              Azure public dataset (Splitwise)
burstgpt        Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type          BurstGPT, arXiv 2401.17644
==============  =====================================================================================  =================================

Columns that a replay does not need may be missing, and others may be there.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from os import PathLike, fspath
from types import MappingProxyType
from typing import IO

from pagedkv.errors import InvalidRequestError, TraceError
from pagedkv.testing.traces import Trace, TraceRequest, make_trace

_LARGEST = 2**31 - 1  # tokens and counts are kept in int32


class _FieldError(Exception):
    """What is wrong with one value; the reader adds where it stands."""


@dataclass(frozen=True, slots=True)
class _Format:
    """Where a format keeps what a replay needs."""

    arrival: str
    prompt: str
    output: str
    seconds: Callable[[object], float]
    hash_block_size: int = 0
    marks: tuple[str, ...] = ()  # further keys by which it is told from a format with the same ones

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.arrival, self.prompt, self.output, *(("hash_ids",) if self.hash_block_size else ()))


def read_trace(path: str | PathLike[str], kind: str | None = None, *, max_requests: int | None = None) -> Trace:
    """Read a file of recorded requests.

    Args:
        path: the file.
        kind: ``"mooncake"``, ``"qwen-bailian"``, ``"azure"`` or ``"burstgpt"``; told from the header or the first line when not given.
        max_requests: read so many at most, from the start.

    Returns:
        requests by arrival. Those recorded with no prompt or no output (BurstGPT's failures) are left out and counted.

    Raises:
        TraceError: a file of no known format, or a line that breaks its format; names file, line and column.
        InvalidRequestError: an unknown ``kind``, or ``max_requests`` below 1.
        OSError: the file cannot be opened.

    Cost: O(file), all requests in memory.
    """
    if kind is not None and kind not in FORMATS:
        raise InvalidRequestError(f"trace kind is {kind!r}: it must be one of {', '.join(FORMATS)}")
    if max_requests is not None and max_requests < 1:
        raise InvalidRequestError(f"max_requests is {max_requests}: it must be at least 1")
    name, requests, skipped = fspath(path), [], 0
    with open(path, "rb") as file:
        records = _records(file, name)
        first = next(records, None)
        if first is None:
            raise TraceError("the file holds no request", path=name)
        kind = kind or _recognise(first[1], name)
        form = FORMATS[kind]
        for line, record in islice(chain([first], records), max_requests):
            request = _request(form, record, path=name, line=line)
            if request.num_prompt_tokens and request.num_output_tokens:
                requests.append(request)
            else:
                skipped += 1
    if not requests:
        raise TraceError("the file holds no request with a prompt and an output", path=name)
    return make_trace(kind, form.hash_block_size, requests, skipped)


def _records(file: IO[bytes], path: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Line numbers and fields; JSON lines if the first character says so, else CSV with a header."""
    lines = ((number, text) for number, text in _lines(file, path) if text.strip())
    first = next(lines, None)
    if first is None:
        return
    rest = chain([first], lines)
    if first[1].lstrip().startswith("{"):
        for number, text in rest:
            yield number, _json_object(text, path=path, line=number)
        return
    numbers: list[int] = []

    def text_of() -> Iterator[str]:
        for number, text in rest:
            numbers.append(number)
            yield text

    rows = csv.reader(text_of(), strict=True)
    try:
        header = [name.strip() for name in next(rows)]
        for row in rows:
            if len(row) != len(header):
                raise TraceError(f"{len(row)} values where the header names {len(header)} columns", path=path, line=numbers[-1])
            yield numbers[-1], dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise TraceError(f"not CSV: {error}", path=path, line=numbers[-1]) from error
    if len(numbers) == 1:
        raise TraceError("the file holds a header and no request", path=path)


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TraceError(f"not UTF-8: {error.reason}", path=path, line=number) from error


def _json_object(text: str, *, path: str, line: int) -> Mapping[str, object]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"not JSON: {error}", path=path, line=line) from error
    if not isinstance(record, dict):
        raise TraceError(f"a JSON object is needed, got {type(record).__name__}", path=path, line=line)
    return record


def _recognise(record: Mapping[str, object], path: str) -> str:
    for kind, form in FORMATS.items():
        if {*form.needed, *form.marks} <= set(record):
            return kind
    raise TraceError(f"no known format has the columns {', '.join(map(repr, record))}: give kind, one of {', '.join(FORMATS)}", path=path)


def _request(form: _Format, record: Mapping[str, object], *, path: str, line: int) -> TraceRequest:
    column = ""
    try:
        for column in form.needed:
            if column not in record:
                raise _FieldError("it is missing")
        column = form.arrival
        arrival = form.seconds(record[column])
        column = form.prompt
        num_prompt = _count(record[column])
        column = form.output
        num_output = _count(record[column])
        column = "hash_ids"
        ids = _hash_ids(record[column], num_prompt, form.hash_block_size) if form.hash_block_size else ()
    except _FieldError as problem:
        raise TraceError(str(problem), path=path, line=line, column=column) from None
    return TraceRequest(arrival, num_prompt, num_output, ids)


def _count(value: object) -> int:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _FieldError(f"a whole number from 0 to {_LARGEST} is needed, got {_shown(value)}")
    return value


def _seconds(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _FieldError(f"a finite number is needed, got {_shown(value)}")
    return number


def _from_milliseconds(value: object) -> float:
    return _seconds(value) / 1000


def _from_date(value: object) -> float:
    try:
        date = datetime.fromisoformat(value.strip()) if isinstance(value, str) else None
    except ValueError:
        date = None
    if date is None:
        raise _FieldError(f"a date and time like 2023-11-16 18:17:03.97 is needed, got {_shown(value)}")
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _hash_ids(value: object, num_prompt_tokens: int, hash_block_size: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _FieldError(f"a list is needed, got {_shown(value)}")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise _FieldError(f"whole numbers from 0 are needed, got {_shown(number)}")
    least, most = num_prompt_tokens // hash_block_size, -(-num_prompt_tokens // hash_block_size)
    if not least <= len(value) <= most:
        raise _FieldError(f"{len(value)} ids for {num_prompt_tokens} tokens: one for each {hash_block_size} is needed")
    return tuple(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "qwen-bailian": _Format("timestamp", "input_length", "output_length", _seconds, 16, ("chat_id", "parent_chat_id")),
        "mooncake": _Format("timestamp", "input_length", "output_length", _from_milliseconds, 512),
        "azure": _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", _from_date),
        "burstgpt": _Format("Timestamp", "Request tokens", "Response tokens", _seconds),
    }
)
