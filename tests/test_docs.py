"""The code in docs/ runs, from top to bottom, and makes the pictures that the pages show; names and links are there."""

from __future__ import annotations

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LONG = ("monosoup", "study", "where_finetuning_rewrites", "attach", "lora", "freezing", "forgetting")
WITHOUT_CODE = ("index", "how_it_works", "sharded")
PAGES = sorted(page for page in DOCS.glob("*.md") if page.stem not in WITHOUT_CODE)
HOW_TO = sorted(page for page in (DOCS / "how_to").glob("*.md") if "```python" in page.read_text())
EVERY_PAGE = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def parameters(pages: list[Path]) -> list[object]:
    """What the long ones show has tests of its own."""
    return [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in pages]


def run_code(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.filterwarnings("ignore:The dataloader")
@pytest.mark.parametrize("page", parameters(PAGES), ids=[page.stem for page in PAGES])
def test_a_tutorial_runs_and_ends_in_its_picture(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_code(page)
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text())
    assert pictures
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 5_000
        assert (DOCS / picture).is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
@pytest.mark.parametrize("page", parameters(HOW_TO), ids=[page.stem for page in HOW_TO])
def test_the_code_of_a_how_to_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_code(page)


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


def public_names() -> set[str]:
    """Of `__all__` of every package, as `lit_cka.package.name`."""
    names = set()
    for file in (ROOT / "lit_cka").rglob("__init__.py"):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {f"{package}.{name}" for name in ast.literal_eval(node.value)}
    return names


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    entries = [
        entry
        for page in (DOCS / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(entries) == len(set(entries))
    names = public_names()
    assert len(names) > 80
    # One entry is enough for what two packages hand on.
    names -= {"lit_cka.tracking.CKACallback", "lit_cka.MonoSoupEditor"}
    names -= {"lit_cka.control.FreezeConverged", "lit_cka.control.DriftBudget"}
    assert names - set(entries) == set()
    others = {entry for entry in entries if entry not in names}
    assert {entry.rpartition(".")[0] for entry in others} == {"lit_cka.functional.edits"}


def test_every_public_name_has_an_example_that_runs() -> None:
    """In its docstring, where the suite's doctests find it; one that is skipped runs nowhere."""
    without = []
    for page in (DOCS / "reference").glob("*.md"):
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            package, _, name = entry.rpartition(".")
            found = getattr(import_module(package), name).__doc__ or ""
            if all(example.options.get(doctest.SKIP) for example in doctest.DocTestParser().get_examples(found)):
                without.append(entry)
    assert without == []


def test_the_site_has_every_page_once() -> None:
    pages = re.findall(r"^ *- (?:[^:#\n]+: )?(\S+\.md)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) == len(set(pages))
    hook = ast.parse((ROOT / ".ci" / "site_pages.py").read_text())
    (outside,) = (
        ast.literal_eval(node.value)
        for node in hook.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OUTSIDE"
    )
    assert all((ROOT / path).is_file() for path in outside.values())
    in_docs = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(pages) == in_docs | {name for name in outside if name.endswith(".md")}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=[str(page.relative_to(ROOT)) for page in EVERY_PAGE])
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", prose)  # relative: an address has a colon
    assert [link for link in links if not (page.parent / link).exists()] == []
