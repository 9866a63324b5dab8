"""What packages hand on by short names: everything they say, and nothing before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

LAZY = ["analysis", "checkpoints", "control", "data", "editing", "features", "models", "tracking"]
PACKAGES = ["lit_cka", *(f"lit_cka.{package}" for package in (*LAZY, "functional", "plots"))]
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_name_is_there(package: str, name: str) -> None:
    assert getattr(import_module(package), name).__name__ == name
    assert name in dir(import_module(package))


def test_names_come_sorted() -> None:
    for package in PACKAGES:
        names = import_module(package).__all__
        assert names == sorted(names)


@pytest.mark.parametrize("package", ["lit_cka", *(f"lit_cka.{package}" for package in LAZY)])
def test_a_name_that_is_not_there(package: str) -> None:
    with pytest.raises(AttributeError, match=f"{package}.*comparing"):
        import_module(package).__getattr__("comparing")


def test_names_are_imported_when_they_are_asked_for() -> None:
    imports = ", ".join(["lit_cka", *(f"lit_cka.{package}" for package in LAZY)])
    code = f"import sys, {imports}; print(sorted({{'torch', 'lightning', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
