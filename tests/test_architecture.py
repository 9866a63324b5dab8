"""The layers of the package: a module imports from rows above its own, and heavy libraries wait."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_cka"
ROWS = [
    {"files", "progress"},
    {"functional"},
    {"parallel", "features", "checkpoints", "plots"},
    {"metrics", "models", "data"},
    {"samples", "statistics"},
    {"reference"},
    {"tracking"},
    {"editing", "analysis", "control"},
    {"study"},
    {"commands", "tensorboard"},
    {"__init__", "__main__"},
]
HEAVY = {"transformers", "open_clip", "timm", "matplotlib", "plotly", "sklearn", "datasets", "pyarrow", "torchvision"}


def row(part: str) -> int:
    return next(index for index, parts in enumerate(ROWS) if part in parts)


def imports(path: Path, *, top_level: bool) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.iter_child_nodes(tree) if top_level else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_rows_above(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path, top_level=False):
        if name.startswith("lit_cka."):
            imported = name.split(".")[1]
            assert imported == part or row(imported) < row(part), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    if path == PACKAGE / "data" / "images.py":
        return  # torchvision is what this module is about
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY


def test_mathematics_imports_torch_alone() -> None:
    for path in (PACKAGE / "functional").glob("*.py"):
        standard = {"__future__", "collections", "ctypes", "functools", "math", "threading", "typing"}
        assert {name.split(".")[0] for name in imports(path, top_level=True)} <= standard | {"torch", "lit_cka"}, path
        roots = {name.split(".")[0] for name in imports(path, top_level=False)}
        assert roots <= standard | {"torch", "lit_cka", "scipy", "threadpoolctl"}, (
            path
        )  # SciPy's functions where they are called


def test_modules_have_one_idea() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {
        "tracking/callback.py": lengths["tracking/callback.py"]
    }


def test_few_modules_stand_at_the_root() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {
        "__init__.py",
        "__main__.py",
        "metrics.py",
        "files.py",
        "progress.py",
    }


PARTS = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_package_says_what_lives_there_and_what_does_not(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse((path / "__init__.py").read_text()))
    assert docstring is not None
    assert len(docstring.split("\n\n")) == 2
