"""A file of texts as an option of a command: `TextFile`."""

from __future__ import annotations

from lit_cka.analysis.texts import Samples, read_texts


class TextFile:
    """Texts from a txt (one a line), csv, json, json lines or parquet file.

    Args:
        path: the file.
        text_column: where the text is.
        label_column: where the label is, if there is one.
        id_column: where a name for each text is, by which the texts of several files are matched; None to number them.
        num_samples: so many of them, drawn at random but always the same, balanced by label; None for all.
        seed: of the draw.
        name: for tables and figures; None for the file's.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with open(f"{folder}/texts.csv", "w") as file:
        ...         _ = file.write("text,label\\ngood,1\\nbad,0\\n")
        ...     texts = TextFile(f"{folder}/texts.csv", label_column="label").read()
        >>> texts.name
        'texts'
    """

    def __init__(
        self,
        path: str,
        text_column: str = "text",
        label_column: str | None = None,
        id_column: str | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        self.path = path
        self.text_column = text_column
        self.label_column = label_column
        self.id_column = id_column
        self.num_samples = num_samples
        self.seed = seed
        self.name = name

    def read(self) -> Samples:
        """Returns the texts; raises as `read_texts`."""
        return read_texts(
            self.path,
            text_column=self.text_column,
            label_column=self.label_column,
            id_column=self.id_column,
            num_samples=self.num_samples,
            seed=self.seed,
            name=self.name,
        )
