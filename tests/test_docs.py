"""The code in docs/*.md runs, from top to bottom, and makes the pictures that the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
LONG = ("monosoup", "study", "where_finetuning_rewrites")
PAGES = sorted(set(DOCS.glob("*.md")) - {DOCS / "how_it_works.md", DOCS / "sharded.md"})  # which have no code


@pytest.mark.filterwarnings("ignore:The dataloader")
@pytest.mark.parametrize(
    "page",
    # What those pages show has tests of its own.
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in PAGES],
    ids=[page.stem for page in PAGES],
)
def test_a_tutorial_runs_and_ends_in_its_picture(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, str(page), "exec"), names)
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert pictures
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 5_000
        assert (DOCS / picture).is_file()


def test_there_is_a_page_for_each_system() -> None:
    assert {page.stem for page in PAGES} >= {
        "language_models",
        "where_finetuning_rewrites",
        "map_of_layers",
        "monosoup",
        "study",
    }


def test_the_page_on_how_it_works_names_files_that_are_there() -> None:
    package = DOCS.parent / "lit_cka"
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", (DOCS / "how_it_works.md").read_text())
    assert len(named) > 40
    here = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    # A name without a folder stands behind one of the same folder.
    missing = [name for name in named if name not in here and not any(path.endswith(f"/{name}") for path in here)]
    assert [name for name in missing if not name.startswith("tests/")] == []
