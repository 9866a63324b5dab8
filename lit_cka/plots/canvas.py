"""What all figures share: axes to draw on, and files to write. Matplotlib's global state is never touched."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".pdf", ".svg")


def new_axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes given, with their figure; or those of a new figure of this size in inches."""
    if ax is not None:
        return cast("Figure", ax.get_figure(root=True)), ax
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def new_figure(width: float, height: float) -> Figure:
    """Of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], formats: Sequence[str] = ()) -> list[Path]:
    """Write a figure to `path`, or to that path with each of the `formats` (".png", ".pdf", ".svg"); whole or not.

    Raises:
        ValueError: if a format is another.
    """
    path = Path(path)
    suffixes = formats or [path.suffix]
    for suffix in suffixes:
        if suffix not in _SUFFIXES:
            raise ValueError(f"Expected a figure's format to be one of {', '.join(_SUFFIXES)}, but got {suffix!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _take_literally(figure)
    written = []
    for suffix in suffixes:
        target = path.with_name(path.name + suffix) if formats else path
        partial = target.with_name(f".{target.name}.partial")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in any script
                figure.savefig(partial, format=suffix[1:], dpi=150)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        written.append(target)
    return written


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as an image (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    _take_literally(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    return pixels


def _take_literally(figure: Figure) -> None:
    """Names may hold dollars, and are no formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def wrapped(text: str, inches: float, size: int = 10) -> str:
    """The text in lines that fit into a width, at a font size in points; "n = 5" stays in one."""
    lines = textwrap.wrap(text.replace(" = ", "\xa0=\xa0"), max(int(inches * 100 / size), 16))
    return "\n".join(lines).replace("\xa0", " ")


def width_of(ax: Axes) -> float:
    """In inches, before the layout is final."""
    return float(ax.bbox.width / cast("Figure", ax.get_figure(root=True)).dpi)


def short_names(names: Sequence[str], longest: int = 24) -> list[str]:
    """The names without what all begin with, up to a dot; those still too long are cut in the middle.

    Example:
        >>> short_names(["model.blocks.0", "model.blocks.1"])
        ['blocks.0', 'blocks.1']
    """
    segments = [name.split(".") for name in names]
    different = [len(set(level)) > 1 for level in zip(*segments, strict=False)]
    common = different.index(True) if True in different else len(different)
    # The last segment that all share stays: it says what the numbers count.
    shortened = [".".join(part[max(common - 1, 0) :]) for part in segments]
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in shortened]
    # A label that another layer has too would say nothing.
    return [whole if cut.count(name) > 1 else name for whole, name in zip(shortened, cut, strict=True)]
