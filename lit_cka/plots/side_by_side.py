"""Several matrices next to each other: `side_by_side`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_cka.plots.canvas import new_axes, new_figure, wrapped
from lit_cka.plots.heatmap import beyond, heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def side_by_side(
    matrices: Mapping[str, tuple[NDArray[np.float64], Sequence[str], Sequence[str]]],
    *,
    label: str = "CKA",
    limits: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    ax: Sequence[Axes] | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Draws heatmaps in one row, with one colour bar for all.

    Args:
        matrices: values, row names and column names by title.
        label: what the values are.
        limits: of the colours.
        title: of the figure.
        ax: axes to draw on, one for each matrix; None for a new figure.
        options: for every `heatmap`.

    Raises:
        ValueError: if there is no matrix, or another number of axes.
    """
    if not matrices:
        raise ValueError("Expected `matrices` to hold at least one matrix, but it is empty.")
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    sizes = [np.shape(values) for values, _, _ in matrices.values()]
    widths = [max(0.4 * columns, 2.4) for _, columns in sizes]
    if ax is None:
        height = max(0.36 * max(rows for rows, _ in sizes), 2.2) + 1.2
        figure = new_figure(sum(widths) + 0.9 * len(widths) + 1.0, height)
        axes: list[Axes] = list(figure.subplots(1, len(matrices), squeeze=False, width_ratios=widths)[0])
    else:
        axes = list(ax)
        if len(axes) != len(matrices):
            raise ValueError(f"Expected `ax` to hold {len(matrices)} axes, one for each matrix, but got {len(axes)}.")
        figure, _ = new_axes(axes[0], 0, 0)
    for each, (name, (values, rows, columns)) in zip(axes, matrices.items(), strict=True):
        heatmap(values, rows, columns, title=name, limits=limits, colorbar=False, ax=each, **options)
    extend = beyond([np.asarray(values) for values, _, _ in matrices.values()], limits)
    figure.colorbar(ScalarMappable(Normalize(*limits), "viridis"), ax=axes, label=label, pad=0.02, extend=extend)
    if title:
        figure.suptitle(wrapped(title, figure.get_figwidth(), 11), fontsize=11)
    return figure, axes
