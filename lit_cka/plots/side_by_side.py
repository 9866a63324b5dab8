"""Several matrices next to each other: `side_by_side`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_cka.plots.heatmap import heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def side_by_side(
    matrices: Mapping[str, tuple[NDArray[np.float64], Sequence[str], Sequence[str]]],
    *,
    label: str = "CKA",
    limits: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Heatmaps in one row, with one colour bar for all.

    Args:
        matrices: values, row names and column names by title.
        label: what the values are.
        limits: of the colours.
        title: of the figure.
        options: for every `heatmap`.

    Raises:
        ValueError: if there is no matrix.
    """
    if not matrices:
        raise ValueError("Expected `matrices` to hold at least one matrix, but it is empty.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    sizes = [values.shape for values, _, _ in matrices.values()]
    widths = [max(0.4 * columns, 2.4) for _, columns in sizes]
    figure = Figure(
        figsize=(sum(widths) + 0.9 * len(widths) + 1.0, max(0.36 * max(rows for rows, _ in sizes), 2.2) + 1.2),
        layout="constrained", dpi=100,
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(1, len(matrices), squeeze=False, width_ratios=widths)[0])
    for ax, (name, (values, rows, columns)) in zip(axes, matrices.items(), strict=True):
        heatmap(values, rows, columns, title=name, limits=limits, colorbar=False, ax=ax, **options)
    figure.colorbar(ScalarMappable(Normalize(*limits), "viridis"), ax=axes, label=label, pad=0.02)
    figure.suptitle(title, fontsize=11)
    return figure, axes
