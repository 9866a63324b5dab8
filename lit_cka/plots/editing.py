"""Pictures of an edit: its coefficients layer by layer, and what the variants are worth."""

from __future__ import annotations

import math
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
    "shrink": ("0.45", "X"),
    "shrink_global": ("0.45", "x"),
    "dg_hard": (OKABE_ITO["orange"], "p"),
    "trim": (OKABE_ITO["vermilion"], "d"),
    "dare": (OKABE_ITO["blue"], "*"),
}
_OTHERS = (("black", "<"), ("blue", ">"), ("green", "h"), ("vermilion", "8"), ("purple", "H"))  # of names not above
_FAR = 2.0  # times the extent of all other points: where a point is farther away, the picture zooms in on the others


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

    Example:
        >>> figure, ax = lambda_figure(["blocks.0.fc.weight", "blocks.1.fc.weight"], [0.9, 0.8], [0.1, 0.2])
        >>> len(ax.lines)
        2
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
    errors: Mapping[str, tuple[float, float]] | None = None,
    front: Sequence[tuple[float, float]] = (),
    xlabel: str = "in-distribution accuracy",
    ylabel: str = "mean accuracy on the shifted sets",
    title: str = "",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws in-distribution against shifted accuracy of every variant; better is up and right.

    Where the pretrained model is far from the fine-tuned one and its like, these are shown large, and all in an inset.

    Args:
        points: `(x, y)` by variant.
        curve: `(alpha, x, y)` of the interpolations between pretrained (0) and finetuned (1), in order of alpha.
        errors: half widths of the intervals of `(x, y)`, by variant; None for no bars.
        front: places to mark by a ring: those on the Pareto front.
        xlabel: what x is.
        ylabel: what y is.
        title: of the axes.
        ax: axes to draw on; None for a new figure.

    Example:
        >>> figure, ax = accuracy_plane({"finetuned": (0.9, 0.5), "monosoup": (0.89, 0.6)})
        >>> ax.get_xlabel()
        'in-distribution accuracy'
    """
    figure, ax = new_axes(ax, 6.6, 4.4)
    zoom = _limits_of_the_others(points, errors or {})
    if zoom is not None:
        inset = ax.inset_axes((0.02, 0.62, 0.32, 0.36))
        _draw_plane(inset, points, curve, {}, is_small=True)
        inset.set_xticks([])
        inset.set_yticks([])
    _draw_plane(ax, points, curve, errors or {}, is_small=False)
    if front:
        x_front, y_front = zip(*front, strict=True)
        ax.scatter(x_front, y_front, s=190, facecolor="none", edgecolor="0.25", linewidth=0.9, zorder=4)
        ax.scatter([], [], s=60, facecolor="none", edgecolor="0.25", linewidth=0.9, label="on the front")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    if zoom is None:
        ax.margins(0.12)
    else:
        ax.set(xlim=zoom[0], ylim=zoom[1])
    legend_beside(ax)
    return figure, ax


def _limits_of_the_others(
    points: Mapping[str, tuple[float, float]], errors: Mapping[str, tuple[float, float]]
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Returns limits for all that is nearer to the fine-tuned than to the pretrained model; None where that one is near
    enough to be shown with them.
    """
    is_finite = all(math.isfinite(value) for place in points.values() for value in place)
    if not {"pretrained", "finetuned"} <= set(points) or not is_finite:
        return None
    others = [name for name in points if _is_nearer(points[name], points["finetuned"], points["pretrained"])]
    limits, is_far = [], False
    for axis in (0, 1):
        low = min(points[name][axis] - errors.get(name, (0, 0))[axis] for name in others)
        high = max(points[name][axis] + errors.get(name, (0, 0))[axis] for name in others)
        extent = max(high - low, 1e-3)
        away = max(low - points["pretrained"][axis], points["pretrained"][axis] - high)
        is_far = is_far or away > _FAR * extent
        # Room above for the inset, which lies in the upper left corner.
        limits.append((low - 0.15 * extent, high + (0.15 if axis == 0 else 0.8) * extent))
    return (limits[0], limits[1]) if is_far else None


def _is_nearer(point: tuple[float, float], here: tuple[float, float], there: tuple[float, float]) -> bool:
    return math.dist(point, here) <= math.dist(point, there)


def _style_of_other(number: int) -> tuple[str, str]:
    color, marker = _OTHERS[number % len(_OTHERS)]
    return OKABE_ITO[color], marker


def _draw_plane(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    curve: Sequence[tuple[float, float, float]],
    errors: Mapping[str, tuple[float, float]],
    *,
    is_small: bool,
) -> None:
    if curve:
        _, x, y = zip(*curve, strict=True)
        ax.plot(x, y, color="0.6", linewidth=1.2, marker=".", markersize=5, label="WiSE-FT", zorder=1)
        for alpha, x_alpha, y_alpha in curve:
            if 0 < alpha < 1 and not is_small:
                ax.annotate(
                    f"{alpha:g}",
                    (x_alpha, y_alpha),
                    xytext=(4, -9),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.4",
                    clip_on=True,
                    annotation_clip=True,
                )
    others = [name for name in points if name not in _STYLES]
    for name, (x_point, y_point) in points.items():
        color, marker = _STYLES[name] if name in _STYLES else _style_of_other(others.index(name))
        size = (150 if marker == "*" else 55) * (0.3 if is_small else 1)
        edge, width = (None, 1.5) if marker == "x" else ("white", 0.6)
        ax.scatter(
            [x_point], [y_point], color=color, marker=marker, s=size, label=name, zorder=3, edgecolor=edge,
            linewidth=width,
        )  # fmt: skip
        if name in errors:
            x_error, y_error = errors[name]
            ax.errorbar([x_point], [y_point], [y_error], [x_error], color=color, alpha=0.45, linewidth=1, zorder=2)
    ax.grid(color="0.92")
