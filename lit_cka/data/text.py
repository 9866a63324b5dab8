"""Labelled text from files (csv, json lines, parquet) or from a dataset on the hub, tokenized for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_cka.data.from_model import tokenizer_for
from lit_cka.data.parts import NEEDED, PartsDataModule
from lit_cka.data.rows import read_rows

_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")


def read_labelled_text(path: str | Path, text_column: str, label_column: str) -> list[tuple[str, int]]:
    """Returns the rows `(text, label)` of a csv (with a header), json lines or parquet file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another type, lacks a column, or has a label that is no whole number.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"Expected a file of type {', '.join(_SUFFIXES)}, but got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of labelled text at {str(path)!r}, but there is none.")
    return _labelled([row for _, row in read_rows(path)], str(path), text_column, label_column)


def _labelled(rows: Sequence[Any], source: str, text_column: str, label_column: str) -> list[tuple[str, int]]:
    for column in (text_column, label_column):
        if len(rows) and column not in rows[0]:
            raise ValueError(f"Expected {source!r} to have a column {column!r}, but it has {list(rows[0])}.")
    labelled = []
    for number, row in enumerate(rows):
        try:
            labelled.append((str(row[text_column]), int(row[label_column])))
        except KeyError as error:
            raise ValueError(
                f"Expected a column {error.args[0]!r}, but row {number} of {source!r} has none."
            ) from error
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Expected labels to be whole numbers from 0 on, but row {number} of {source!r} has "
                f"{row[label_column]!r}."
            ) from error
    if not labelled:
        raise ValueError(f"Expected {source!r} to hold labelled text, but it has no rows.")
    return labelled


@dataclass(frozen=True)
class LabelledTextCollator:
    """Makes a batch of texts and labels: the tokenizer's output, padded to the longest text, and `labels`.

    Args:
        tokenizer: of transformers.
        max_length: tokens after which a text is cut.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, samples: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*samples, strict=True)
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**tokens, "labels": torch.tensor(labels)}


class TextDataModule(PartsDataModule):
    """Labelled text, tokenized by the model's tokenizer and padded to the longest of each batch.

    Name either files or a dataset that `datasets.load_dataset` knows (extra `hub`): a name on the hub, or a folder.

    Args:
        dataset: name or folder for `load_dataset`, such as "stanfordnlp/imdb".
        train: file to train on; with `dataset`, the split ("train", "train[:90%]").
        val: file or split to validate on.
        val_samples: validate on so many of them, drawn at random but always the same; None for all. Draw rather than
            take the first: many sets are sorted by label.
        test: file or split to test and predict on.
        text_column: where the text is.
        label_column: where the label is, a whole number from 0 on.
        tokenizer: name or folder for `AutoTokenizer`; None for the model's (`TextClassifier.tokenizer_name`).
        max_length: tokens after which a text is cut.
        batch_size: texts per batch.
        num_workers: processes that tokenize.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a part that is needed was not named, or a file is not as described.

    Example:
        >>> data = TextDataModule(train="train.csv", val="val.csv", text_column="review", label_column="stars")
        >>> data.parts
        {'train': 'train.csv', 'val': 'val.csv', 'test': None}
    """

    def __init__(
        self,
        dataset: str | None = None,
        train: str | None = None,
        val: str | None = None,
        val_samples: int | None = None,
        test: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        tokenizer: str | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.val_samples = val_samples
        self.parts = {"train": train, "val": val, "test": test}
        self.text_column = text_column
        self.label_column = label_column
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers

    @override
    def setup(self, stage: str) -> None:
        needed = NEEDED[stage]
        missing = [part for part in needed if self.parts[part] is None]
        if missing:
            what = "a split of the dataset" if self.dataset else "a file"
            raise ValueError(f"Expected {' and '.join(f'`{part}`' for part in missing)} to name {what}, but got None.")
        self._sets = {part: self._read(part) for part in needed}
        if "val" in needed and self.val_samples is not None:
            order = torch.randperm(len(self._sets["val"]), generator=torch.Generator().manual_seed(0))
            self._sets["val"] = [self._sets["val"][index] for index in order[: self.val_samples].tolist()]
        self._collate = LabelledTextCollator(tokenizer_for(self, self.tokenizer), self.max_length)

    def _read(self, part: str) -> list[tuple[str, int]]:
        source = self.parts[part]
        assert source is not None
        if self.dataset is None:
            return read_labelled_text(source, self.text_column, self.label_column)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("Loading a dataset by name takes datasets: pip install 'lit-cka[hub]'.") from error
        rows = load_dataset(self.dataset, split=source, trust_remote_code=False)
        return _labelled(rows, f"{self.dataset} {source}", self.text_column, self.label_column)

    @override
    def loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(
            self._sets[part],  # type: ignore[arg-type]  # a list is a map-style dataset
            self.batch_size,
            shuffle=part == "train",
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )
