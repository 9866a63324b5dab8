"""Several matrices next to each other: `side_by_side`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_cka.plots.canvas import check_colormap, new_axes, new_figure, wrapped
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
    ncols: int | None = None,
    share_colorbar: bool = True,
    cmap: str = "viridis",
    figsize: tuple[float, float] | None = None,
    ax: Sequence[Axes] | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Draws heatmaps in a row, or in rows of `ncols`, with one colour bar for all.

    Args:
        matrices: values, row names and column names by title.
        label: what the values are.
        limits: of the colours.
        title: of the figure.
        ncols: heatmaps in a row, at most; None for all in one.
        share_colorbar: draw one for all of them; False for one each.
        cmap: matplotlib's name of the colours.
        figsize: width and height of the new figure, in inches; None to fit the matrices.
        ax: axes to draw on, one for each matrix; None for a new figure.
        options: for every `heatmap`.

    Raises:
        ValueError: if there is no matrix, or another number of axes, `ncols` is below 1, or `figsize` or `ncols` come
            with `ax`; and as `heatmap`.

    Example:
        >>> names = ["blocks.0", "blocks.1"]
        >>> matrices = {name: (np.eye(2), names, names) for name in ("BERT", "GPT-2", "both")}
        >>> figure, axes = side_by_side(matrices, ncols=2)
        >>> [ax.get_title() for ax in axes]
        ['BERT', 'GPT-2', 'both']
    """
    if not matrices:
        raise ValueError("Expected `matrices` to hold at least one matrix, but it is empty.")
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    check_colormap(cmap)
    if ncols is not None and ncols < 1:
        raise ValueError(f"Expected `ncols` to be at least 1, but got {ncols}.")
    if ax is None:
        sizes = [np.shape(values) for values, _, _ in matrices.values()]
        figure, axes = _grid(sizes, min(ncols or len(sizes), len(sizes)), figsize)
    else:
        if figsize is not None or ncols is not None:
            raise ValueError("Expected either `ax`, or `figsize` and `ncols` of a new figure, but got both.")
        axes = list(ax)
        if len(axes) != len(matrices):
            raise ValueError(f"Expected `ax` to hold {len(matrices)} axes, one for each matrix, but got {len(axes)}.")
        figure, _ = new_axes(axes[0], 0, 0)
    options = {**options, "label": label, "limits": limits, "cmap": cmap, "colorbar": not share_colorbar}
    for each, (name, (values, rows, columns)) in zip(axes, matrices.items(), strict=True):
        heatmap(values, rows, columns, title=name, ax=each, **options)
    if share_colorbar:
        extend = beyond([np.asarray(values) for values, _, _ in matrices.values()], limits)
        figure.colorbar(ScalarMappable(Normalize(*limits), cmap), ax=axes, label=label, pad=0.02, extend=extend)
    if title:
        figure.suptitle(wrapped(title, figure.get_figwidth(), 11), fontsize=11)
    return figure, axes


def _grid(
    sizes: Sequence[tuple[int, ...]], ncols: int, figsize: tuple[float, float] | None
) -> tuple[Figure, list[Axes]]:
    """Returns a new figure and its axes, one for each matrix of these sizes, row by row; places left over are empty."""
    rows = [sizes[start : start + ncols] for start in range(0, len(sizes), ncols)]
    widths = [max(max(0.4 * row[place][1] for row in rows if place < len(row)), 2.4) for place in range(ncols)]
    heights = [max(max(0.36 * size[0] for size in row), 2.2) for row in rows]
    figure = new_figure(*(figsize or (sum(widths) + 0.9 * ncols + 1.0, sum(heights) + 1.2 * len(rows))))
    places = figure.subplots(len(rows), ncols, squeeze=False, width_ratios=widths, height_ratios=heights).ravel()
    for place in places[len(sizes) :]:
        place.remove()
    return figure, list(places[: len(sizes)])
