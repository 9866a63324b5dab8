"""A matrix of similarities as a picture: `heatmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lit_cka.plots.canvas import (
    UNDEFINED,
    check_colormap,
    check_depth,
    last_segments,
    new_axes,
    short_names,
    spread_ticks,
    undefined_note,
    width_of,
    wrapped,
)
from lit_cka.plots.svg_theme import ON_DARK, ON_LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ANNOTATED = 320  # cells, up to which the numbers fit
_LIGHT = 0.54  # luminance, from which on black is easier to read than white


def heatmap(
    values: NDArray[np.float64],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    label: str = "CKA",
    limits: tuple[float, float] = (0.0, 1.0),
    annotate: bool | None = None,
    annot_fmt: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    mask_upper: bool = False,
    layer_name_depth: int | None = None,
    cmap: str = "viridis",
    first_row: Literal["top", "bottom"] = "top",
    colorbar: bool = True,
    figsize: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws a heatmap with one row and one column per name, its colours the same in every figure.

    Args:
        values: (rows, columns); NaN and masked cells are left grey, those beyond the limits have the colour there,
            and the colour bar an arrow.
        row_names: labels; what all begin with is left out, unless `layer_name_depth` says what is shown.
        column_names: the same for the columns.
        title: of the axes.
        xlabel: what the columns are.
        ylabel: what the rows are.
        label: what the values are.
        limits: of the colours, [0, 1] by default so that two pictures compare.
        annotate: write the numbers into the cells; None where they fit.
        annot_fmt: of these numbers, a format such as ".3f"; None for two digits, and three where two would round a
            value below 1 to 1.
        mask: (rows, columns), true for cells to leave out.
        mask_upper: leave out what is above the diagonal of a square matrix, which of a model with itself says nothing
            new.
        layer_name_depth: show so many of the last dotted segments of each name, more where two names end alike.
        cmap: matplotlib's name of the colours.
        first_row: "top" or "bottom".
        colorbar: draw one.
        figsize: width and height of the new figure, in inches; None to fit the matrix.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: if names, values and mask don't fit each other, or there are none, the upper half of a matrix that
            is not square is to be left out, a format, depth or colour map is none, or `figsize` comes with `ax`.

    Example:
        >>> names = ["blocks.0", "blocks.1"]
        >>> figure, ax = heatmap(np.eye(2), names, names, ylabel="before", xlabel="after")
        >>> ax.get_ylabel()
        'before'
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(row_names), len(column_names)):
        raise ValueError(
            f"Expected `values` of shape {(len(row_names), len(column_names))}, one for each pair of names, but got "
            f"{values.shape}."
        )
    if not values.size:
        raise ValueError("Expected `values` of at least one row and one column, but got none.")
    if mask is not None and np.shape(mask) != values.shape:
        raise ValueError(f"Expected `mask` of the shape of `values`, {values.shape}, but got {np.shape(mask)}.")
    check_heatmap_options(annot_fmt, cmap, layer_name_depth)
    if figsize is not None and ax is not None:
        raise ValueError("Expected either `figsize`, of a new figure, or `ax`, whose figure has a size, but got both.")
    rows, columns = (
        short_names(names) if layer_name_depth is None else last_segments(names, layer_name_depth)
        for names in (row_names, column_names)
    )
    num_rows, num_columns = values.shape
    shown = np.where(mask, np.nan, values) if mask is not None else values
    if mask_upper:
        shown = np.where(_above_diagonal(values), np.nan, shown)
    annotate = values.size <= _ANNOTATED and num_columns <= 24 if annotate is None else annotate
    cell = 0.46 if annotate else 0.3
    grid_width, grid_height = min(max(cell * num_columns, 2.6), 9), min(max(0.34 * num_rows, 1.4), 9)
    width = grid_width + 0.075 * max(map(len, rows), default=1) + 1.5
    longest = max(map(len, columns), default=1)
    height = grid_height + 0.9 + 0.06 * longest
    figure, ax = new_axes(ax, *(figsize or (width, height)))
    ax.set_facecolor(UNDEFINED)
    image = ax.imshow(shown, vmin=limits[0], vmax=limits[1], cmap=cmap, aspect="auto")
    if first_row == "bottom":
        ax.invert_yaxis()
    row_ticks = spread_ticks(num_rows, 40)
    column_ticks = spread_ticks(num_columns, 40)
    ax.set_yticks(row_ticks, [rows[index] for index in row_ticks], fontsize=8)
    ax.set_xticks(column_ticks, [columns[index] for index in column_ticks], fontsize=8)
    if longest * len(column_ticks) * 0.075 > grid_width:
        ax.tick_params(axis="x", labelrotation=90)
    ax.set(xlabel=wrapped(xlabel, width_of(ax)), ylabel=wrapped(ylabel, grid_height))
    ax.set_title(wrapped(title, width_of(ax)), fontsize=10)
    if annotate:
        for (row, column), value in np.ndenumerate(shown):
            if value == value:
                red, green, blue, _ = image.cmap(image.norm(value))
                is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue <= _LIGHT
                text = _number(value, annot_fmt)
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=ON_DARK if is_dark else ON_LIGHT)
    if colorbar:
        figure.colorbar(image, ax=ax, label=label + undefined_note(values), pad=0.02, extend=beyond([shown], limits))
    return figure, ax


def _above_diagonal(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    num_rows, num_columns = values.shape
    if num_rows != num_columns:
        raise ValueError(f"Expected a square matrix for `mask_upper`, but got `values` of shape {values.shape}.")
    return np.triu(np.ones(values.shape, dtype=bool), k=1)


def check_heatmap_options(annot_fmt: str | None, cmap: str, layer_name_depth: int | None) -> None:
    """Raise a ValueError if one of these options of `heatmap` is none."""
    check_colormap(cmap)
    check_depth(layer_name_depth)
    try:
        f"{0.5:{annot_fmt or ''}}"
    except ValueError as error:
        raise ValueError(
            f"Expected `annot_fmt` to be a number's format, such as '.2f', but got {annot_fmt!r}."
        ) from error


def _number(value: float, annot_fmt: str | None) -> str:
    if annot_fmt is not None:
        return f"{value:{annot_fmt}}"
    # Plus 0: there is no "-0.00".
    return f"{round(value, 2) + 0.0:.2f}" if value < 0.995 or value >= 1 else f"{value:.3f}"


def beyond(matrices: Sequence[NDArray[np.float64]], limits: tuple[float, float]) -> str:
    """Returns at which ends of a colour bar there are values beyond: "neither", "min", "max" or "both"."""
    low = any((matrix < limits[0] - 1e-9).any() for matrix in matrices)
    high = any((matrix > limits[1] + 1e-9).any() for matrix in matrices)
    return "both" if low and high else "min" if low else "max" if high else "neither"
