"""What all figures share: axes to draw on, and files to write. Matplotlib's global state is never touched."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from lit_cka.files import visible, written_whole
from lit_cka.plots.svg_theme import follow_theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart (Okabe & Ito 2008).
OKABE_ITO = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "black": "#000000",
}
UNDEFINED = "0.85"  # the grey of cells without a value

_SUFFIXES = (".png", ".pdf", ".svg")


def new_axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Returns the axes given, with their figure; or those of a new figure of this size in inches."""
    if ax is not None:
        return cast("Figure", ax.get_figure(root=True)), ax
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches, which draws all texts as they are: names are no formulas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure_type()(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure


@cache
def _figure_type() -> type[Figure]:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class LiteralFigure(Figure):
        def draw(self, renderer: RendererBase) -> None:
            for text in self.findobj(Text):
                text.set_parse_math(False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in any script
                super().draw(renderer)

    return LiteralFigure


def save_figure(figure: Figure, path: str | os.PathLike[str], formats: Sequence[str] = ()) -> list[Path]:
    """Write a figure to `path`, or to that path with each of the `formats` (".png", ".pdf", ".svg"); whole or not.
    An SVG follows the light or dark theme of whoever looks at it.

    Raises:
        ValueError: if a format is another.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> figure, ax = new_axes(None, 3, 2)
        >>> with TemporaryDirectory() as folder:
        ...     [path.name for path in save_figure(figure, f"{folder}/one", (".png", ".svg"))]
        ['one.png', 'one.svg']
    """
    path = Path(path)
    suffixes = formats or [path.suffix]
    for suffix in suffixes:
        if suffix not in _SUFFIXES:
            raise ValueError(f"Expected a figure's format to be one of {', '.join(_SUFFIXES)}, but got {suffix!r}.")
    written = []
    for suffix in suffixes:
        target = path.with_name(path.name + suffix) if formats else path
        with written_whole(target) as partial:
            figure.savefig(partial, format=suffix[1:], dpi=150)
            if suffix == ".svg":
                partial.write_text(follow_theme(partial.read_text(encoding="utf-8")), encoding="utf-8")
        written.append(target)
    return written


def figure_pixels(figure: Figure, dpi: float | None = None) -> NDArray[np.uint8]:
    """Returns the figure as an image (height, width, 3), at so many dots per inch, or at those it has.

    Example:
        >>> figure, ax = new_axes(None, 3, 2)
        >>> figure_pixels(figure).shape, figure_pixels(figure, dpi=200).shape
        ((200, 300, 3), (400, 600, 3))
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    if dpi is not None:
        figure.set_dpi(dpi)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    return pixels


def spread_ticks(num_places: int, most: float) -> range:
    """Returns at most so many of the places along an axis, evenly spread from the first on."""
    return range(0, num_places, math.ceil(num_places / most) if num_places else 1)


def legend_beside(ax: Axes, size: int = 8) -> None:
    """Draw the legend to the right of the axes, where it hides nothing; `size` is its font's, in points."""
    ax.legend(frameon=False, fontsize=size, loc="center left", bbox_to_anchor=(1, 0.5))


def undefined_note(values: NDArray[np.float64]) -> str:
    """Returns what a colour bar's label says of undefined values: nothing where there are none."""
    return " (grey: undefined)" if np.isnan(values).any() else ""


def wrapped(text: str, inches: float, size: int = 10) -> str:
    """Returns the text in lines that fit into a width, at a font size in points; "n = 5" stays in one."""
    lines = textwrap.wrap(text.replace(" = ", "\xa0=\xa0"), max(int(inches * 100 / size), 16))
    return "\n".join(lines).replace("\xa0", " ")


def width_of(ax: Axes) -> float:
    """Returns the width of the axes in inches, before the layout is final."""
    return float(ax.bbox.width / cast("Figure", ax.get_figure(root=True)).dpi)


def short_names(names: Sequence[str], longest: int = 24) -> list[str]:
    """Returns the names without what all begin with, up to a dot; those still too long are cut in the middle.

    Example:
        >>> short_names(["model.blocks.0", "model.blocks.1"])
        ['blocks.0', 'blocks.1']
    """
    segments = [name.split(".") for name in names]
    different = [len(set(level)) > 1 for level in zip(*segments, strict=False)]
    common = different.index(True) if True in different else len(different)
    # The last segment that all share stays: it says what the numbers count.
    shortened = [".".join(part[max(common - 1, 0) :]) for part in segments]
    return cut_names(shortened, longest)


def last_segments(names: Sequence[str], depth: int) -> list[str]:
    """Returns the last `depth` dotted segments of each name, or more where names that differ would end alike.

    Raises:
        ValueError: unless `depth` is at least 1.

    Example:
        >>> last_segments(["bert.encoder.layer.0", "bert.encoder.layer.1"], 2)
        ['layer.0', 'layer.1']
        >>> last_segments(["vision.layer.0", "text.layer.0"], 2)
        ['vision.layer.0', 'text.layer.0']
    """
    check_depth(depth)

    def end(name: str, num_segments: int) -> str:
        return ".".join(name.split(".")[-num_segments:])

    shown = []
    for name in names:
        num_segments = depth
        while any(other != name and end(other, num_segments) == end(name, num_segments) for other in names):
            num_segments += 1
        shown.append(visible(end(name, num_segments)))
    return shown


def check_depth(depth: int | None) -> None:
    """Raise a ValueError unless so many segments of a name can be shown; None is for all."""
    if depth is not None and depth < 1:
        raise ValueError(f"Expected `layer_name_depth` to be at least 1, but got {depth}.")


def check_colormap(name: str) -> None:
    """Raise a ValueError unless matplotlib has a colour map of this name."""
    from difflib import get_close_matches

    from matplotlib import colormaps

    if name not in colormaps:
        near = get_close_matches(str(name), list(colormaps), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise ValueError(f"Expected `cmap` to be the name of a colour map of matplotlib, but got {name!r}{hint}")


def cut_names(names: Sequence[str], longest: int) -> list[str]:
    """Returns the names, visible, and in the middle cut to a length, unless two would be the same then.

    Example:
        >>> cut_names(["model.blocks.10", "head"], 9)
        ['mode…s.10', 'head']
    """
    shown = [visible(name) for name in names]
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in shown]
    # A label that another layer has too would say nothing.
    return [whole if cut.count(name) > 1 else name for whole, name in zip(shown, cut, strict=True)]
