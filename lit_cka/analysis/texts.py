"""Texts with ids, from files and as batches of tokens: `Samples`, `read_texts`."""

from __future__ import annotations

import os
import random
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_cka.data.rows import read_rows

_SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Samples:
    """What features are computed from.

    Args:
        ids: of the samples, what those of several models or languages are matched by.
        items: the samples themselves, such as texts.
        labels: of the samples, where there are some.
        name: of the dataset, for tables and files.

    Raises:
        ValueError: if there are no samples, their numbers differ, or an id comes twice.
    """

    ids: list[str]
    items: list[Any]
    labels: list[Any] | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"Expected {self.name!r} to hold samples, but it has none.")
        num_labels = len(self.ids) if self.labels is None else len(self.labels)
        if not len(self.ids) == len(self.items) == num_labels:
            raise ValueError(
                f"Expected an id for every sample of {self.name!r}, and a label if any has one, but got "
                f"{len(self.ids)} ids for {len(self.items)} samples and {num_labels} labels."
            )
        most, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"Expected every sample of {self.name!r} to have its own id, but {most!r} comes {times} times."
            )

    def __len__(self) -> int:
        return len(self.ids)


def read_texts(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    label_column: str | None = None,
    id_column: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Samples:
    """Returns the texts of a file: .txt, .csv, .json, .jsonl or .parquet, see `lit_cka.data.rows.read_rows`.

    Args:
        path: of the file.
        text_column: where the texts are.
        label_column: where labels are, kept as they are (in a csv, as strings); None for no labels.
        id_column: where ids are; None for the number of the row, from 0 on, so that files with the same rows in
            several languages match.
        num_samples: draw so many at random, where there are labels as many of each as possible; None for all. The
            order is that of the file.
        seed: of the draw.
        name: of the dataset; None for the file's name without its suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another type, cannot be read, lacks a column, has no rows, an empty text, a label
            or id that is missing or no word or number, or an id twice, or there are fewer texts than `num_samples`.
    """
    path = Path(path).expanduser()
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"Expected a file of type {', '.join(_SUFFIXES)}, but got {str(path)!r}.")
    if path.suffix == ".txt" and (label_column or id_column or text_column != "text"):
        raise ValueError(f"A .txt file has no columns: leave `*_column` out for {str(path)!r}, or give another file.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of texts at {str(path)!r}, but there is none.")
    columns = [column for column in (text_column, label_column, id_column) if column is not None]
    rows = []
    for where, row in read_rows(path):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(f"Expected a column {missing[0]!r}, but {where} has {[*row]}.")
        if not isinstance(row[text_column], str) or not row[text_column].strip():
            raise ValueError(f"Expected a text that is not empty, but {where} has {row[text_column]!r}.")
        for column in columns[1:]:
            if not isinstance(row[column], (str, int, float)) or row[column] == "":
                raise ValueError(f"Expected {column!r} to be a word or a number, but {where} has {row[column]!r}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"Expected {str(path)!r} to hold texts, but it has none.")
    chosen = range(len(rows))
    labels = None if label_column is None else [row[label_column] for row in rows]
    kept = list(chosen) if num_samples is None else _draw(labels or [None] * len(rows), num_samples, seed)
    return Samples(
        [str(index if id_column is None else rows[index][id_column]) for index in kept],
        [rows[index][text_column] for index in kept],
        None if labels is None else [labels[index] for index in kept],
        path.stem if name is None else name,
    )


def _draw(labels: list[Any], num_samples: int, seed: int) -> list[int]:
    """Returns indices in ascending order, from every label in turn until there are enough."""
    if not 0 < num_samples <= len(labels):
        raise ValueError(
            f"Expected `num_samples` to be 1 to {len(labels)}, the number of texts, but got {num_samples}."
        )
    of_label: dict[Any, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        of_label[label].append(index)
    generator = random.Random(seed)
    turns = []
    for indices in of_label.values():
        generator.shuffle(indices)
        turns += list(enumerate(indices))
    turns.sort(key=lambda pair: pair[0])  # stable: labels stay in the order in which they come in the file
    return sorted(index for _, index in turns[:num_samples])


def tokenize(tokenizer: Any, samples: Samples, max_length: int) -> list[list[int]]:
    """Returns the tokens of each text, with those that the tokenizer adds; texts are cut with one warning."""
    # The tokens alone: tokenizers may add inputs, such as types, that change the features of models without them.
    tokens: list[list[int]] = list(tokenizer(list(samples.items), verbose=False)["input_ids"])
    long = [index for index, ids in enumerate(tokens) if len(ids) > max_length]
    if long:
        texts = [samples.items[index] for index in long]
        cut = tokenizer(texts, truncation=True, max_length=max_length)  # which keeps the special tokens at the end
        for index, ids in zip(long, cut["input_ids"], strict=True):
            tokens[index] = ids
        warnings.warn(
            f"{len(long)} of {len(samples)} texts of {samples.name!r} were cut to {max_length} tokens.", stacklevel=2
        )
    return tokens


def collate(rows: list[tuple[str, list[int], Any]], padding: int) -> dict[str, Any]:
    """Returns a batch of rows (id, tokens, label), padded on the right with the token `padding`, which is masked."""
    ids, tokens, labels = zip(*rows, strict=True)
    lengths = torch.tensor([len(row) for row in tokens])
    positions = torch.arange(int(lengths.max()))
    batch = {
        "input_ids": torch.tensor([row + [padding] * (len(positions) - len(row)) for row in tokens]),
        "attention_mask": (positions < lengths[:, None]).long(),
        "id": list(ids),
    }
    return batch if labels[0] is None else {**batch, "labels": list(labels)}
