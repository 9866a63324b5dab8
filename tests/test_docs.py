"""The code in docs/*.md runs, from top to bottom, and makes the pictures that the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.filterwarnings("ignore:The dataloader")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
    }
