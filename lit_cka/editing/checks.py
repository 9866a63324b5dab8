"""What is checked of an edit's inputs and outputs before it starts."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from lit_cka.checkpoints.pickles import Weights
from lit_cka.files import existing_part, require_writable

_SHOWN = 10  # differing tensors


def difference_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns the first ten rows in aligned columns below the header, and how many more there are."""
    shown = [header, *rows[:_SHOWN]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in shown]
    if len(rows) > _SHOWN:
        lines.append(f"... and {len(rows) - _SHOWN} more")
    return "\n".join(f"  {line}" for line in lines)


def check_output(output: Path, W0: Weights, W1: Weights) -> None:
    """Raise a ValueError if the output is in the way of an input, is of another format, or can't be written.

    Raises:
        PermissionError: if there is no right to write it.
    """
    place = _real(output)
    for weights in (W0, W1):
        source = _real(weights.path)
        if place == source or (output.exists() and output.samefile(source)):
            raise ValueError(f"Expected `output` to be no input, but both are {str(output)!r}.")
        if source in place.parents or place in source.parents:
            raise ValueError(f"Expected `output` beside the inputs, but got {str(output)!r} and {str(weights.path)!r}.")
    if not W1.path.is_dir() and (W1.path.suffix == ".safetensors") != (output.suffix == ".safetensors"):
        raise ValueError(
            f"Expected `output` to be of the format of the fine-tuned model, {W1.path.suffix or 'a state dict'}, "
            f"but got {output.name!r}."
        )
    folder = existing_part(output.parent)
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(output))
    require_writable("output", output.parent)


def check_report(report: Path, output: Path, W0: Weights, W1: Weights) -> None:
    """Raise a ValueError if the report can't be written, or an OSError if its folder is not there."""
    if report.suffix not in (".json", ".csv"):
        raise ValueError(f"Expected `report` to end in .json or .csv, but got {report.name!r}.")
    places = [_real(report), *_real(report).parents]
    if W1.path.is_dir() and _real(output) == places[1]:
        if (W1.path / report.name).exists():
            raise ValueError(f"Expected `report` to have a name of its own, but the model has a {report.name!r}.")
        return
    if any(_real(path) in places for path in (output, W0.path, W1.path)):
        raise ValueError(f"Expected `report` apart from the models, but got {str(report)!r}.")
    if report.is_dir() or not os.access(report.parent, os.W_OK):
        raise OSError(f"Expected `report` to be a file in a folder that can be written to, but got {str(report)!r}.")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike `resolve`, also of links that lead in a circle
