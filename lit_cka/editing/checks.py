"""What is checked of an edit's inputs and outputs before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lit_cka.checkpoints.pickles import Weights
from lit_cka.checkpoints.shards import TensorInfo

_SHOWN = 10  # differing tensors


def check_models(W0: Weights, W1: Weights, *, allow_differences: bool) -> int:
    """Returns the number of tensors in which two models differ.

    Raises:
        ValueError: with a table of them, if there are any and they aren't allowed, or if no tensor is in both models.
    """
    rows = _differences(W0, W1)
    table = difference_table(("tensor", "pretrained", "fine-tuned"), rows)
    if not any(name in W0.tensors and W0.tensors[name].shape == info.shape for name, info in W1.tensors.items()):
        raise ValueError(
            f"Expected two models of one architecture, but no tensor has the same name and shape.\n{table}"
        )
    if rows and not allow_differences:
        raise ValueError(
            f"Expected two models of one architecture, but they differ in {len(rows)} tensors.\n{table}\n"
            "With `allow_differences=True` (`--allow_differences true`) those stay as they are in the fine-tuned model."
        )
    return len(rows)


def _differences(W0: Weights, W1: Weights) -> list[tuple[str, str, str]]:
    """Returns names and both shapes of tensors that differ. A file may hold a tied tensor under any of its names."""
    rows = []
    for name in {**W1.tensors, **W0.tensors}:
        before, after = W0.tensors.get(name), W1.tensors.get(name)
        if (after is None and _has_tied(W0, name, W1)) or (before is None and _has_tied(W1, name, W0)):
            continue
        if before is None or after is None or before.shape != after.shape:
            rows.append((name, _shape(before), _shape(after)))
    return rows


def _shape(info: TensorInfo | None) -> str:
    return "missing" if info is None else str(info.shape)


def _has_tied(weights: Weights, name: str, other: Weights) -> bool:
    """Returns whether the other model has a tensor that is tied to this one, under another of its names."""
    return any(first == weights.tied[name] and tied in other.tensors for tied, first in weights.tied.items())


def difference_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns the first ten rows in aligned columns below the header, and how many more there are."""
    shown = [header, *rows[:_SHOWN]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in shown]
    if len(rows) > _SHOWN:
        lines.append(f"... and {len(rows) - _SHOWN} more")
    return "\n".join(f"  {line}" for line in lines)


def check_output(output: Path, W0: Weights, W1: Weights) -> None:
    """Raise a ValueError if the output is in the way of an input, or has the name of another format."""
    place = output.resolve()
    for weights in (W0, W1):
        source = weights.path.resolve()
        if place == source or (output.exists() and output.samefile(source)):
            raise ValueError(f"Expected `output` to be no input, but both are {str(output)!r}.")
        if source in place.parents or place in source.parents:
            raise ValueError(f"Expected `output` beside the inputs, but got {str(output)!r} and {str(weights.path)!r}.")
    if not W1.path.is_dir() and (W1.path.suffix == ".safetensors") != (output.suffix == ".safetensors"):
        raise ValueError(
            f"Expected `output` to be of the format of the fine-tuned model, {W1.path.suffix or 'a state dict'}, "
            f"but got {output.name!r}."
        )


def check_report(report: Path, output: Path, W0: Weights, W1: Weights) -> None:
    """Raise a ValueError if the report can't be written, or an OSError if its folder is not there."""
    if report.suffix not in (".json", ".csv"):
        raise ValueError(f"Expected `report` to end in .json or .csv, but got {report.name!r}.")
    places = [report.resolve(), *report.resolve().parents]
    if W1.path.is_dir() and output.resolve() == places[1]:
        if (W1.path / report.name).exists():
            raise ValueError(f"Expected `report` to have a name of its own, but the model has a {report.name!r}.")
        return
    if any(path.resolve() in places for path in (output, W0.path, W1.path)):
        raise ValueError(f"Expected `report` apart from the models, but got {str(report)!r}.")
    if report.is_dir() or not os.access(report.parent, os.W_OK):
        raise OSError(f"Expected `report` to be a file in a folder that can be written to, but got {str(report)!r}.")
