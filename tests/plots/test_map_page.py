"""The map in a real browser: what it shows, filters and says, with the pointer and with the keyboard alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from lit_cka.plots.map_page import MapPoint, write_map
from tests.browser import CHROMIUM, Page, browser_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"quotes' & <b>bold</b> \u2028 \\u003c {{data}} ${1} <!-- ",
    "🦙 नमस्ते \u202etfel \ud800",
    "a very long name, " * 60,
]
MODELS, DATASETS, DEPTH = ["vit", "bert"], ["english", "hindi", "swahili"], 4

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def some_points(
    models: list[str] = MODELS, datasets: list[str] = DATASETS, depth: int = DEPTH, seed: int = 0
) -> list[MapPoint]:
    generator = np.random.default_rng(seed)
    keys = [(model, dataset, layer) for model in models for dataset in datasets for layer in range(depth)]
    return [
        MapPoint(model, dataset, f"blocks.{layer}", layer, tuple(generator.normal(size=3)))
        for model, dataset, layer in keys
    ]


def some_cka(num_points: int) -> NDArray[np.float64]:
    """Symmetric, with one undefined pair: the first point and its partner on the second dataset."""
    half = np.random.default_rng(1).uniform(0, 0.99, size=(num_points, num_points))
    cka = np.maximum(half, half.T)
    np.fill_diagonal(cka, 1.0)
    if num_points > DEPTH:
        cka[0, DEPTH] = cka[DEPTH, 0] = np.nan
    return cka


def write(path: Path, points: list[MapPoint], **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "title": "A map",
        "explained": [0.5, 0.25, 0.125],
        "cka": some_cka(len(points)),
        "matrices": {
            "vit \u00d7 bert": (np.array([[0.25, 1.5, np.nan], [-0.125, 0.9996, 1.0]]), ["r0", "r1"], ["a", "b", "c"])
        },
        "notes": {"correlation of PC1 with language": "0.93"},
        "tables": {"Procrustes": [{"model": "vit", "residual": 0.546}, {"model": "bert", "relative": float("nan")}]},
    }
    return write_map(path, points, **{**arguments, **changes})


def label(point: MapPoint) -> str:
    return f"{point.layer} · {point.dataset} · {point.model}"


def compared(points: list[MapPoint], one: int, other: int) -> str:
    """What the page has to say of two points."""
    value = some_cka(len(points))[one, other]
    distance = float(np.linalg.norm(np.subtract(points[one].position, points[other].position)))
    return f"CKA {'undefined' if np.isnan(value) else f'{value:.3f}'}, distance {distance:.3f}"


def state(page: Page, name: str) -> Any:
    return page.evaluate(f"litCkaMap.{name}")


def place(page: Page, point: MapPoint) -> tuple[float, float]:
    x, y = page.evaluate(f"litCkaMap.clientPosition({label(point)!r})")
    return x, y


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, tmp_path: Path) -> Iterator[Page]:
    """The map of `some_points()`; a test fails if the page complains or asks for anything but itself."""
    path = write(tmp_path / "map.html", some_points())
    browser.open(path)
    yield browser
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


@needs_browser
def test_filters(page: Page) -> None:
    points = some_points()
    assert state(page, "visible") == [label(point) for point in points]
    page.click_on("#filter-dataset label:nth-of-type(2) input")
    assert state(page, "visible") == [label(point) for point in points if point.dataset != "hindi"]
    assert page.text("#count") == "16 of 24 points"
    page.click_on("#filter-model label:nth-of-type(1)")
    rest = [point for point in points if point.dataset != "hindi" and point.model == "bert"]
    assert state(page, "visible") == [label(point) for point in rest]
    page.evaluate("document.getElementById('depth-first').focus()")
    page.key("ArrowRight", times=2)
    assert state(page, "visible") == [label(point) for point in rest if point.depth >= 2]
    page.evaluate("document.getElementById('depth-last').focus()")
    page.key("Home")  # The end pushes the start.
    assert state(page, "visible") == [label(point) for point in rest if point.depth == 0]
    shown = page.evaluate("[...document.querySelectorAll('#list li')].filter((item) => item.checkVisibility()).length")
    assert shown == 2
    page.click_on("#filter-model label:nth-of-type(2) input")
    assert state(page, "visible") == []
    assert page.text("#count") == "No point of 24: widen the filters."


@needs_browser
def test_the_ends_of_paths_are_named(page: Page) -> None:
    """Of those that are shown, and where names don't cover each other."""
    ends = [label(point) for point in some_points() if point.depth in (0, DEPTH - 1)]
    assert sorted(state(page, "labels")) == sorted(ends)
    assert 4 <= state(page, "labelled") <= len(ends)
    page.evaluate("document.getElementById('depth-first').focus()")
    page.key("ArrowRight", times=2)
    page.click_on("#filter-model label:nth-of-type(1)")
    shown = [label(point) for point in some_points() if point.depth in (2, DEPTH - 1) and point.model == "bert"]
    assert sorted(state(page, "labels")) == sorted(shown)
    for index in range(3):
        page.click_on(f"#filter-dataset label:nth-of-type({index + 1})")
    assert state(page, "labels") == []
    assert state(page, "labelled") == 0


@needs_browser
def test_within_another_page_the_map_stands_alone(browser: Page, tmp_path: Path) -> None:
    write(tmp_path / "map.html", some_points(), notes={"estimator": "CKA"})
    (tmp_path / "index.html").write_text('<iframe src="map.html" width="900" height="800"></iframe>')
    browser.open(tmp_path / "map.html")
    assert browser.evaluate("document.querySelector('#notes').checkVisibility()")
    browser.open(tmp_path / "index.html")
    assert browser.errors == []  # what is in the frame is seen in the pictures


@needs_browser
def test_a_wide_table_scrolls_within_its_box(browser: Page, tmp_path: Path) -> None:
    row = {f"a column with a long name {number}": 0.5 for number in range(8)}
    browser.open(
        write(tmp_path / "map.html", some_points(), tables={"Wide": [row]}, explanations={next(iter(row)): HOSTILE[1]}),
        width=600,
    )
    assert browser.evaluate("document.querySelector('.table th[title]').title") == HOSTILE[1]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('.table'))"
    )


@needs_browser
def test_all_and_none_of_many_models(browser: Page, tmp_path: Path) -> None:
    points = some_points([f"model {index}" for index in range(12)])
    browser.open(write(tmp_path / "map.html", points))
    browser.click_on("#filter-model [aria-label='None of the models']")
    assert state(browser, "visible") == []
    browser.click_on("#filter-model label:nth-of-type(11)")
    assert state(browser, "visible") == [label(point) for point in points if point.model == "model 10"]
    browser.click_on("#filter-model [aria-label='All of the models']")
    assert len(state(browser, "visible")) == len(points)
    assert not browser.errors


@needs_browser
@pytest.mark.parametrize("index", [0, 5, 23])
def test_hovered_point_says_cka_and_distance(page: Page, index: int) -> None:
    points = some_points()
    page.move(*place(page, points[index]))
    assert state(page, "hovered") == label(points[index])
    words = page.text("#tooltip")
    assert all(word in words for word in (points[index].model, points[index].dataset, f"{points[index].layer} (depth"))
    partners = [
        other
        for other, point in enumerate(points)
        if (point.model, point.layer) == (points[index].model, points[index].layer) and other != index
    ]
    assert len(partners) == 2
    for other in partners:
        assert f"with {points[other].dataset}\n{compared(points, index, other)}" in words
    page.move(2, 2)
    assert state(page, "hovered") is None
    assert page.evaluate("document.getElementById('tooltip').hidden")


@needs_browser
def test_selected_point_is_compared_with_all_others(page: Page) -> None:
    points = some_points()
    page.click(*place(page, points[3]))
    assert state(page, "selected") == label(points[3])
    assert points[3].layer in page.text("#selected")
    page.move(*place(page, points[14]))
    assert f"with selected\n{compared(points, 14, 3)}" in page.text("#tooltip")
    page.click_on("#clear")
    assert state(page, "selected") is None
    # A filtered point doesn't stay selected.
    page.click(*place(page, points[3]))
    page.click_on("#filter-model label:nth-of-type(1)")
    assert state(page, "selected") is None


@needs_browser
def test_lines_and_colors(page: Page) -> None:
    assert state(page, "links") == len(MODELS) * DEPTH * 3
    assert state(page, "paths") == len(MODELS) * len(DATASETS) * (DEPTH - 1)
    page.click_on("#filter-dataset label:nth-of-type(1)")
    assert (state(page, "links"), state(page, "paths")) == (len(MODELS) * DEPTH, len(MODELS) * 2 * (DEPTH - 1))
    picture = "document.getElementById('scatter').toDataURL()"
    pictures = [page.evaluate(picture)]
    for selector in ("#pair-links", "#depth-lines", "input[value=model]"):
        page.click_on(selector)
        pictures.append(page.evaluate(picture))
    assert len(set(pictures)) == 4
    assert (state(page, "links"), state(page, "paths"), state(page, "colorBy")) == (0, 0, "model")
    assert page.evaluate("document.querySelector('#filter-model path').getAttribute('fill')") == "#0072b2"


@needs_browser
def test_pointer_rotates_and_wheel_zooms_where_the_map_has_the_focus(page: Page) -> None:
    point = some_points()[7]
    before, (x, y) = place(page, point), page.evaluate("litCkaMap.clientPosition(litCkaMap.visible[0])")
    page.press(x, y)
    page.move(x + 60, y + 20, pressed=True)
    page.release(x + 60, y + 20)
    assert state(page, "view.yaw") != pytest.approx(-0.6)
    assert place(page, point) != pytest.approx(before)
    assert state(page, "selected") is None
    turned = place(page, point)
    page.wheel(*turned, -100)
    assert state(page, "view.zoom") == pytest.approx(np.exp(0.2))
    assert place(page, point) == pytest.approx(turned, abs=0.5)  # Wheels turn at whole pixels.
    page.evaluate("document.activeElement.blur()")
    page.wheel(*turned, -100)
    assert state(page, "view.zoom") == pytest.approx(np.exp(0.2))


@needs_browser
def test_projection_shows_distances_of_one_scale(browser: Page, tmp_path: Path) -> None:
    points = [
        MapPoint("m", "d", name, 0, position)
        for name, position in {
            "o": (0, 0, 0),
            "x": (1, 0, 0),
            "y": (0, 1, 0),
            "z": (0, 0, 1),
            "low": (-1, -1, -1),
        }.items()
    ]
    browser.open(write(tmp_path / "map.html", points))
    browser.evaluate("scatter.view = {yaw: 0, pitch: 0, zoom: 1, panX: 0, panY: 0}")
    origin, right, up, near, _ = (np.array(place(browser, point)) for point in points)
    np.testing.assert_allclose(near, origin, atol=1e-6)  # toward the eye, in the middle of the picture
    np.testing.assert_allclose(right - origin, [np.linalg.norm(right - origin), 0], atol=1e-6)
    np.testing.assert_allclose(up - origin, [0, -np.linalg.norm(right - origin)], atol=1e-6)
    browser.evaluate("scatter.view.yaw = Math.PI / 2")  # PC3 comes to where PC1 was.
    np.testing.assert_allclose(place(browser, points[3]), right, atol=1e-6)


@needs_browser
def test_keyboard_alone(page: Page) -> None:
    points = some_points()
    page.key("Tab", times=3)  # theme, tab, then the colours
    page.key("ArrowRight")
    assert state(page, "colorBy") == "model"
    page.key("Tab")
    page.key(" ")
    assert state(page, "links") == 0
    for _ in range(20):
        page.key("Tab")
        if page.evaluate("document.activeElement.id") == "scatter":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    before = place(page, points[1])
    for keys in (("ArrowLeft",), ("ArrowUp",), ("+",), ("-", "-"), ("0",)):
        for key in keys:
            page.key(key)
        assert (place(page, points[1]) == pytest.approx(before)) == (keys == ("0",)), keys
    page.key("ArrowRight", shift=True)
    assert place(page, points[1]) == pytest.approx((before[0] + 20, before[1]))
    page.key("Tab", times=4)  # past the buttons of the view
    assert page.evaluate("document.activeElement.id") == "list"
    assert state(page, "hovered") == label(points[0])
    page.key("ArrowDown", times=2)
    assert state(page, "hovered") == label(points[2])
    assert compared(points, 2, 2 + DEPTH) in page.text("#tooltip")
    assert compared(points, 2, 2 + DEPTH) in page.text("#live")
    active = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).innerText"
    )
    assert [points[2].layer, points[2].model] == [active.split(" · ")[0], active.split("\n")[-1]]
    page.key("Enter")
    assert state(page, "selected") == label(points[2])
    page.key("End")
    assert compared(points, 23, 2) in page.text("#live")
    page.key("Escape")
    page.key("Escape")
    assert (state(page, "hovered"), state(page, "selected")) == (None, None)


@needs_browser
def test_matrices_are_tabs(page: Page) -> None:
    page.click_on("#tab-1")
    assert state(page, "tab") == "vit \u00d7 bert"
    assert page.evaluate("[...document.querySelectorAll('.panel')].map((panel) => panel.hidden)") == [True, False]
    page.move(*page.evaluate("litCkaMap.cellPosition(1, 1)"))
    # Rounded, it would be 1.
    assert page.text(".matrix .value") == "> 0.999: r1 \u00d7 b"
    assert "> 0.999" in page.text(".matrix .tooltip")
    page.move(*page.evaluate("litCkaMap.cellPosition(0, 2)"))
    assert page.text(".matrix .value") == "undefined: r0 \u00d7 c"
    page.click_on("summary")
    table = re.sub(r"\s+", " ", page.text("details table"))
    assert table == "vit \u00d7 bert a b c r0 0.250 1.500 undefined r1 \u22120.125 > 0.999 1.000"
    page.evaluate("document.getElementById('tab-1').focus()")
    page.key("ArrowRight")
    assert state(page, "tab") == "Map"
    page.key("ArrowLeft")
    page.key("Tab", times=2)  # past the scrolled area
    page.evaluate("document.querySelector('.matrix canvas').focus()")
    page.key("ArrowDown")
    page.key("ArrowDown")
    page.key("ArrowRight", times=9)
    assert page.text(".matrix .value") == "1.000: r1 \u00d7 c"


@needs_browser
def test_colors_of_a_matrix_are_those_of_the_figures(page: Page, tmp_path: Path) -> None:
    page.click_on("#tab-1")
    pixels = (matplotlib.image.imread(page.screenshot(tmp_path / "matrix.png")) * 255).round()

    def color(row: int, column: int) -> NDArray[np.float64]:
        """Near the cell's corner, where no number is."""
        x, y = page.evaluate(f"litCkaMap.cellPosition({row}, {column})")
        return pixels[int(y) - 15, int(x) - 15, :3]

    viridis = np.array([matplotlib.colormaps["viridis"](value)[:3] for value in (0.25, 1.0, 0.0)]) * 255
    np.testing.assert_allclose([color(0, 0), color(0, 1), color(1, 0)], viridis, atol=3)
    np.testing.assert_array_equal(color(0, 2), [0xBF] * 3)


@needs_browser
def test_notes_tables_and_points_left_out(browser: Page, tmp_path: Path) -> None:
    points = some_points()
    points[1] = dataclasses.replace(points[1], position=(0.0, float("nan"), 1.0))
    browser.open(write(tmp_path / "map.html", points))
    assert label(points[1]) in browser.text("#left-out")
    assert state(browser, "visible") == [label(point) for point in points if point is not points[1]]
    # The others keep their own similarities.
    browser.move(*place(browser, points[23]))
    assert compared(points, 23, 19) in browser.text("#tooltip")
    assert re.sub(r"\s+", " ", browser.text("#notes")) == (
        "correlation of PC1 with language 0.93 Procrustes model residual relative vit 0.546 bert undefined"
    )
    assert not browser.errors


@needs_browser
def test_every_name_is_text(browser: Page, tmp_path: Path) -> None:
    points = [
        dataclasses.replace(point, layer=HOSTILE[point.depth]) for point in some_points(HOSTILE, HOSTILE, len(HOSTILE))
    ]
    path = write(
        tmp_path / "map.html",
        points,
        title=HOSTILE[0],
        matrices={name: (np.full((5, 5), 0.5), HOSTILE, HOSTILE) for name in HOSTILE},
        notes=dict(zip(HOSTILE, HOSTILE, strict=True)),
        tables={name: [dict(zip(HOSTILE, HOSTILE, strict=True))] for name in HOSTILE},
    )
    browser.evaluate("window.alert = () => { throw new Error('alert') }")
    browser.open(path)
    assert browser.text("h1") == HOSTILE[0] == browser.evaluate("document.title")
    assert browser.evaluate("document.querySelectorAll('img, b, body script').length") == 2  # its own scripts
    for selector, count in (("#filter-model .name", 5), ("#filter-dataset .name", 5), ("[role=tab]", 6)):
        texts = browser.evaluate(f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)")
        # Half a surrogate pair can't be told from the replacement character any more.
        expected = [name.replace("\ud800", "\ufffd") for name in HOSTILE]
        assert [text.replace("\ud800", "\ufffd") for text in texts][count - 5 :] == expected
    browser.move(*browser.evaluate("litCkaMap.clientPosition(litCkaMap.visible[0])"))
    for tab in range(1, 6):
        browser.click_on(f"#tab-{tab}")
        cell = browser.evaluate("litCkaMap.cellPosition(1, 4)")
        browser.move(*cell)
        assert browser.evaluate("litCkaMap.cellPosition(1, 4)") == cell  # It stays under the pointer.
    assert browser.evaluate("document.documentElement.scrollWidth") == 1280 - browser.evaluate(
        "innerWidth - document.documentElement.clientWidth"
    )
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


@needs_browser
def test_policy_lets_no_other_script_in(browser: Page, tmp_path: Path) -> None:
    path = write(tmp_path / "map.html", some_points())
    path.write_text(path.read_text("utf-8").replace("</body>", "<script>window.broken = 1</script></body>"), "utf-8")
    browser.open(path)
    assert browser.evaluate("window.broken") is None
    assert any("Content Security Policy" in error for error in browser.errors)
    with pytest.raises(RuntimeError, match="Failed to fetch"):
        browser.evaluate("fetch('http://127.0.0.1:9/')")


@needs_browser
@pytest.mark.parametrize("points", [some_points(["m"], ["d"], 1), some_points(["m"], ["d"], 2)], ids=len)
@pytest.mark.parametrize("same", [False, True])
def test_few_points_and_points_in_one_place(browser: Page, tmp_path: Path, points: list[MapPoint], same: bool) -> None:
    if same:
        points = [dataclasses.replace(point, position=(0.1, 0.2, 0.3)) for point in points]
    browser.open(write(tmp_path / "map.html", points, matrices={}, explained=[np.nan] * 3))
    browser.move(*place(browser, points[0]))
    assert state(browser, "hovered") == label(points[0])
    assert browser.evaluate("document.getElementById('tabs').hidden")
    assert not browser.errors


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (820, 1100), (360, 740)])
def test_light_and_dark_on_screens_of_all_sizes(browser: Page, tmp_path: Path, width: int, height: int) -> None:
    path = write(tmp_path / "map.html", some_points())
    brightness = {}
    for scheme in ("light", "dark"):
        browser.open(path, width=width, height=height, scheme=scheme)
        assert state(browser, "theme") == scheme
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        pixels = matplotlib.image.imread(browser.screenshot(tmp_path / f"{scheme}.png"))[:, :, :3]
        brightness[scheme] = float(np.median(pixels))
    assert brightness["dark"] < 0.2 < 0.9 < brightness["light"]
    assert browser.text("#theme") == "Switch to light"
    browser.click_on("#theme")
    assert state(browser, "theme") == "light"
    assert browser.text("#theme") == "Switch to dark"
    contrast = browser.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    assert not browser.errors


CONTRAST = """(() => {
  const luminance = (color) => {
    const parts = color.match(/\\w\\w/g).map((part) => parseInt(part, 16) / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratios = {};
  for (const theme of ["light", "dark"]) {
    setTheme(theme);
    for (const ground of ["ground", "raised"]) {
      for (const ink of ["ink", "soft", "accent", "warning"]) {
        const [one, other] = [ground, ink].map((name) => luminance(themeColor(name))).sort();
        ratios[`${theme} ${ink} on ${ground}`] = (other + 0.05) / (one + 0.05);
      }
    }
  }
  return ratios;
})()"""


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "folder" / "map.html", some_points())
    source = path.read_text("utf-8")
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|\bimport\s*\(|fetch\(|XMLHttp|WebSocket""", source)
    assert set(re.findall(r"https?://[^\"']*", source)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'sha256-[\w+/=]+'", source)
    assert [file.name for file in path.parent.iterdir()] == ["map.html"]


def test_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "map.html", some_points())
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, some_points(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("points", "changes", "message"),
    [
        ([], {}, "at least one point"),
        (some_points() + some_points(), {}, r"once, but got \('vit', 'english', 'blocks.0'\) 2 times"),
        (some_points(), {"cka": np.eye(3)}, r"`cka` of shape \(24, 24\), points by points, but got \(3, 3\)"),
        (some_points(), {"explained": [0.5, 0.5]}, "3 coordinates, but got 2"),
        (some_points(), {"matrices": {"m": (np.eye(2), ["a", "b"], ["c"])}}, r"matrix 'm' .* got shape \(2, 2\)"),
        (some_points(), {"matrices": {"m": (np.ones((2, 0)), ["a", "b"], [])}}, "at least one of each"),
        ([MapPoint("m", "d", "l", 0, (0.0, 0.0))], {}, "3 coordinates, but layer 'l' of 'm' on 'd' has 2"),  # type: ignore[arg-type]
        ([MapPoint("m", "d", "l", 0, (0.0, 0.0, float("inf")))], {}, "none of the 1 has them"),
    ],
)
def test_bad_input(tmp_path: Path, points: list[MapPoint], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "map.html", points, **changes)
    assert not list(tmp_path.iterdir())
