"""The table of a page in a real browser: sorted, filtered, explained; and text whatever it looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_cka.plots.table_page import Cell, Column, write_table_page
from tests.browser import CHROMIUM, Page, browser_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$\\frac{1}{2}$ {{data}} \u202etfel \ud800",
]
COLUMNS = [
    Column("tensor", "What it is called."),
    Column("kind", "What it is.", choices=True),
    Column("size", "How large <b>it</b> is.", numeric=True),
    Column("note", "More.", wide=True),
]
ROWS: list[list[Cell]] = [
    ["layers.10.weight", "changed", 0.25, "one"],
    ["layers.2.weight", "changed", math.inf, ""],
    ["layers.2.bias", "same", 0, None],
    ["head", "gone", None, "two"],
    ["tail", "changed", 1e-7, None],
    *([name, "odd", math.nan, name] for name in HOSTILE),
]

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def write(path: Path, rows: list[list[Cell]] = ROWS, **options: Any) -> Path:
    return write_table_page(path, COLUMNS, rows, **{"title": HOSTILE[0], "about": HOSTILE, "sorted_by": 2, **options})


def names(page: Page) -> list[str]:
    found: list[str] = page.evaluate("[...document.querySelectorAll('#rows th')].map((cell) => cell.textContent)")
    return found


def sort_by(page: Page, column: int) -> list[str]:
    page.click_on(f"#head th:nth-child({column + 1}) button")
    return names(page)


def search(page: Page, words: str) -> list[str]:
    page.evaluate(
        f"byId('words').value = {words!r}; byId('words').dispatchEvent(new Event('input', {{bubbles: true}}))"
    )
    return names(page)


@needs_browser
def test_it_sorts_and_filters(browser: Page, tmp_path: Path) -> None:
    path = write(tmp_path / "index.html")
    browser.open(path)
    shown = names(browser)
    assert shown[:4] == ["layers.2.weight", "layers.10.weight", "tail", "layers.2.bias"]  # those without a number last
    assert sort_by(browser, 2)[:4] == shown[:4][::-1]
    assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "ascending"
    in_order = [name for name in sort_by(browser, 0) if not name.startswith(("<", "$"))]
    assert in_order == ["head", "layers.2.bias", "layers.2.weight", "layers.10.weight", "tail"]
    assert sort_by(browser, 0)[0] == "tail"
    assert search(browser, "WEIGHT layers") == ["layers.10.weight", "layers.2.weight"]
    assert search(browser, "weight tail") == []
    assert browser.text("#count") == f"0 of {len(ROWS)} rows"
    search(browser, "")
    browser.evaluate("{ const s = document.querySelector('select'); s.value = 'same'; "
                     "s.dispatchEvent(new Event('input', {bubbles: true})); }")  # fmt: skip
    assert names(browser) == ["layers.2.bias"]
    options = browser.evaluate("[...document.querySelectorAll('option')].map((option) => option.text)")
    assert options == ["all", "changed", "gone", "odd", "same"]
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


@needs_browser
def test_many_sentences_do_not_push_the_table_away(browser: Page, tmp_path: Path) -> None:
    browser.open(write(tmp_path / "table.html", about=[f"Sentence {number}." for number in range(9)]))
    assert "Sentence 1." in browser.text("#about")
    assert "Sentence 2." not in browser.text("#about")
    browser.click_on("summary")
    assert "Sentence 8." in browser.text("#about")


@needs_browser
def test_all_is_text_and_explained(browser: Page, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    browser.open(write(tmp_path / "plain.html"))
    browser.screenshot(picture)
    path = write(tmp_path / "index.html", pictures={str(picture): HOSTILE[1]}, files=["a #1?.csv"])
    for width, scheme in ((1280, "light"), (600, "dark")):
        browser.open(path, width=width, scheme=scheme)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.text("h1") == HOSTILE[0]
    for name in HOSTILE[:2]:
        assert name in names(browser)
        assert name in browser.text("#about")
    assert "\\u202etfel" in browser.text("#rows")
    assert browser.evaluate("document.querySelectorAll('main script, #rows img, #about img').length") == 0
    assert browser.evaluate("document.querySelector('figure img').naturalWidth") == 1280
    explained = browser.evaluate("[...document.querySelectorAll('#head button')].map((button) => button.title)")
    assert explained == [column.explanation for column in COLUMNS]
    assert COLUMNS[2].explanation in browser.text("#columns")
    numbers = browser.evaluate("[...document.querySelectorAll('#rows .number')].map((cell) => cell.textContent)")
    assert numbers[:5] == ["∞", "0.2500", "1.00e\u22127", "0", ""]
    link = browser.evaluate("document.querySelector('#files a').href")
    assert link == (tmp_path / "a #1?.csv").as_uri()
    assert browser.errors == []
    assert [each for each in browser.requests if not each.startswith("data:image/png")] == [path.as_uri()]


@needs_browser
def test_many_rows(browser: Page, tmp_path: Path) -> None:
    rows: list[list[Cell]] = [[f"layers.{index}", "same", index, None] for index in range(1500)]
    browser.open(write(tmp_path / "index.html", rows))
    assert names(browser) == [f"layers.{index}" for index in range(1499, 499, -1)]
    assert browser.text("#count") == "1500 of 1500 rows, the first 1000 shown"
    browser.click_on("#all")
    assert len(names(browser)) == 1500
    assert search(browser, "layers.77")[:2] == ["layers.779", "layers.778"]


def test_a_row_of_another_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each of 4 columns, but got a row of 1"):
        write(tmp_path / "index.html", [["x"]])
    assert list(tmp_path.iterdir()) == []


def test_no_markup_in_the_file(tmp_path: Path) -> None:
    """What no browser is needed for."""
    page = write(tmp_path / "index.html").read_text()
    assert HOSTILE[0] not in page
    assert "<title>&lt;/script&gt;" in page
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
