"""Rows are the same from every format, and what cannot be read is named by its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lit_cka.data.rows import read_rows
from lit_cka.data.text import read_labelled_text

ROWS = [{"text": "a film", "label": "1"}, {"text": 'said "no",\nthen\u2028left', "label": "0"}]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        path.write_text(json.dumps(ROWS) if path.stem == "list" else f"{lines}\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "list.json", "a.parquet"])
def test_all_formats_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert [row for _, row in read_rows(path)] == ROWS
    assert read_labelled_text(path, "text", "label") == [(row["text"], int(row["label"])) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.csv", ["row 1 of {}", "row 2 of {}"]),
        ("a.jsonl", ["line 1 of {}", "line 2 of {}"]),
        ("list.json", ["row 1 of {}", "row 2 of {}"]),
        ("a.parquet", ["row 1 of {}", "row 2 of {}"]),
    ],
)
def test_places_are_those_that_an_editor_shows(tmp_path: Path, name: str, places: list[str]) -> None:
    path = write(tmp_path / name)
    assert [place for place, _ in read_rows(path)] == [place.format(repr(str(path))) for place in places]


def test_lines_of_text_keep_their_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one \n\ntwo", encoding="utf-8")
    assert [row["text"] for _, row in read_rows(tmp_path / "a.txt")] == [" one ", "", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n\xff\n", r"a\.csv' to be \.csv in UTF-8, but it isn't"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', r"JSON, but line 3 of '.*a\.jsonl' is none"),
        ("a.jsonl", b'{"text": "a"}\n3\n', r"objects with columns, but line 2 of '.*' is 3"),
        ("a.json", b'[{"text": "a"}, 3]', r"objects with columns, but row 2 of '.*a\.json' is 3"),
        ("a.parquet", b"no parquet", r"to be a parquet file, but it isn't"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))
