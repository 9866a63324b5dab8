"""What an edit of files did to each tensor, as JSON or as a table: `write_report`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_cka.editing.parameter import ParameterRecord
from lit_cka.files import json_bytes, write_bytes


def write_report(path: Path, records: Sequence[ParameterRecord], settings: Mapping[str, Any], output: Path) -> None:
    """Write a new .json or .csv file, or find it written.

    Raises:
        FileExistsError: if there is another file; the message says where the edited weights are, which are `output`.
    """
    content = _content(path, records, settings)
    if path.is_file() and path.read_bytes() == content:
        return  # written before the job was killed
    try:
        write_bytes(path, content, durable=True, new=True)
    except FileExistsError as error:
        raise FileExistsError(
            f"Expected `report` to be new, but {str(path)!r} has come into being meanwhile, and was left as it is. "
            f"The edited weights are in {str(output)!r}. Name another report, and run the same edit again, "
            "which writes it."
        ) from error


def _content(path: Path, records: Sequence[ParameterRecord], settings: Mapping[str, Any]) -> bytes:
    if path.suffix != ".csv":  # JSON has no infinity, the relative change of weights that were 0: null there
        return json_bytes({**settings, "parameters": list(records)})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ParameterRecord.__annotations__))
    writer.writeheader()
    writer.writerows({**record, "shape": "x".join(map(str, record["shape"]))} for record in records)
    return text.getvalue().encode()
