"""The updates of a model's weights, matrix by matrix: `spectra_by_depth` and `updates_by_layer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lit_cka.plots.canvas import (
    OKABE_ITO,
    cut_names,
    new_axes,
    new_figure,
    short_names,
    spread_ticks,
    width_of,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = tuple(OKABE_ITO.values())
_OTHERS = "0.55"  # the grey of matrices outside the numbered layers, or of a role of their own
_LEAST = 1e-5  # of the largest singular value: what is below is not drawn
_POINTS = 200  # of a curve
_NAMED = 40  # matrices, up to which each has a label; of more, each layer


def spectra_by_depth(
    spectra: Mapping[str, ArrayLike], *, title: str = "", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draws `s_i / s_1` over `i` on logarithmic axes, a curve for each matrix, from the first layers (dark) to the last
    (light). A matrix of rank r falls off after r; one whose directions all count alike stays flat.

    Args:
        spectra: singular values (m,), descending, by the name of the matrix; layers are told by the numbers in it, and
            a name without one is drawn in grey.
        title: of the axes.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: if there are none, or one has no positive value.

    Example:
        >>> figure, ax = spectra_by_depth({f"blocks.{layer}.fc.weight": [2.0, 1.0, 0.1] for layer in range(2)})
        >>> ax.get_xscale()
        'log'
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if not spectra:
        raise ValueError("Expected `spectra` of one matrix at least, but got none.")
    figure, ax = new_axes(ax, 7.2, 4.2)
    layers = sorted({layer for name in spectra if (layer := _layer(name))})
    colors = colormaps["viridis"](np.linspace(0, 0.92, max(len(layers), 2)))
    for name, values in spectra.items():
        s = np.asarray(values, dtype=np.float64)
        if not (s.ndim == 1 and s.size and s[0] > 0):
            raise ValueError(f"Expected singular values (m,) of {name!r}, the largest first, but got {s}.")
        places = np.unique(np.geomspace(1, len(s), _POINTS).round().astype(int))
        shares = s[places - 1] / s[0]
        shown = int((shares >= _LEAST).sum()) + 1  # the first of those below is where the curve leaves the picture
        layer = _layer(name)
        color = colors[layers.index(layer)] if layer else _OTHERS
        ax.plot(
            places[:shown], shares[:shown].clip(_LEAST), color=color, alpha=0.75, linewidth=1, marker="o", markersize=2,
            markevery=[0], linestyle="-" if layer else "--",
        )  # fmt: skip
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="number of the singular value, the largest first",
        ylabel="singular value, share of the first",
    )
    ax.set_ylim(bottom=_LEAST)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_plain)
    ax.set_title(wrapped(title, width_of(ax)), fontsize=10)
    ax.grid(color="0.92")
    if layers:
        numbered = [name for name in spectra if _layer(name)]
        ends = [
            next(_beginning(name) for name in numbered if _layer(name) == layer) for layer in (layers[0], layers[-1])
        ]
        scale = ScalarMappable(Normalize(0, max(len(layers) - 1, 1) / 0.92), "viridis")
        bar = figure.colorbar(
            scale, ax=ax, pad=0.02, label="depth" + " (dashed: no layer's number)" * (len(numbered) < len(spectra))
        )
        bar.ax.set_ylim(0, max(len(layers) - 1, 1))
        bar.set_ticks([0, max(len(layers) - 1, 1)], labels=cut_names(ends, 24))
    return figure, ax


def updates_by_layer(
    names: Sequence[str], relative_change: ArrayLike, rank_share: ArrayLike, *, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """Draws how far each matrix moved, and below it how many directions its update has; a colour for each role, such as
    the query projections of all layers.

    Args:
        names: of the matrices, in the order of the network; those that are the same but for numbers have one role.
        relative_change: `||Delta||_F / ||W0||_F` (matrices,), drawn on a logarithmic axis.
        rank_share: effective rank over the largest possible one (matrices,), in [0, 1].
        title: of the figure.

    Raises:
        ValueError: if there are no names, or another number of values.

    Example:
        >>> names = [f"blocks.{layer}.fc.weight" for layer in range(3)]
        >>> figure, axes = updates_by_layer(names, [0.01, 0.02, 0.04], [0.5, 0.4, 0.3])
        >>> len(axes)
        2
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    changes, shares = (np.asarray(values, dtype=np.float64) for values in (relative_change, rank_share))
    if not len(names) or not changes.shape == shares.shape == (len(names),):
        raise ValueError(
            f"Expected values for each of {len(names)} matrices, one at least, but got {changes.shape} and "
            f"{shares.shape}."
        )
    figure = new_figure(min(max(0.16 * len(names) + 3.6, 6.4), 13), 5.6)
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    places, roles = np.arange(len(names)), np.array([_role(name) for name in names])
    common = [role for role, number in Counter(roles.tolist()).most_common(len(_COLORS)) if number > 1]
    labels = dict(zip(common, _role_names(common), strict=True))
    for role in [*common, None]:
        chosen = roles == role if role is not None else ~np.isin(roles, common)
        if not chosen.any():
            continue
        color, label = (_OTHERS, "others") if role is None else (_COLORS[common.index(role)], labels[role])
        for each, values in zip(axes, (changes, shares), strict=True):
            (line,) = each.plot(
                places[chosen], values[chosen], "o-", markersize=3.5, linewidth=1, color=color, label=label
            )
            line.set_linestyle("none" if role is None else "-")
    axes[0].set(yscale="log", ylabel="relative change")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(_plain)
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set(ylabel="effective rank,\nshare of the largest", ylim=(-0.03, 1.03))
    labelled = _labels(names)
    ticks = [list(labelled)[index] for index in spread_ticks(len(labelled), 30)]
    axes[1].set_xticks(ticks, [labelled[tick] for tick in ticks], fontsize=7, rotation=90)
    for each in axes:
        each.grid(axis="y", color="0.92")
    if common:
        axes[0].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(wrapped(title, figure.get_figwidth()), fontsize=10)
    return figure, axes


def _layer(name: str) -> tuple[int, ...]:
    """Returns the numbers in a dotted name; () for one without."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _labels(names: Sequence[str]) -> dict[int, str]:
    """Returns labels by place: of each matrix, or of the first of each layer where there are many."""
    if len(names) <= _NAMED:
        return dict(enumerate(short_names(names, 32)))
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        first.setdefault(_beginning(name) if _layer(name) else name, place)
    return dict(zip(first.values(), short_names(list(first), 32), strict=True))


def _plain(value: float, _: object) -> str:
    """Returns a tick's label without formulas, which figures of names don't have."""
    return f"{value:g}"


def _beginning(name: str) -> str:
    """Returns a name up to its last number."""
    parts = name.split(".")
    last = max(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: last + 1])


def _role(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _role_names(roles: Sequence[str]) -> list[str]:
    """Returns the roles without what all begin or end with."""
    ends_alike = all(role.endswith(".weight") for role in roles)
    shown = short_names([role.removesuffix(".weight") if ends_alike else role for role in roles], 30)
    return [name.removeprefix("#.") for name in shown] if all(name.startswith("#.") for name in shown) else shown
