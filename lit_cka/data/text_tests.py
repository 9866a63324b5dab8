"""Several files of labelled text as test sets."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from lit_cka.data.from_model import tokenizer_for
from lit_cka.data.test_sets import TestSet, TestSetsDataModule
from lit_cka.data.text import LabelledTextCollator, read_labelled_text


class TextTestsDataModule(TestSetsDataModule):
    """Labelled text from csv, json lines or parquet files, tokenized by the model's tokenizer.

    Args:
        files: paths by name; the first is in-distribution.
        text_column: where the text is.
        label_column: where the label is, a whole number from 0 on.
        tokenizer: name or folder for `AutoTokenizer`; None for the model's (`tokenizer_name`).
        max_length: tokens after which a text is cut.
        batch_size: texts per batch.
        num_workers: processes that tokenize.

    Raises:
        FileNotFoundError: if files are missing; all of them are named.
        ValueError: if a file is not as described, or there is no tokenizer.

    Example:
        >>> data = TextTestsDataModule({"reviews": "imdb.csv", "tweets": "tweets.csv"}, label_column="sentiment")
        >>> list(data.files)
        ['reviews', 'tweets']
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
        collate = LabelledTextCollator(tokenizer_for(self, self.tokenizer), self.max_length)
        return [
            TestSet(
                name,
                read_labelled_text(path, self.text_column, self.label_column),  # type: ignore[arg-type]  # a list will do
                collate=collate,
            )
            for name, path in self.files.items()
        ]
