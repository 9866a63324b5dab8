"""Pictures of a study of edits: gains with intervals, side by side, and checkpoint by checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_cka.plots.canvas import OKABE_ITO, cut_names, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AWAY = {-1: OKABE_ITO["vermilion"], 0: "0.45", 1: OKABE_ITO["blue"]}


def interval_panels(
    names: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    xlabel: str = "",
    title: str = "",
) -> tuple[Figure, list[Axes]]:
    """Draws an estimate with its interval for each name, the first on top, in panels side by side. What lies right of 0
    with its whole interval is blue, left of it red, all else grey.

    Args:
        names: of the rows.
        panels: by the title of the panel, `(estimate, low, high)` of each row; None, or NaN, for nothing.
        xlabel: what the numbers are.
        title: of the figure.

    Raises:
        ValueError: if a panel has another number of rows.

    Example:
        >>> figure, axes = interval_panels(["monosoup", "trim"], {"gain": [(1.0, 0.5, 1.5), None]})
        >>> len(axes)
        1
    """
    for each, values in panels.items():
        if len(values) != len(names):
            raise ValueError(f"Expected {len(names)} rows in the panel {each!r}, but got {len(values)}.")
    figure = new_figure(1.8 + 2.9 * len(panels), 1.5 + 0.28 * len(names))
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)))
    for ax, (label, values) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color="0.3", linewidth=0.8, zorder=1)
        for place, value in enumerate(values):
            if value is None or math.isnan(value[0]):
                continue
            estimate, low, high = value
            color = _AWAY[0 if not low * high > 0 else 1 if low > 0 else -1]
            if not math.isnan(low):
                ax.plot([low, high], [place, place], color=color, linewidth=1.6, zorder=2)
            ax.plot([estimate], [place], "o", color=color, markersize=4.5, zorder=3)
        ax.set_title(wrapped(label, 2.6, 9), fontsize=9)
        ax.set_xlabel(wrapped(xlabel, 2.6, 9), fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", color="0.92")
    axes[0].set_yticks(range(len(names)), cut_names(names, 28), fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(wrapped(title, figure.get_figwidth()), fontsize=10)
    return figure, axes


def by_checkpoint(
    names: Sequence[str], values: Sequence[Sequence[float]], *, xlabel: str = "", title: str = ""
) -> tuple[Figure, Axes]:
    """Draws a dot for each checkpoint in the row of each edit, the first on top, and a bar at their mean.

    Args:
        names: of the rows.
        values: of each row, one for each checkpoint.
        xlabel: what they are.
        title: of the axes.

    Example:
        >>> figure, ax = by_checkpoint(["monosoup", "trim"], [[1.0, 2.0], [0.5, -0.5]], xlabel="gain")
        >>> ax.get_xlabel()
        'gain'
    """
    figure = new_figure(6.6, 1.4 + 0.3 * len(names))
    ax = figure.add_subplot()
    ax.axvline(0, color="0.3", linewidth=0.8, zorder=1)
    for place, row in enumerate(values):
        # Those that would hide each other are a little apart, always in the same way.
        offsets = 0.22 * np.sin(2.4 * np.arange(len(row)))
        ax.scatter(row, place + offsets, s=14, color=OKABE_ITO["blue"], alpha=0.55, linewidth=0, zorder=2)
        ax.plot([np.mean(row)] * 2, [place - 0.32, place + 0.32], color="black", linewidth=1.6, zorder=3)
    ax.set_yticks(range(len(names)), cut_names(names, 28), fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(wrapped(xlabel, 5, 9), fontsize=9)
    ax.set_title(wrapped(title, 5, 10), fontsize=10)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="0.92")
    return figure, ax
