"""Figures in the dark: greys are turned round, colours and what stands on them stay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from lit_cka import plots
from lit_cka.plots.svg_theme import follow_theme
from tests.browser import CHROMIUM, Page, browser_page

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="40">{1}</svg>'
SHADES = {"#000000": (0xE8, 0xEA, 0xED), "#ffffff": (0x16, 0x18, 0x1B), "#808080": (0x7F, 0x81, 0x84),
          "#d9d9d9": (0x5A, 0x5F, 0x66), "#010101": (1, 1, 1), "#fefefe": (254, 254, 254),
          "#0072b2": (0, 0x72, 0xB2)}  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def pixels(browser: Page, tmp_path: Path, scheme: str) -> NDArray[np.uint8]:
    (tmp_path / "page.html").write_text('<body style="margin: 0"><img src="figure.svg">')
    browser.open(tmp_path / "page.html", width=900, height=700, scheme=scheme)
    shown = matplotlib.image.imread(browser.screenshot(tmp_path / "shot.png"))
    return (255 * shown[:, :, :3]).round().astype(np.uint8)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_greys_turn_and_colours_stay(browser: Page, tmp_path: Path) -> None:
    """As the image of a page, in a browser: fills, strokes, and what has no colour of its own."""
    parts = []
    for place, color in enumerate(SHADES):
        x = 60 * place
        parts.append(f'<rect x="{x}" y="0" width="20" height="20" style="fill: {color}"/>')
        parts.append(f'<path d="M{x} 30H{x + 20}" style="fill: none; stroke: {color}; stroke-width: 8"/>')
    parts.append('<rect x="480" y="0" width="20" height="20"/>')
    (tmp_path / "figure.svg").write_text(follow_theme(SVG.format(600, "".join(parts))))
    light, dark = (pixels(browser, tmp_path, scheme) for scheme in ("light", "dark"))
    for place, (color, turned) in enumerate(SHADES.items()):
        for y in (10, 30):
            assert tuple(light[y, 60 * place + 10]) == tuple(bytes.fromhex(color[1:]))
            assert tuple(dark[y, 60 * place + 10]) == turned
    assert tuple(light[10, 490]) == (0, 0, 0)
    assert tuple(dark[10, 490]) == SHADES["#000000"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_figure_in_the_dark(browser: Page, tmp_path: Path) -> None:
    """Its cells as in the light, around them light letters on dark."""
    figure, ax = plots.heatmap(
        np.array([[0.1, np.nan], [0.95, 0.5]]), ["a", "b"], ["c", "d"], title="T", annotate=False
    )
    plots.save_figure(figure, tmp_path / "figure.svg")
    light, dark = (pixels(browser, tmp_path, scheme) for scheme in ("light", "dark"))
    assert tuple(dark[2, 2]) == SHADES["#ffffff"]
    assert tuple(light[2, 2]) == (255, 255, 255)
    viridis = ax.images[0].cmap
    cell = np.array([round(255 * channel) for channel in viridis(ax.images[0].norm(0.95))[:3]], dtype=int)
    for shown in (light, dark):
        assert (np.abs(shown.astype(int) - cell).max(axis=2) <= 2).sum() > 500
    assert (dark == SHADES["#d9d9d9"]).all(axis=2).sum() > 500  # the cell without a value


def test_what_is_written_is_still_a_figure(tmp_path: Path) -> None:
    """Well-formed, with one style sheet more, which programs without style sheets pass over."""
    figure, _ = plots.layer_trend({"a": [0.1, 0.2]}, ["x.0", "x.1"], bands={"a": ([0, 0.1], [0.2, 0.3])})
    (path,) = plots.save_figure(figure, tmp_path / "figure.svg")
    root = ElementTree.fromstring(path.read_text())
    (style,) = [each for each in root if each.tag.endswith("style")]
    assert style.text.startswith("@media (prefers-color-scheme: dark)")
    without = re.sub(r"<style>.*?</style>", "", path.read_text(), count=1)
    assert "prefers-color-scheme" not in without
    assert "#0072b2" in without
    assert "#0072b2" not in style.text
