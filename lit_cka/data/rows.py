"""Rows of a file by column, whatever its format: `read_rows`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PlacedRow = tuple[str, dict[str, Any]]


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """Yields the rows of a file, each with its place in the file, for messages.

    The suffix says what the file is: .txt (a text in each line, the column "text"), .csv (with a header), .json (a list
    of objects, or one in each line), .jsonl (one in each line), or .parquet (which takes pyarrow).

    Raises:
        ValueError: if the file cannot be read as what its suffix says.
    """
    read = {".txt": _text_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix, _json_rows)
    try:
        yield from read(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Expected {str(path)!r} to be {path.suffix} in UTF-8, but it isn't: {error}.") from error


def _text_rows(path: Path) -> Iterator[PlacedRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            yield f"line {number} of {str(path)!r}", {"text": line.removesuffix("\n")}


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            yield f"row {number} of {str(path)!r}", row


def _parquet_rows(path: Path) -> Iterator[PlacedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Reading parquet takes pyarrow: pip install 'lit-cka[hub]'.") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"Expected {str(path)!r} to be a parquet file, but it isn't: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number} of {str(path)!r}", row


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    content = path.read_text(encoding="utf-8-sig")
    is_list = content.lstrip().startswith("[")
    # Not `splitlines`: a text may hold line separators of Unicode.
    sources = [content] if is_list else content.split("\n")
    for number, source in enumerate(sources, start=1):
        if not source.strip():
            continue
        where = repr(str(path)) if is_list else f"line {number} of {str(path)!r}"
        try:
            value = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected JSON, but {where} is none: {error}.") from error
        rows = value if is_list else [value]
        for index, row in enumerate(rows, start=1):
            place = f"row {index} of {where}" if is_list else where
            if not isinstance(row, dict):
                raise ValueError(f"Expected JSON objects with columns, but {place} is {row!s:.80}.")
            yield place, row
