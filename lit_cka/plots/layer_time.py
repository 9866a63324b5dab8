"""Similarity of each layer over the time of a training: `layer_time_heatmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_cka.plots.canvas import UNDEFINED, cut_names, new_axes, short_names, spread_ticks, undefined_note
from lit_cka.plots.svg_theme import ON_DARK, ON_LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layer_time_heatmap(
    values: NDArray[np.float64],
    layer_names: Sequence[str],
    times: Sequence[str],
    *,
    title: str = "",
    xlabel: str = "",
    row_notes: Sequence[str] = (),
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a heatmap of CKA in [0, 1]: one row per layer (the first at the bottom), one column per point in time.

    Args:
        values: (layers, times); NaN is left grey, values below 0 (debiased) are drawn as 0.
        layer_names: row labels; what all begin with is left out.
        times: column labels; as many are shown as fit.
        title: of the axes.
        xlabel: what the times are.
        row_notes: a word on each layer, to the right of its row; none by default.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: if names, times and values don't fit each other, or there are none.

    Example:
        >>> figure, ax = layer_time_heatmap(np.array([[1.0, 0.9], [0.8, 0.3]]), ["blocks.0", "blocks.1"], ["10", "20"])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['blocks.0', 'blocks.1']
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(layer_names), len(times)) or not values.size:
        raise ValueError(
            f"Expected `values` of shape {(len(layer_names), len(times))}, one for each layer and time and at least "
            f"one, but got {values.shape}."
        )
    num_layers, num_times = values.shape
    if row_notes and len(row_notes) != num_layers:
        raise ValueError(f"Expected `row_notes` for each of {num_layers} layers, but got {len(row_notes)}.")
    layer_names = short_names(layer_names, 60) if num_layers > 1 else cut_names(layer_names, 60)
    label_width = 0.08 * (max(map(len, layer_names)) + max(map(len, row_notes), default=0))
    grid_width, grid_height = min(max(0.34 * num_times, 3.2), 6.5), min(max(0.4 * num_layers, 2.0), 12)
    figure, axes = new_axes(ax, grid_width + label_width + 1.3, grid_height + 1.0)
    axes.set_facecolor(UNDEFINED)
    image = axes.imshow(values.clip(0, 1), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    rows = spread_ticks(num_layers, 40)
    axes.set_yticks(rows, [layer_names[row] for row in rows], fontsize=9)
    longest = max(map(len, times))
    columns = spread_ticks(num_times, grid_width / (0.08 * longest + 0.12))
    axes.set_xticks(columns, [times[column] for column in columns], fontsize=9)
    axes.set_xlabel(xlabel)
    axes.set_title(title, fontsize=10)
    if num_times <= 12 and num_layers <= 30:
        for (row, column), value in np.ndenumerate(values):
            if value == value:
                color = ON_LIGHT if value > 0.6 else ON_DARK
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, color=color)
    if row_notes:
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(rows, [row_notes[row] for row in rows], fontsize=9)
        beside.tick_params(length=0)
    figure.colorbar(
        image,
        ax=axes,
        label=f"CKA with the reference{undefined_note(values)}",
        pad=0.02,
    )
    return figure, axes
