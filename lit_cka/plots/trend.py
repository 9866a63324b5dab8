"""Curves over layers or over time: `layer_trend`, `epoch_trend`, `probe_figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lit_cka.plots.canvas import OKABE_ITO, legend_beside, new_axes, short_names, spread_ticks, width_of, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = tuple(OKABE_ITO.values())
_MARKERS = "osD^vPX"


def layer_trend(
    curves: Mapping[str, ArrayLike],
    layer_names: Sequence[str],
    *,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    title: str = "",
    xlabel: str = "layer",
    ylabel: str = "CKA",
    limits: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws one curve or several over the layers of a network, with bands for intervals.

    Args:
        curves: values (layers,) by name; NaN leaves a gap.
        layer_names: labels; what all begin with is left out.
        bands: lower and upper ends (layers,) by the names of curves.
        title: of the axes.
        xlabel: what the places are.
        ylabel: what the values are.
        limits: of the value axis, [0, 1] by default so that two pictures compare; None to fit the values.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: if a curve or band has another number of values than there are layers, there are none, or a band
            has no curve.

    Example:
        >>> bands = {"CKA": ([0.8, 0.3], [0.95, 0.5])}
        >>> figure, ax = layer_trend({"CKA": [0.9, 0.4]}, ["blocks.0", "blocks.1"], bands=bands)
        >>> len(ax.lines)
        1
    """
    if not len(layer_names) or not curves:
        raise ValueError(f"Expected a curve and a layer at least, but got {len(curves)} and {len(layer_names)}.")
    if unknown := sorted(set(bands or {}) - set(curves)):
        raise ValueError(f"Expected bands for {', '.join(map(repr, curves))}, but got one for {unknown[0]!r}.")
    figure, ax = new_axes(ax, min(max(0.42 * len(layer_names) + 2.4, 4.6), 13), 3.8)
    places = np.arange(len(layer_names))
    for number, (name, values) in enumerate(curves.items()):
        values = np.asarray(values, dtype=np.float64)
        ends = [np.asarray(end, dtype=np.float64) for end in (bands or {}).get(name, ())]
        for array in (values, *ends):
            if array.shape != places.shape:
                raise ValueError(f"Expected {len(places)} values for {name!r}, one a layer, but got {array.shape}.")
        color = _COLORS[number % len(_COLORS)]
        ax.plot(places, values, color=color, marker=_MARKERS[number % len(_MARKERS)], markersize=4.5, label=name)
        if ends:
            ax.fill_between(places, ends[0], ends[1], color=color, alpha=0.2, linewidth=0)
    _label_places(ax, short_names(layer_names))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if limits is not None:
        low, high = limits
        margin = 0.03 * (high - low)
        ax.set_ylim(low - margin, high + margin)
    ax.set_title(wrapped(title, width_of(ax)), fontsize=10)
    ax.grid(axis="y", color="0.92")
    if len(curves) > 1:
        ax.legend(frameon=False, fontsize=8)
    return figure, ax


def epoch_trend(
    values: ArrayLike,
    layer_names: Sequence[str],
    times: Sequence[float],
    *,
    bands: tuple[ArrayLike, ArrayLike] | None = None,
    title: str = "",
    xlabel: str = "optimizer step",
    ylabel: str = "CKA",
    limits: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a curve for every layer over the time of a training, from the first layer (dark) to the last (light).

    Args:
        values: (layers, times).
        layer_names: for the legend, as many as fit.
        times: of the measurements.
        bands: lower and upper ends of intervals, (layers, times) each; NaN where there are none.
        title: of the axes.
        xlabel: what the times are.
        ylabel: what the values are.
        limits: of the value axis; None to fit the values.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: if `values` or `bands` don't have a row for each layer and a column for each time, or there is none.

    Example:
        >>> figure, ax = epoch_trend([[1.0, 0.9], [0.8, 0.3]], ["blocks.0", "blocks.1"], [10, 20])
        >>> len(ax.lines)
        2
    """
    from matplotlib import colormaps

    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(layer_names), len(times)):
        raise ValueError(f"Expected values of shape {(len(layer_names), len(times))}, but got {values.shape}.")
    ends = [np.asarray(end, dtype=np.float64) for end in bands or ()]
    if any(end.shape != values.shape for end in ends):
        raise ValueError(f"Expected bands of shape {values.shape}, but got {[end.shape for end in ends]}.")
    if not values.size:
        raise ValueError(f"Expected a layer and a time at least, but got {len(layer_names)} and {len(times)}.")
    figure, ax = new_axes(ax, 6.6, 3.8)
    colors = colormaps["viridis"](np.linspace(0, 0.9, max(len(layer_names), 2)))
    named = set(spread_ticks(len(layer_names), 16))
    for index, (name, row) in enumerate(zip(short_names(layer_names), values, strict=True)):
        marker = "o" if len(times) < 30 else None
        ax.plot(times, row, color=colors[index], marker=marker, markersize=3, label=name if index in named else None)
        if ends:
            ax.fill_between(times, ends[0][index], ends[1][index], color=colors[index], alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if limits is not None:
        ax.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
    ax.set_title(wrapped(title, width_of(ax)), fontsize=10)
    ax.grid(axis="y", color="0.92")
    legend_beside(ax, 7)
    return figure, ax


def probe_figure(
    layer_names: Sequence[str],
    cka: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    *,
    errors: tuple[ArrayLike, ArrayLike] | None = None,
    names: tuple[str, str] = ("pretrained", "fine-tuned"),
    title: str = "",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws whether a layer changed (CKA), and whether the change helped (accuracy of a linear probe before and after).

    Args:
        layer_names: labels.
        cka: (layers,).
        before: accuracy (layers,) of the probe on the first model.
        after: accuracy of the probe on the second.
        errors: standard errors of both, drawn as bands.
        names: of the two models; where they are the same, "before" and "after" tell them apart.
        title: of the axes.
        ax: axes to draw on; None for a new figure.

    Example:
        >>> figure, ax = probe_figure(["blocks.0", "blocks.1"], [0.99, 0.4], [0.6, 0.6], [0.6, 0.9])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['CKA of both', 'accuracy, pretrained', 'accuracy, fine-tuned']
    """
    if names[0] == names[1]:
        names = (f"{names[0]} before", f"{names[1]} after")
    curves = {"CKA of both": cka, f"accuracy, {names[0]}": before, f"accuracy, {names[1]}": after}
    bands: dict[str, tuple[ArrayLike, ArrayLike]] = {}
    if errors is not None:
        for name, error in zip(list(curves)[1:], errors, strict=True):
            center, half = np.asarray(curves[name], dtype=np.float64), np.asarray(error, dtype=np.float64)
            bands[name] = (center - half, center + half)
    return layer_trend(curves, layer_names, bands=bands, title=title, ylabel="CKA, accuracy", ax=ax)


def _label_places(ax: Axes, names: Sequence[str]) -> None:
    ticks = spread_ticks(len(names), 40)
    ax.set_xticks(ticks, [names[tick] for tick in ticks], fontsize=8)
    if sum(len(names[tick]) for tick in ticks) > 70:
        ax.tick_params(axis="x", labelrotation=90)
