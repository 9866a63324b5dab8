"""What a comparison of checkpoints leaves in a folder, and what it says: JSON, CSV, spectra, figures and a page."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lit_cka import plots
from lit_cka.editing.diff_table import diff_columns, diff_rows
from lit_cka.editing.tensor_diff import Diff, TensorDiff
from lit_cka.files import versions, visible, write_json, written_whole
from lit_cka.plots.canvas import cut_names
from lit_cka.plots.table_page import write_table_page

_FORMATS = (".svg", ".png", ".pdf")  # the first goes into the page
_NAMED = 4  # tensors of a kind in a sentence


def describe_diff(found: Diff) -> list[str]:
    """Returns a sentence on each checkpoint, one for each kind of tensor to look at, and one on the cosine."""
    lines = []
    for index, (label, path) in enumerate(zip(found.labels, found.others, strict=True)):
        numbers = found.num_by_kind(index)
        if found.is_identical(index):
            lines.append(
                f"{label} ({path}) is identical with A: {len(found.tensors[index])} tensors of the same values."
            )
            continue
        counted = ", ".join(f"{number} {kind}" for kind, number in numbers.items())
        change = found.relative_change(index)
        overall = f"; relative change of all together {change:.4g}" if change == change else ""
        lines.append(f"{label} ({path}): {sum(numbers.values())} tensors: {counted}{overall}.")
        if found.renamings[index] is not None:
            lines.append(f"  its names are taken {found.renamings[index]}, as in A")
        for kind in (kind for kind in numbers if kind not in ("changed", "unchanged")):
            names = [each["name"] for each in found.tensors[index] if each["kind"] == kind]
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"  {kind}: {', '.join(cut_names(names[:_NAMED], 60))}{more}")
    if (cosine := found.cosine()) == cosine:
        lines.append(f"Cosine of the whole updates of B and C: {cosine:.4f}.")
    return [visible(line) for line in lines]


def save_diff(folder: str | os.PathLike[str], found: Diff, config: Mapping[str, Any] | None = None) -> Path:
    """Write `diff.json`, `diff.csv`, `spectra_<label>.safetensors`, figures and `index.html`; returns the page's path.

    Args:
        folder: where to; made where it is missing.
        found: the comparison.
        config: what was run: goes into the JSON, with the versions of packages.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> from lit_cka.editing import diff_files
        >>> with TemporaryDirectory() as folder:
        ...     for name, scale in (("base", 1.0), ("tuned", 1.5)):
        ...         save_file({"fc.weight": scale * torch.eye(4)}, f"{folder}/{name}.safetensors")
        ...     found = diff_files(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors", progress=False)
        ...     save_diff(f"{folder}/diff", found).name
        'index.html'
    """
    folder = Path(folder)
    sides = [
        {
            "label": label, "path": found.others[index], "names_taken": found.renamings[index],
            "identical": found.is_identical(index), "num_by_kind": found.num_by_kind(index),
            "relative_change": found.relative_change(index), "tensors": found.tensors[index],
        }
        for index, label in enumerate(found.labels)
    ]  # fmt: skip
    frame = {"config": dict(config or {}), "versions": versions(), "base": found.base}
    numbers = {"cosine": found.cosine(), "cosines": found.cosines, "checkpoints": sides}
    written = [write_json(folder / "diff.json", {**frame, **numbers}), _write_csv(folder / "diff.csv", found)]
    pictures: dict[str, str] = {}
    for index, label in enumerate(found.labels):
        if found.spectra[index]:
            with written_whole(folder / f"spectra_{label}.safetensors") as partial:
                save_file({_utf8(name): s for name, s in found.spectra[index].items()}, partial)
            written.append(folder / f"spectra_{label}.safetensors")
            pictures |= _save_figures(folder, found, index, written)
    names = sorted(path.name for path in written)
    return write_table_page(
        folder / "index.html", diff_columns(found), diff_rows(found), title="Differences between checkpoints",
        about=[f"A ({found.base}) is the base.", *describe_diff(found)], sorted_by=2, pictures=pictures, files=names,
    )  # fmt: skip


def _save_figures(folder: Path, found: Diff, index: int, written: list[Path]) -> dict[str, str]:
    """Write the figures of one checkpoint; returns captions by path."""
    label, spectra = found.labels[index], found.spectra[index]
    split = [each for each in found.tensors[index] if each["name"] in spectra]
    title = f"Updates from A to {label}, {len(split)} matrices"
    shares = [(each["effective_rank"] or 0.0) / (each["full_rank"] or 1) for each in split]
    changes = [each["relative_change"] or 0.0 for each in split]
    by_layer, _ = plots.updates_by_layer([each["name"] for each in split], changes, shares, title=title)
    by_depth, _ = plots.spectra_by_depth({name: s.numpy() for name, s in spectra.items()}, title=title)
    pictures = {}
    for name, figure, caption in (
        (f"layers_{label}", by_layer, f"{title}: how far each moved, and in how many directions"),
        (f"spectra_{label}", by_depth, f"{title}: their singular values, each matrix scaled to 1"),
    ):
        paths = plots.save_figure(figure, folder / name, _FORMATS)
        written += paths
        pictures[str(paths[0])] = caption
    return pictures


def _write_csv(path: Path, found: Diff) -> Path:
    fields = ["checkpoint", *TensorDiff.__annotations__, "cosine"]
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for label, tensors in zip(found.labels, found.tensors, strict=True):
            for tensor in tensors:
                shapes = {"base_shape": _shape(tensor["base_shape"]), "shape": _shape(tensor["shape"])}
                cosine = found.cosines.get(tensor["name"])
                writer.writerow({"checkpoint": label, **tensor, **shapes, "cosine": cosine})
    return path


def _shape(shape: list[int] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape))


def _utf8(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
