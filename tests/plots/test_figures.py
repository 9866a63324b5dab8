"""Figures: what is drawn where, with which colours; files whole or not at all; nothing global."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lit_cka import plots
from lit_cka.plots.canvas import spread_ticks, wrapped
from lit_cka.plots.svg_theme import ON_DARK, ON_LIGHT

matplotlib.use("Agg")  # else the first look at the settings imports pyplot to choose
NAMES = ["model.blocks.0", "model.blocks.1", "model.blocks.2"]
VALUES = np.array([[1.0, 0.5], [np.nan, -0.2], [0.25, 1.7]])

FUNCTIONS: dict[str, Callable[..., tuple[Figure, Axes]]] = {
    "heatmap": lambda **options: plots.heatmap(VALUES, NAMES, NAMES[:2], **options),
    "layer_time_heatmap": lambda **options: plots.layer_time_heatmap(VALUES, NAMES, ["10", "20"], **options),
    "layer_trend": lambda **options: plots.layer_trend({"a": [0.1, np.nan, 0.3]}, NAMES, **options),
    "epoch_trend": lambda **options: plots.epoch_trend(VALUES, NAMES, [10, 20], **options),
    "probe_figure": lambda **options: plots.probe_figure(NAMES, [1, 0.9, 0.2], [0.5] * 3, [0.6] * 3, **options),
    "lambda_figure": lambda **options: plots.lambda_figure(NAMES, [0.1] * 3, [0.9] * 3, **options),
    "accuracy_plane": lambda **options: plots.accuracy_plane(
        {"pretrained": (0.1, 0.2), "other": (0.5, 0.6)}, [(0.0, 0.1, 0.2), (0.5, 0.4, 0.5), (1.0, 0.5, 0.6)], **options
    ),
}


@pytest.fixture(autouse=True)
def nothing_global(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without pyplot, and with matplotlib's settings as they were."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def test_no_module_names_pyplot() -> None:
    for path in Path(plots.__file__).parent.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not [node for node in nodes if "pyplot" in ast.unparse(node)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_figure_of_its_own_or_given_axes(name: str, tmp_path: Path) -> None:
    figure, ax = FUNCTIONS[name](title="What it is")
    assert isinstance(figure, Figure)
    assert isinstance(ax, Axes)
    assert ax.figure is figure
    assert ax.get_title() == "What it is"
    assert plots.figure_pixels(figure).std() > 0
    mine = Figure()
    given = mine.subplots(1, 2)
    drawn_on, same = FUNCTIONS[name](ax=given[1])
    assert drawn_on is mine
    assert same is given[1]
    assert not given[0].has_data()
    assert given[1].has_data()
    plots.save_figure(mine, tmp_path / "mine.png")


@pytest.mark.parametrize("part", ["figure", "subfigure"])
def test_axes_in_a_subfigure(part: str) -> None:
    whole = Figure()
    ax = whole.subplots() if part == "figure" else whole.subfigures(1, 2)[0].subplots()
    assert plots.layer_trend({"a": [1.0]}, ["0"], ax=ax)[0] is whole


def test_colours_are_fixed() -> None:
    for values in (VALUES, np.array([[0.4, 0.5], [0.45, 0.41], [0.4, 0.4]])):
        _, ax = plots.heatmap(values, NAMES, NAMES[:2])
        image = ax.get_images()[0]
        assert image.get_clim() == (0, 1)
        assert image.get_cmap().name == "viridis"
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                drawn = image.to_rgba(image.get_array())[row, column]
                np.testing.assert_allclose(drawn, colormaps["viridis"](value), atol=1e-6)
    _, ax = plots.heatmap(VALUES, NAMES, NAMES[:2], limits=(0, 2))
    assert ax.get_images()[0].get_clim() == (0, 2)
    for trend in (plots.layer_trend({"a": [0.4, 0.5, 0.6]}, NAMES), plots.epoch_trend(VALUES, NAMES, [1, 2])):
        assert trend[1].get_ylim() == pytest.approx((-0.03, 1.03))
    low, high = plots.layer_trend({"a": [0.4, 0.5, 0.6]}, NAMES, limits=None)[1].get_ylim()
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7


def cells(ax: Axes) -> np.ndarray:
    image = ax.get_images()[0]
    return np.asarray(image.to_rgba(image.get_array()))


@pytest.mark.parametrize(
    ("values", "extend"),
    [
        ([0.0, 1.0], "neither"),
        ([-0.1, np.nan], "min"),
        ([0.5, 1.2], "max"),
        ([-1.0, 2.0], "both"),
        ([1 + 1e-12], "neither"),
    ],
)
def test_the_colour_bar_says_that_values_lie_beyond(values: list[float], extend: str) -> None:
    matrix, columns = np.array([values]), [f"b{number}" for number in range(len(values))]
    bars = [
        plots.heatmap(matrix, ["a"], columns)[0],
        plots.side_by_side({"one": (np.array([[0.5]]), ["a"], ["b"]), "two": (matrix, ["a"], columns)})[0],
    ]
    for figure in bars:
        (bar,) = {id(ax): ax._colorbar for ax in figure.axes if hasattr(ax, "_colorbar")}.values()
        assert bar.extend == extend
        assert (bar.vmin, bar.vmax) == (0, 1)


def test_undefined_and_masked_cells_are_grey() -> None:
    mask = np.array([[False, True], [False, False], [False, False]])
    figure, ax = plots.heatmap(VALUES, NAMES, NAMES[:2], mask=mask)
    assert ax.get_facecolor() == to_rgba("0.85")
    assert (cells(ax)[..., 3] == np.array([[1, 0], [0, 1], [1, 1]])).all()  # 0: the background shows
    assert sorted(text.get_text() for text in ax.texts) == ["-0.20", "0.25", "1.00", "1.70"]
    assert {tuple(map(round, text.get_position())) for text in ax.texts} == {(1, 1), (0, 2), (0, 0), (1, 2)}
    assert figure.axes[1].get_ylabel() == "CKA (grey: undefined)"
    figure, _ = plots.heatmap(np.nan_to_num(VALUES), NAMES, NAMES[:2], mask=mask)
    assert figure.axes[1].get_ylabel() == "CKA"
    figure, ax = plots.heatmap(np.full((3, 2), np.nan), NAMES, NAMES[:2], colorbar=False)
    assert len(figure.axes) == 1
    assert not ax.texts


def test_numbers_can_be_read_on_their_colours() -> None:
    _, ax = plots.heatmap(np.array([[0.1, 0.95]]), ["a"], ["b", "c"])
    assert [text.get_color() for text in ax.texts] == [ON_DARK, ON_LIGHT]
    assert not plots.heatmap(np.zeros((30, 30)), NAMES * 10, NAMES * 10)[1].texts  # no room
    assert not plots.heatmap(VALUES, NAMES, NAMES[:2], annotate=False)[1].texts
    _, ax = plots.heatmap(np.array([[-0.004, -0.006, 0.996]]), NAMES[:1], NAMES)
    assert [text.get_text() for text in ax.texts] == ["0.00", "-0.01", "0.996"]


def test_names_are_shortened() -> None:
    _, ax = plots.heatmap(VALUES, NAMES, NAMES[:2], xlabel="columns", ylabel="rows")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["blocks.0", "blocks.1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("columns", "rows")
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first at the top
    _, ax = plots.heatmap(VALUES, NAMES, NAMES[:2], first_row="bottom")
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    _, ax = plots.layer_trend({"a": [0.1, 0.2, 0.3]}, NAMES)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["encoder.layer.0.output", "encoder.layer.11.output"], ["layer.0.output", "layer.11.output"]),
        (["a", "b"], ["a", "b"]),
        (["model.a", "other.b"], ["model.a", "other.b"]),
        (["one.two.three"], ["three"]),
        (["embeddings", "layers.0", "layers.1"], ["embeddings", "layers.0", "layers.1"]),
        ([], []),
        (["x" * 30 + "end"], ["x" * 11 + "…" + "x" * 8 + "end"]),
        (["same.name", "same.name"], ["name", "name"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert plots.short_names(names) == short
    assert all(len(name) <= 24 for name in short)


def test_labels_that_would_be_the_same_are_not_cut() -> None:
    names = [f"{part}.layers.{number}.self_attention.output" for part in ("encoder", "decoder") for number in (1, 10)]
    assert len(set(plots.short_names(names))) == 4


def test_long_titles_stay_within_the_figure(tmp_path: Path) -> None:
    title = "pretrained-clip-vit-b32-laion400m and finetuned-on-imagenet-v2, imagenet-val, n = 50000"
    figure, ax = plots.heatmap(np.eye(2), NAMES[:2], NAMES[:2], title=title, ylabel=title[:40])
    plots.save_figure(figure, tmp_path / "long.png")
    plots.figure_pixels(figure)
    for text in (ax.title, ax.yaxis.label):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height


@pytest.mark.slow
def test_many_names_do_not_crowd() -> None:
    names = [f"model.layers.{index}" for index in range(200)]
    figure, ax = plots.heatmap(np.zeros((200, 200)), names, names)
    assert len(ax.get_xticks()) <= 40
    assert len(ax.get_yticks()) <= 40
    assert max(figure.get_size_inches()) < 16
    _, ax = plots.layer_trend({"a": np.zeros(200)}, names)
    assert len(ax.get_xticks()) <= 40
    assert ax.get_xticklabels()[-1].get_text() == "layers.195"
    _, ax = plots.epoch_trend(np.zeros((200, 2)), names, [1, 2])
    assert len(ax.get_legend().get_texts()) <= 16


def test_bands_and_curves() -> None:
    curves = {"one": [0.2, 0.4, np.nan], "two": [0.5, 0.6, 0.7]}
    _, ax = plots.layer_trend(curves, NAMES, bands={"two": ([0.4, 0.5, 0.6], [0.6, 0.8, 0.9])})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), curves["one"])
    (band,) = ax.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert {(0.0, 0.4), (1.0, 0.5), (2.0, 0.6), (0.0, 0.6), (1.0, 0.8), (2.0, 0.9)} <= corners
    assert tuple(band.get_facecolor()[0][:3]) == to_rgba(ax.lines[1].get_color())[:3]


def test_the_probe_figure_has_errors_as_bands() -> None:
    errors = ([0.1] * 3, [0.2] * 3)
    _, ax = plots.probe_figure(NAMES, [1, 0.9, 0.2], [0.5] * 3, [0.6] * 3, errors=errors, names=("old", "new"))
    assert [line.get_label() for line in ax.lines] == ["CKA of both", "accuracy, old", "accuracy, new"]
    assert [tuple(band.get_paths()[0].get_extents().intervaly.round(6)) for band in ax.collections] == [
        (0.4, 0.6),
        (0.4, 0.8),
    ]


def test_an_equation_in_a_title_is_not_broken() -> None:
    assert wrapped("pretrained and finetuned, digits, n = 180", 3.8) == "pretrained and finetuned, digits,\nn = 180"


def test_the_probe_figure_of_two_models_of_one_name() -> None:
    _, ax = plots.probe_figure(NAMES, [1, 0.9, 0.2], [0.5] * 3, [0.6] * 3, names=("BERT", "BERT"))
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["CKA of both", "accuracy, BERT before", "accuracy, BERT after"]


@pytest.mark.parametrize("mine", [False, True])
def test_side_by_side_shares_one_colour_bar(mine: bool) -> None:
    matrices = {"small": (VALUES, NAMES, NAMES[:2]), "large": (VALUES[:2], NAMES[:2], NAMES[:2])}
    given = Figure().subplots(1, 3)[:2] if mine else None
    figure, axes = plots.side_by_side(matrices, title="both" if not mine else "", ax=given, annotate=False)
    assert [ax.get_title() for ax in axes] == ["small", "large"]
    assert all(ax.get_images()[0].get_clim() == (0, 1) for ax in axes)
    assert not any(ax.texts for ax in axes)
    if given is None:
        assert len(figure.axes) == 3  # with the colour bar
        assert figure.get_suptitle() == "both"
    else:
        assert axes == list(given)
        assert figure is given[0].figure
        assert len(figure.axes) == 4
        with pytest.raises(ValueError, match="`ax` to hold 2 axes, one for each matrix, but got 1"):
            plots.side_by_side(matrices, ax=given[:1])
    assert figure.axes[-1].get_ylim() == (0, 1)
    assert plots.figure_pixels(figure).ndim == 3 if not mine else True


def ticks(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def test_the_upper_half_can_be_left_out() -> None:
    values = np.arange(9.0).reshape(3, 3) / 10
    _, ax = plots.heatmap(values, NAMES, NAMES, mask_upper=True)
    assert sorted(text.get_text() for text in ax.texts) == ["0.00", "0.30", "0.40", "0.60", "0.70", "0.80"]
    np.testing.assert_array_equal(cells(ax)[..., 3], np.tril(np.ones((3, 3))))
    _, ax = plots.heatmap(values, NAMES, NAMES, mask_upper=True, mask=np.eye(3, dtype=bool))
    assert sorted(text.get_text() for text in ax.texts) == ["0.30", "0.60", "0.70"]


def test_numbers_and_colours_can_be_chosen() -> None:
    _, ax = plots.heatmap(VALUES, NAMES, NAMES[:2], annot_fmt=".3f")
    assert sorted(text.get_text() for text in ax.texts) == ["-0.200", "0.250", "0.500", "1.000", "1.700"]
    _, ax = plots.heatmap(np.array([[0.05, 0.95]]), ["a"], ["b", "c"], cmap="Greys")
    np.testing.assert_allclose(cells(ax)[0, 0], colormaps["Greys"](0.05), atol=1e-6)
    assert [text.get_color() for text in ax.texts] == [ON_LIGHT, ON_DARK]  # light where viridis is dark


def test_the_depth_of_names_can_be_chosen() -> None:
    names = ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler"]
    _, ax = plots.heatmap(VALUES.T, NAMES[:2], names, layer_name_depth=2)
    assert ticks(ax) == ["layer.0", "layer.1", "bert.pooler"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["blocks.0", "blocks.1"]
    _, ax = plots.heatmap(VALUES.T, NAMES[:2], names, layer_name_depth=1)
    assert ticks(ax) == ["0", "1", "pooler"]
    # A name that another layer has too would say nothing.
    _, ax = plots.heatmap(VALUES.T, NAMES[:2], ["vision.layer.0", "text.layer.0", "text.head"], layer_name_depth=1)
    assert ticks(ax) == ["vision.layer.0", "text.layer.0", "head"]
    _, ax = plots.heatmap(VALUES.T, NAMES[:2], ["a", "a", "b.a"], layer_name_depth=3)
    assert ticks(ax) == ["a", "a", "b.a"]


def test_the_size_can_be_chosen() -> None:
    matrices = {"one": (VALUES, NAMES, NAMES[:2]), "two": (VALUES, NAMES, NAMES[:2])}
    for figure, _ in (
        plots.heatmap(VALUES, NAMES, NAMES[:2], figsize=(7, 3)),
        plots.side_by_side(matrices, ncols=1, figsize=(7, 3)),
    ):
        assert tuple(figure.get_size_inches()) == (7, 3)


@pytest.mark.parametrize("share_colorbar", [True, False])
def test_a_grid_of_heatmaps(share_colorbar: bool) -> None:
    """The multi-panel figure of a notebook: three matrices in two columns, one place left empty."""
    wide = np.zeros((1, 8)), NAMES[:1], [f"layer.{index}" for index in range(8)]
    square = np.array([[1.0, 1.2], [0.1, 1.0]]), NAMES[:2], NAMES[:2]
    options: dict[str, Any] = {"cmap": "magma", "share_colorbar": share_colorbar, "title": "All"}
    figure, axes = plots.side_by_side({"one": square, "two": wide, "three": square}, ncols=2, **options)
    plots.figure_pixels(figure)
    assert [ax.get_title() for ax in axes] == ["one", "two", "three"]
    one, two, three = (ax.get_position() for ax in axes)
    assert one.x0 < two.x0
    assert one.y0 == pytest.approx(two.y0)
    assert three.x0 == pytest.approx(one.x0)
    assert three.y1 < one.y0
    assert two.width > 1.2 * one.width  # eight columns beside two
    bars = [ax for ax in figure.axes if ax not in axes]
    assert len(bars) == (1 if share_colorbar else 3)
    assert all(ax.get_images()[0].get_cmap().name == "magma" for ax in axes)
    assert {bar._colorbar.cmap.name for bar in bars} == {"magma"}  # type: ignore[attr-defined]
    assert {bar._colorbar.extend for bar in bars} == ({"max"} if share_colorbar else {"max", "neither"})  # type: ignore[attr-defined]
    height = figure.get_size_inches()[1]
    assert plots.side_by_side({"one": square, "two": wide}, ncols=9)[0].get_size_inches()[1] < 0.7 * height


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], mask_upper=True), r"square matrix .*, but got .*\(3, 2\)"),
        (lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], annot_fmt=".2x"), "number's format, .* but got '.2x'"),
        (lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], layer_name_depth=0), "at least 1, but got 0"),
        (lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], cmap="virdis"), "got 'virdis'; did you mean .*viridis"),
        (lambda: plots.side_by_side({"a": (VALUES, NAMES, NAMES[:2])}, cmap="?"), r"got '\?'\.$"),
        (lambda: plots.side_by_side({"a": (VALUES, NAMES, NAMES[:2])}, ncols=0), "`ncols` .*at least 1, but got 0"),
        (
            lambda: plots.side_by_side({"a": (VALUES, NAMES, NAMES[:2])}, ncols=1, ax=[Figure().subplots()]),
            "`figsize` and `ncols` of a new figure, but got both",
        ),
        (
            lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], figsize=(3, 3), ax=Figure().subplots()),
            "either `figsize`, of a new figure, or `ax`",
        ),
        (lambda: plots.heatmap(VALUES, NAMES, NAMES), r"`values` of shape \(3, 3\).* but got \(3, 2\)"),
        (lambda: plots.heatmap(VALUES[0], NAMES, NAMES), r"but got \(2,\)"),
        (lambda: plots.heatmap(np.zeros((0, 2)), [], NAMES[:2]), "at least one row"),
        (lambda: plots.heatmap(VALUES, NAMES, NAMES[:2], mask=np.ones(2, bool)), r"`mask` .* but got \(2,\)"),
        (lambda: plots.layer_trend({"a": [0.1]}, NAMES), r"3 values for 'a', one a layer, but got \(1,\)"),
        (
            lambda: plots.layer_trend({"a": [0.1] * 3}, NAMES, bands={"a": ([0.0] * 3, [1.0] * 2)}),
            r"3 values for 'a', one a layer, but got \(2,\)",
        ),
        (lambda: plots.layer_trend({"a": []}, []), "a curve and a layer at least, but got 1 and 0"),
        (lambda: plots.layer_trend({}, NAMES), "a curve and a layer at least, but got 0 and 3"),
        (
            lambda: plots.layer_trend({"a": [0.1] * 3}, NAMES, bands={"b": ([0.0] * 3, [1.0] * 3)}),
            "bands for 'a', but got one for 'b'",
        ),
        (lambda: plots.epoch_trend(np.empty((0, 2)), [], [1, 2]), "a layer and a time at least, but got 0 and 2"),
        (lambda: plots.epoch_trend(VALUES, NAMES, [1]), r"of shape \(3, 1\), but got \(3, 2\)"),
        (lambda: plots.probe_figure(NAMES, [1.0] * 3, [1.0] * 2, [1.0] * 3), "3 values for 'accuracy, pretrained'"),
        (lambda: plots.side_by_side({}), "at least one matrix"),
        (lambda: plots.side_by_side({"a": (VALUES, NAMES, NAMES)}), r"but got \(3, 2\)"),
    ],
)
def test_shapes_that_do_not_fit(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_files(tmp_path: Path) -> None:
    figure, _ = plots.heatmap(VALUES, NAMES, NAMES[:2])
    written = plots.save_figure(figure, tmp_path / "new" / "0.5_a", (".png", ".pdf", ".svg"))
    assert [path.name for path in written] == ["0.5_a.png", "0.5_a.pdf", "0.5_a.svg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in written)
    png, pdf, svg = (path.read_bytes() for path in written)
    assert png.startswith(b"\x89PNG")
    assert pdf.startswith(b"%PDF")
    assert b"<svg" in svg
    assert plots.save_figure(figure, str(tmp_path / "one.svg")) == [tmp_path / "one.svg"]


@pytest.mark.parametrize(("name", "formats"), [("a.gif", ()), ("a", ()), ("a", (".png", ".gif"))])
def test_other_formats(name: str, formats: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \.png, \.pdf, \.svg, but got"):
        plots.save_figure(plots.heatmap(VALUES, NAMES, NAMES[:2])[0], tmp_path / name, formats)
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    class Failing(Figure):
        def savefig(self, fname: Any, **options: Any) -> None:
            Path(fname).write_text("half")
            raise OSError("disk full")

    (tmp_path / "a.png").write_text("before")
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(Failing(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("num_places", "most"), [(0, 40), (1, 40), (40, 40), (41, 40), (1000, 40), (7, 2.5)])
def test_ticks_are_spread_evenly_from_the_first_on(num_places: int, most: float) -> None:
    ticks = list(spread_ticks(num_places, most))
    assert len(ticks) <= most + 1
    assert len({after - before for before, after in pairwise(ticks)}) <= 1
    assert ticks[:1] == [0][:num_places]
    assert len(ticks) == num_places or num_places > most


def test_spectra_by_depth() -> None:
    spectra = {
        "embed": np.array([3.0, 3.0]), "layers.10.a": np.array([5.0, 1.0, 0.0]), "layers.2.a": np.geomspace(2, 1, 900)
    }  # fmt: skip
    figure, ax = plots.spectra_by_depth(spectra, title="$\\frac")
    unnumbered, last, first = ax.lines
    np.testing.assert_array_equal(last.get_xydata()[:2], [[1, 1], [2, 0.2]])  # type: ignore[index]
    assert len(last.get_xdata()) == 3  # down to the edge, and no further  # type: ignore[arg-type]
    x, y = first.get_data()
    np.testing.assert_allclose(y, np.geomspace(1, 0.5, 900)[np.asarray(x, dtype=int) - 1])
    assert len(x) <= 200  # type: ignore[arg-type]
    assert to_rgba(first.get_color()) == colormaps["viridis"](0.0)  # type: ignore[arg-type]
    assert to_rgba(last.get_color()) == colormaps["viridis"](0.92)  # type: ignore[arg-type]
    assert unnumbered.get_linestyle() == "--"
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["layers.2", "layers.10"]
    plots.figure_pixels(figure)
    with pytest.raises(ValueError, match="of one matrix at least, but got none"):
        plots.spectra_by_depth({})
    with pytest.raises(ValueError, match="of 'a', the largest first"):
        plots.spectra_by_depth({"a": [0.0, 0.0]})


def test_updates_by_layer() -> None:
    names = [f"blocks.{index}.{role}.weight" for index in range(30) for role in ("query", "key")] + ["head.weight"]
    changes, shares = np.geomspace(1e-3, 1, len(names)), np.linspace(0, 1, len(names))
    figure, axes = plots.updates_by_layer(names, changes, shares, title="a" * 300)
    for ax, values in zip(axes, (changes, shares), strict=True):
        for line, chosen in zip(ax.lines, (slice(0, 60, 2), slice(1, 60, 2), slice(60, 61)), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), values[chosen])
            np.testing.assert_array_equal(line.get_xdata(), np.arange(61)[chosen])
    legend = axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["query", "key", "others"]
    ticks = dict(zip(axes[1].get_xticks(), (label.get_text() for label in axes[1].get_xticklabels()), strict=True))
    assert (ticks[0], ticks[4]) == ("blocks.0", "blocks.2")
    plots.figure_pixels(figure)
    _, axes = plots.updates_by_layer(["$\\frac", "b"], [0.1, 0.2], [0.3, 0.4])
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["$\\frac", "b"]
    with pytest.raises(ValueError, match=r"each of 1 matrices, one at least, but got \(2,\)"):
        plots.updates_by_layer(["a"], [1, 2], [1])


def test_the_plane_zooms_in_on_what_is_like_the_fine_tuned_model() -> None:
    points = {"pretrained": (0.0, 0.01), "finetuned": (0.88, 0.66), "monosoup": (0.86, 0.7), "lowonly": (0.01, 0.0)}
    _, ax = plots.accuracy_plane(points, errors={"finetuned": (0.02, 0.03), "monosoup": (0.01, 0.02)})
    (x_low, x_high), (y_low, y_high) = ax.get_xlim(), ax.get_ylim()
    assert 0.7 < x_low < 0.85 < 0.9 < x_high  # with the bars
    assert 0.5 < y_low < 0.63 < 0.72 < y_high
    (inset,) = ax.child_axes
    assert inset.get_xlim()[0] < 0 < 0.88 < inset.get_xlim()[1]
    # Near each other, all are in one picture; without a fine-tuned model, too.
    for others in (
        {"pretrained": (0.8, 0.6), "finetuned": (0.88, 0.66), "monosoup": (0.83, 0.7)},
        {"pretrained": (0, 0)},
    ):
        _, ax = plots.accuracy_plane(others)
        assert ax.child_axes == []
        assert ax.get_xlim()[0] < min(x for x, _ in others.values())
