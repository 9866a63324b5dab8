"""The page of a results folder, read back with Python's own parser."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lit_cka.analysis.page import Section, write_page

EVIL = '<script>alert("1")</script>&amp;\'"'


class Page(HTMLParser):
    """Its tags with their attributes, its links, and the text by tag."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.text: dict[str, list[str]] = {}
        self.hints: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        assert not [name for name in given if name.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if "title" in given:
            self.hints[tag] = given["title"]
        if "href" in given:
            self.links.append(given["href"])
        if tag == "img":
            self.images.append((given["src"], given["alt"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_every_text_is_escaped(tmp_path: Path) -> None:
    section = Section(
        f"heading {EVIL}",
        [f"text {EVIL}"],
        [{f"column {EVIL}": f"cell {EVIL}"}],
        {f"{EVIL[:8]}.png": f"image {EVIL}"},
        {"map.html": f"link {EVIL}"},
        {f"column {EVIL}": f"sentence {EVIL}", f"cell {EVIL}": f"row {EVIL}"},
        {"map.html": f"frame {EVIL}"},
    )
    page = Page(write_page(tmp_path, f"title {EVIL}", [section], about=f"about {EVIL}"))
    assert "script" not in page.tags
    assert page.open == []
    for tag, kind in [
        ("title", "title"),
        ("h1", "title"),
        ("th", "column"),
        ("td", "cell"),
        ("a", "link"),
        ("figcaption", "image"),
    ]:
        assert "".join(page.text[tag]) == f"{kind} {EVIL}"
    assert page.text["h2"] == [f"heading {EVIL}", "Files"]
    assert page.text["p"] == [f"about {EVIL}", f"text {EVIL}"]
    assert page.text["dt"] == [f"column {EVIL}", f"cell {EVIL}"]
    assert page.text["dd"] == [f"sentence {EVIL}", f"row {EVIL}"]
    assert page.hints == {"th": f"sentence {EVIL}", "td": f"row {EVIL}", "iframe": f"frame {EVIL}"}
    assert [(unquote(source), text) for source, text in page.images] == [("<script>.png", f"image {EVIL}")]


def test_it_links_every_file(tmp_path: Path) -> None:
    names = [
        "map.html",
        "a b.png",
        "100%.json",
        "x#1.pdf",
        "what?.svg",
        "javascript:alert(1)",
        "é&<i>.txt",
        '"quoted".csv',
    ]
    for name in [*names, ".hidden.partial"]:
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    for _ in range(2):  # written again, it does not link itself
        page = Page(write_page(tmp_path, "Results", []))
        assert [unquote(link) for link in page.links] == sorted(names)
        assert page.text["a"] == sorted(names)
    for link in page.links:
        parts = urlsplit(link)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert (tmp_path / unquote(parts.path)).is_file()


def test_it_needs_no_server(tmp_path: Path) -> None:
    section = Section("One", images={"a.png": "A"}, links={"map.html": "Map"})
    path = write_page(tmp_path, "Results", [section])
    assert path == tmp_path / "index.html"
    html = path.read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'" in html
    assert 'lang="en"' in html
    page = Page(path)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.images == [("a.png", "A")]
    assert page.links == ["map.html"]
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_tables(tmp_path: Path) -> None:
    rows = [
        {"layer": "0", "CKA": 0.123456, "n": 3, "p": float("nan")},
        {"layer": "1", "CKA": 1.0, "n": None},
    ]
    page = Page(write_page(tmp_path, "Results", [Section("One", table=rows), Section("Two", ["no table"])]))
    assert page.tags.count("table") == 1
    assert page.text["th"] == ["layer", "CKA", "n", "p"]
    assert page.tags.count("td") == 8
    assert page.text["td"] == ["0", "0.1235", "3", "undefined", "1", "1.0000"]  # and two empty cells


def test_the_folder_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "none", "Results", [])
