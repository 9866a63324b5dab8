"""Several files of labelled text as test sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_cka.data.test_sets import TestSet, TestSetsDataModule
from lit_cka.data.text import read_labelled_text
from lit_cka.data.tokenizer import load_tokenizer


class TextTestsDataModule(TestSetsDataModule):
    """Labelled text from csv, json lines or parquet files, tokenized by the model's tokenizer.

    Args:
        files: paths by name; the first is in-distribution.
        text_column: where the text is.
        label_column: where the label is, a whole number from 0 on.
        tokenizer: name or folder for `AutoTokenizer`; None for the model's own (`tokenizer_name`).
        max_length: tokens after which a text is cut.
        batch_size: texts per batch.
        num_workers: processes that tokenize.

    Raises:
        FileNotFoundError: if files are missing; all of them are named.
        ValueError: if a file is not as described, or there is no tokenizer.
    """

    def __init__(
        self,
        files: dict[str, str],
        text_column: str = "text",
        label_column: str = "label",
        tokenizer: str | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.files = dict(files)
        self.text_column = text_column
        self.label_column = label_column
        self.tokenizer = tokenizer
        self.max_length = max_length

    @override
    def read_test_sets(self) -> list[TestSet]:
        missing = [f"{name}: {path}" for name, path in self.files.items() if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"Expected files of labelled text, but these are missing: {', '.join(missing)}.")
        module = self.trainer.lightning_module if self.trainer is not None else None
        name = self.tokenizer or getattr(module, "tokenizer_name", None)
        if name is None:
            raise ValueError("Expected `tokenizer` to name a tokenizer, since the LightningModule has none.")
        self._tokenize = load_tokenizer(name)
        return [
            TestSet(
                name,
                read_labelled_text(path, self.text_column, self.label_column),  # type: ignore[arg-type]  # a list will do
                collate=self._collate,
            )
            for name, path in self.files.items()
        ]

    def _collate(self, samples: list[tuple[str, int]]) -> dict[str, Any]:
        texts, labels = zip(*samples, strict=True)
        tokens: dict[str, Tensor] = self._tokenize(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**tokens, "labels": torch.tensor(labels)}
