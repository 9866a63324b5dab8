"""Pictures of an edit: its coefficients layer by layer, and what the variants are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_cka.plots.canvas import OKABE_ITO, legend_beside, new_axes, spread_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {
    "pretrained": (OKABE_ITO["blue"], "s"),
    "finetuned": (OKABE_ITO["vermilion"], "o"),
    "monosoup": (OKABE_ITO["green"], "*"),
    "highonly": (OKABE_ITO["purple"], "^"),
    "lowonly": (OKABE_ITO["sky blue"], "v"),
    "lines": (OKABE_ITO["orange"], "D"),
    "uniform_soup": (OKABE_ITO["black"], "P"),
}


def lambda_figure(
    names: Sequence[str],
    lambda_high: Sequence[float],
    lambda_low: Sequence[float],
    *,
    title: str = "MonoSoup's weight of each part of the update",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws the coefficients of every edited weight, in the model's order.

    Args:
        names: of the weights; as many are shown as fit.
        lambda_high: of the first directions, in [0, 1].
        lambda_low: of all other directions, in [0, 1].
        title: of the axes.
        ax: axes to draw on; None for a new figure.
    """
    figure, ax = new_axes(ax, min(max(0.2 * len(names) + 1.5, 5), 14), 4.4)
    places = range(len(names))
    for values, label, variant in ((lambda_high, "high", "monosoup"), (lambda_low, "low", "lowonly")):
        color, marker = _STYLES[variant]
        ax.plot(places, values, marker=marker, markersize=4, linewidth=1, color=color, label=f"λ {label}")
    ticks = spread_ticks(len(names), 60)
    ax.set_xticks(ticks, [names[tick] for tick in ticks], rotation=90, fontsize=7)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(-0.7, len(names) - 0.3)
    ax.grid(axis="y", color="0.9")
    ax.set_ylabel("coefficient")
    ax.set_title(title, fontsize=10)
    legend_beside(ax)
    return figure, ax


def accuracy_plane(
    points: Mapping[str, tuple[float, float]],
    curve: Sequence[tuple[float, float, float]] = (),
    *,
    xlabel: str = "in-distribution accuracy",
    ylabel: str = "mean accuracy on the shifted sets",
    title: str = "",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws in-distribution against shifted accuracy of every variant; better is up and right.

    Args:
        points: `(x, y)` by variant.
        curve: `(alpha, x, y)` of the interpolations between pretrained (0) and finetuned (1), in order of alpha.
        xlabel: what x is.
        ylabel: what y is.
        title: of the axes.
        ax: axes to draw on; None for a new figure.
    """
    figure, ax = new_axes(ax, 6.6, 4.4)
    if curve:
        _, x, y = zip(*curve, strict=True)
        ax.plot(x, y, color="0.6", linewidth=1.2, marker=".", markersize=5, label="WiSE-FT", zorder=1)
        for alpha, x_alpha, y_alpha in curve:
            if 0 < alpha < 1:
                ax.annotate(
                    f"{alpha:g}",
                    (x_alpha, y_alpha),
                    xytext=(4, -9),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.4",
                )
    for name, (x_point, y_point) in points.items():
        color, marker = _STYLES.get(name, ("0.3", "X"))
        size = 150 if marker == "*" else 55
        ax.scatter(
            [x_point],
            [y_point],
            color=color,
            marker=marker,
            s=size,
            label=name,
            zorder=3,
            edgecolor="white",
            linewidth=0.6,
        )
    ax.grid(color="0.92")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    ax.margins(0.12)
    legend_beside(ax)
    return figure, ax
