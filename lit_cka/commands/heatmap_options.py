"""How `lit-cka compare` draws its matrices: `HeatmapOptions`, and the figures by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_cka import plots
from lit_cka.analysis.comparison import Comparison
from lit_cka.analysis.features import Features
from lit_cka.commands.results import label, limits
from lit_cka.plots.heatmap import check_heatmap_options


@dataclass(frozen=True)
class HeatmapOptions:
    """How the heatmaps look.

    Args:
        mask_upper: leave out what is above the diagonal; None: where a model is compared with itself, whose upper half
            says nothing new.
        annotate: write the numbers into the cells; None: where they fit.
        annot_fmt: of these numbers, a format such as ".3f"; None: two digits.
        cmap: matplotlib's name of the colours.
        figsize: width and height in inches, of each heatmap, and of the figure of all; None: to fit the matrices.
        layer_name_depth: show so many of the last dotted segments of each layer's name; None: all but what all layers'
            names begin with.
        ncols: heatmaps in a row, in the figure of all of several datasets; None: all in one row.

    Raises:
        ValueError: if an option is out of range, or a format or colour map is none.

    Example:
        >>> HeatmapOptions(annot_fmt=".3f", layer_name_depth=2).cmap
        'viridis'
    """

    mask_upper: bool | None = None
    annotate: bool | None = None
    annot_fmt: str | None = None
    cmap: str = "viridis"
    figsize: tuple[float, float] | None = None
    layer_name_depth: int | None = None
    ncols: int | None = None

    def __post_init__(self) -> None:
        check_heatmap_options(self.annot_fmt, self.cmap, self.layer_name_depth)
        if self.figsize is not None and not all(0 < inches < 200 for inches in self.figsize):
            raise ValueError(f"Expected `figsize` of a width and a height in inches, but got {self.figsize}.")
        if self.ncols is not None and self.ncols < 1:
            raise ValueError(f"Expected `ncols` to be at least 1, but got {self.ncols}.")

    def check_layers(self, a: Features, b: Features) -> None:
        """Raise a ValueError if the upper half of a matrix that is not square is to be left out."""
        if self.mask_upper and len(a.layers) != len(b.layers):
            raise ValueError(
                f"Expected models with as many layers for `mask_upper`, but {a.model} has {len(a.layers)} and "
                f"{b.model} "
                f"{len(b.layers)}."
            )

    def of_each(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """Returns the options of `plots.heatmap` for each of these."""
        with_itself = all(comparison.is_with_itself for comparison in comparisons)
        return {
            "mask_upper": with_itself if self.mask_upper is None else self.mask_upper,
            "annotate": self.annotate,
            "annot_fmt": self.annot_fmt,
            "layer_name_depth": self.layer_name_depth,
        }


def matrix_figures(comparison: Comparison, options: HeatmapOptions) -> dict[str, Any]:
    """Returns the heatmaps of one comparison: of the "values" and, where scores are calibrated, of their "excess"."""
    return {
        name: _matrix_figure(comparison, values, options, is_excess=name == "excess")
        for name, values in comparison.arrays().items()
        if name in ("values", "excess")
    }


def _matrix_figure(
    comparison: Comparison, values: NDArray[np.float64], options: HeatmapOptions, *, is_excess: bool
) -> Any:
    figure, _ = plots.heatmap(
        values, comparison.layers_a, comparison.layers_b,
        label="excess over chance" if is_excess else label(comparison),
        title=f"{comparison.model_a} and {comparison.model_b}, {comparison.data}, n = {comparison.num_samples}",
        ylabel=comparison.model_a, xlabel=comparison.model_b, cmap=options.cmap, figsize=options.figsize,
        limits=(0.0, 1.0) if is_excess else limits(comparison), **options.of_each([comparison]),
    )  # fmt: skip
    return figure


def matrices_figure(comparisons: Sequence[Comparison], options: HeatmapOptions) -> Any:
    """Returns the heatmaps of several datasets in one figure, `ncols` in a row, with one colour bar."""
    first = comparisons[0]
    shown = {
        f"{comparison.data}, n = {comparison.num_samples}": (
            comparison.values,
            comparison.layers_a,
            comparison.layers_b,
        )
        for comparison in comparisons
    }
    models = " and ".join(dict.fromkeys([first.model_a, first.model_b]))
    figure, _ = plots.side_by_side(
        shown, title=models, label=label(first), limits=limits(first), ncols=options.ncols, cmap=options.cmap,
        figsize=options.figsize, ylabel=first.model_a, xlabel=first.model_b, **options.of_each(comparisons),
    )  # fmt: skip
    return figure
