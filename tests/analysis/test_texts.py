"""Texts from files: what is read, what is drawn, and what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lit_cka.analysis.texts import Samples, read_texts

# With what files of their kinds have to quote, and line separators of Unicode, which end no row.
TEXTS = ['a "good" film, very', "ein guter Film \U0001f3ac", "हिन्दी में", "one\u2028still one\x0bstill", " spaces "]
ROWS = [{"text": text, "label": index % 2, "key": f"k{index}"} for index, text in enumerate(TEXTS)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "json", "jsonl", "parquet"])
def test_texts_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"reviews.{kind}", ROWS)
    assert read_texts(path) == Samples(["0", "1", "2", "3", "4"], TEXTS, None, "reviews")
    if kind != "txt":
        samples = read_texts(str(path), label_column="label", id_column="key", name="films")
        labels: list[Any] = ["0", "1", "0", "1", "0"] if kind == "csv" else [0, 1, 0, 1, 0]
        assert samples == Samples(["k0", "k1", "k2", "k3", "k4"], TEXTS, labels, "films")


def test_text_may_be_in_another_column_and_json_in_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff{"body": "a"}\n{"body": "b"}', encoding="utf-8")
    assert read_texts(tmp_path / "a.json", text_column="body").items == ["a", "b"]


def test_windows_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\r\n".encode())
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\r\na,1\r\nb,0".encode())
    assert read_texts(tmp_path / "a.txt").items == read_texts(tmp_path / "a.csv").items == ["a", "b"]


def test_a_draw_is_seeded_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"text {index}"} for index in range(50)])
    drawn = read_texts(path, num_samples=20)
    assert drawn == read_texts(path, num_samples=20)
    assert len(drawn) == 20
    numbers = [int(sample) for sample in drawn.ids]
    assert numbers == sorted(numbers)
    assert numbers != list(range(20))
    assert drawn.items == [f"text {number}" for number in numbers]
    assert drawn.ids != read_texts(path, num_samples=20, seed=1).ids
    assert read_texts(path, num_samples=50) == read_texts(path)


def test_a_draw_from_labelled_texts_is_balanced(tmp_path: Path) -> None:
    labels = ["neg"] * 30 + ["pos"] * 12 + ["odd"] * 2
    path = write(tmp_path / "a.csv", [{"text": str(index), "label": label} for index, label in enumerate(labels)])

    def count(num_samples: int) -> Counter[str]:
        samples = read_texts(path, label_column="label", num_samples=num_samples)
        assert samples.labels == [labels[int(text)] for text in samples.items]
        return Counter(samples.labels)

    assert count(3) == {"neg": 1, "pos": 1, "odd": 1}
    assert count(22) == {"neg": 10, "pos": 10, "odd": 2}
    assert count(30) == {"neg": 16, "pos": 12, "odd": 2}
    seeds = [read_texts(path, label_column="label", num_samples=6, seed=seed).ids for seed in range(4)]
    assert len(set(map(tuple, seeds))) == 4


def test_one_text_and_one_class_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    assert read_texts(path, label_column="label") == Samples(["0"], TEXTS[:1], [0], "a")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "a\n\nb\n", {}, r"text that is not empty, but line 2 of '.*a\.txt' has ''"),
        ("a.txt", "", {}, r"'.*a\.txt' to hold texts, but it has none"),
        ("a.txt", "a\n", {"label_column": "label"}, "txt file has no columns"),
        ("a.txt", "a\n", {"text_column": "body"}, "txt file has no columns"),
        ("a.csv", "text,label\na,1\n  ,0\n", {}, r"row 2 of '.*a\.csv' has '  '"),
        ("a.csv", "text,label\n", {}, "it has none"),
        ("a.csv", "", {}, "it has none"),
        ("a.csv", "body,label\na,1\n", {}, r"a column 'text', but row 1 of .* has \['body', 'label'\]"),
        ("a.csv", "text,label\na,1\n", {"label_column": "y"}, r"a column 'y', but row 1 of .*\['text', 'label'\]"),
        ("a.csv", "label,text\n1,a\n0\n", {}, r"row 2 of .* has None"),
        (
            "a.csv",
            "text,label\na,\n",
            {"label_column": "label"},
            "'label' to be a word or a number, but row 1 .* has ''",
        ),
        ("a.csv", "text,key\na,x\nb,x\n", {"id_column": "key"}, "'a' to have its own id, but 'x' comes 2 times"),
        ("a.csv", b"text\n\xff\n", {}, r"csv in UTF-8, but it isn't"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', {}, r"Expected JSON, but line 3 of .*a\.jsonl' is none"),
        ("a.jsonl", '{"text": "a"}\n["a"]\n', {}, "is none|objects with columns"),
        ("a.jsonl", '{"text": "a"}\n{"body": "a"}\n', {}, r"a column 'text', but line 2 of .* has \['body'\]"),
        ("a.jsonl", '{"text": 3}\n', {}, "text that is not empty, but line 1 of .* has 3"),
        ("a.json", '[{"text": "a"}, 3]', {}, r"objects with columns, but row 2 of '.*a\.json' is 3"),
        ("a.json", '[{"text": "a"}', {}, r"Expected JSON, but '.*a\.json' is none"),
        ("a.json", "[]", {}, "it has none"),
        ("a.jsonl", '{"text": "a", "y": [1]}', {"label_column": "y"}, r"word or a number, but line 1 .* has \[1\]"),
        ("a.parquet", "no parquet", {}, r"to be a parquet file, but it isn't"),
        ("a.txt", "a\nb\n", {"num_samples": 3}, "`num_samples` to be 1 to 2, the number of texts, but got 3"),
        ("a.txt", "a\nb\n", {"num_samples": 0}, "but got 0"),
        ("a.tsv", "text\na", {}, r"type .txt, .csv, .json, .jsonl, .parquet, but got '.*a\.tsv'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, **options)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a file of texts at '.*none\.csv', but there is none"):
        read_texts(tmp_path / "none.csv")


def test_samples_have_to_fit_together() -> None:
    assert len(Samples(["a"], ["text"])) == 1
    with pytest.raises(ValueError, match="'data' to hold samples, but it has none"):
        Samples([], [])
    with pytest.raises(ValueError, match="got 1 ids for 2 samples and 1 labels"):
        Samples(["a"], ["x", "y"])
    with pytest.raises(ValueError, match="got 2 ids for 2 samples and 1 labels"):
        Samples(["a", "b"], ["x", "y"], [1])
    with pytest.raises(ValueError, match="'b' comes 2 times"):
        Samples(["a", "b", "b"], ["x", "y", "z"])
