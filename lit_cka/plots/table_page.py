"""A table that the reader sorts and filters, with pictures below it: one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from lit_cka.files import visible, write_bytes
from lit_cka.plots.html_page import html_page

Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: its head.
        explanation: a sentence on what is in it, shown when the pointer rests on the head, and below the table.
        numeric: whether it holds numbers.
        choices: whether the rows can be filtered by its values.
        wide: whether it holds sentences.
    """

    name: str
    explanation: str
    numeric: bool = False
    choices: bool = False
    wide: bool = False


def write_table_page(
    path: str | os.PathLike[str],
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str,
    about: Sequence[str] = (),
    sorted_by: int = 0,
    pictures: Mapping[str, str] = {},
    files: Sequence[str] = (),
) -> Path:
    """Write the page, whole or not at all; returns its path. All that is in it is text, whatever it looks like.

    Args:
        path: of the file; its folder is made where it is missing.
        columns: the first one holds the names that words are looked for in.
        rows: a cell for each column; None, or NaN, where there is no value.
        title: of the page.
        about: paragraphs above the table.
        sorted_by: index of the column that the table is sorted by at first, the largest on top.
        pictures: captions by the path of an SVG or PNG file, which goes into the page.
        files: names of files beside the page, to link.

    Raises:
        ValueError: if a row has another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"Expected a cell for each of {len(columns)} columns, but got a row of {len(row)}.")
    data = {
        "columns": [asdict(column) for column in columns],
        "rows": [[_cell(value) for value in row] for row in rows],
        "about": list(map(visible, about)),
        "sorted": sorted_by,
        "pictures": [(_picture(source), visible(caption)) for source, caption in pictures.items()],
        "files": list(files),
    }
    return write_bytes(
        path, html_page("table.html", "table.css", ("dom.js", "table.js"), title=visible(title), data=data)
    )


def _cell(value: Cell) -> Cell:
    if isinstance(value, str):
        return visible(value)
    if value is None or math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _picture(path: str) -> str:
    kind = "svg+xml" if path.endswith(".svg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"
