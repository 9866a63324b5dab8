"""The layers of several models and datasets as points in space: one page of HTML that needs nothing else.

The points are drawn on a plain canvas. Plotly would bring 4.5 MB of script into every page, needs WebGL for points in
space, and its points can't be reached from the keyboard or by a screen reader; for some hundred points a projection and
a list of the same points are enough.
"""

from __future__ import annotations

import base64
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_cka.files import write_bytes
from lit_cka.plots.html_page import html_page

_SCRIPTS = ("dom.js", "canvas.js", "scatter.js", "heatmap.js", "map.js", "controls.js")

Matrix = tuple[NDArray[np.float64], list[str], list[str]]


@dataclass(frozen=True)
class MapPoint:
    """A layer of a model on a dataset."""

    model: str
    dataset: str
    layer: str
    depth: int  # index of the layer in its model
    position: tuple[float, float, float]  # kernel-PCA coordinates


def write_map(
    path: str | os.PathLike[str],
    points: Sequence[MapPoint],
    *,
    title: str,
    explained: Sequence[float],
    cka: NDArray[np.float64],
    matrices: Mapping[str, Matrix] = {},
    notes: Mapping[str, str] = {},
    tables: Mapping[str, Sequence[Mapping[str, str | float]]] = {},
    explanations: Mapping[str, str] = {},
) -> Path:
    """Write the map, whole or not at all: a page that opens from the file system, without a server or a network.

    Points can be filtered, coloured by dataset or model, selected, and reached with the mouse or the keyboard; each
    says its CKA with, and its distance to, the same layer on the other datasets and the selected point. The pair links
    join the same model and layer in different datasets, the depth lines the layers of one model on one dataset.

    Args:
        path: of the file; its folder is made where it is missing.
        points: at least one; those without finite coordinates are left out, and the page says which.
        title: of the page.
        explained: share of the variance in [0, 1] of each of the three coordinates; NaN where it is undefined.
        cka: (points, points), of all pairs; NaN where it is undefined.
        matrices: by the name of their tab, `(values, row names, column names)`; the colours always span [0, 1].
        notes: texts by label, shown below the map.
        tables: rows by title; the columns are all the keys, in the order in which they occur.
        explanations: a sentence by the name of a column, or by what a row's first cell says, on hover.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw, a point is there twice, or shapes and names don't fit each other.
    """
    content = _content(points, title, explained, cka, matrices, notes, tables)
    content["explanations"] = dict(explanations)
    return write_bytes(path, html_page("map.html", "map.css", _SCRIPTS, title=title, data=content))


def _content(
    points: Sequence[MapPoint],
    title: str,
    explained: Sequence[float],
    cka: NDArray[np.float64],
    matrices: Mapping[str, Matrix],
    notes: Mapping[str, str],
    tables: Mapping[str, Sequence[Mapping[str, str | float]]],
) -> dict[str, Any]:
    """Returns what the page's script reads."""
    cka = np.asarray(cka, dtype=np.float64)
    positions = _positions(points)
    if cka.shape != (len(points), len(points)):
        raise ValueError(f"Expected `cka` of shape {(len(points),) * 2}, points by points, but got {cka.shape}.")
    if len(explained) != 3:
        raise ValueError(f"Expected `explained` to have one share for each of 3 coordinates, but got {len(explained)}.")
    drawn = np.asarray(np.isfinite(positions).all(axis=1))
    if not drawn.any():
        raise ValueError(f"Expected `points` with finite coordinates, but none of the {len(points)} has them.")
    shown = [point for point, draw in zip(points, drawn, strict=True) if draw]
    models, datasets = _distinct(point.model for point in shown), _distinct(point.dataset for point in shown)
    return {
        "title": title,
        "explained": [_number(share) for share in explained],
        "models": models,
        "datasets": datasets,
        "points": [
            {
                "model": models.index(point.model),
                "dataset": datasets.index(point.dataset),
                "layer": point.layer,
                "depth": int(point.depth),
                "position": [float(coordinate) for coordinate in point.position],
            }
            for point in shown
        ],
        "cka": _base64(cka[np.ix_(drawn, drawn)]),
        "leftOut": [
            f"{point.layer} · {point.dataset} · {point.model}"
            for point, draw in zip(points, drawn, strict=True)
            if not draw
        ],
        "matrices": [_matrix(name, *matrix) for name, matrix in matrices.items()],
        "notes": list(notes.items()),
        "tables": [_table(name, rows) for name, rows in tables.items()],
        "colormap": _viridis(),
    }


def _positions(points: Sequence[MapPoint]) -> NDArray[np.float64]:
    """Returns the coordinates of the points (points, 3), once they are known to be points."""
    if not points:
        raise ValueError("Expected `points` to have at least one point, but got none.")
    (key, times), *_ = Counter((point.model, point.dataset, point.layer) for point in points).most_common(1)
    if times > 1:
        raise ValueError(f"Expected every (model, dataset, layer) of `points` once, but got {key} {times} times.")
    for point in points:
        if len(point.position) != 3:
            raise ValueError(
                f"Expected each of `points` to have 3 coordinates, but layer {point.layer!r} of {point.model!r} on "
                f"{point.dataset!r} has {len(point.position)}."
            )
    return np.array([point.position for point in points], dtype=np.float64)


def _matrix(name: str, values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise ValueError(
            f"Expected the values of matrix {name!r} to have a row for each of {len(rows)} row names and a column for "
            f"each of {len(columns)} column names, and at least one of each, but got shape {values.shape}."
        )
    return {"name": name, "rows": list(rows), "columns": list(columns), "values": _base64(values)}


def _table(name: str, rows: Sequence[Mapping[str, str | float]]) -> dict[str, Any]:
    columns = _distinct(column for row in rows for column in row)
    cells = [[row.get(column, "") for column in columns] for row in rows]
    return {
        "name": name,
        "columns": columns,
        "rows": [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in cells],
    }


def _distinct(names: Any) -> list[str]:
    """Returns every name once, in the order in which they occur."""
    return list(dict.fromkeys(names))


def _number(value: float) -> float | None:
    """Returns the number, or None where JSON has none: NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def _base64(values: NDArray[np.float64]) -> str:
    """Returns the values as little-endian float32 in base64: a third of the size of decimals, and with NaN."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _viridis() -> list[str]:
    """Returns the colours of the figures that matplotlib draws."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in colormaps["viridis"](np.arange(256))]
