"""What `lit_cka.analysis` offers by short names."""

import subprocess
import sys

import pytest

import lit_cka.analysis


@pytest.mark.parametrize("name", lit_cka.analysis.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(lit_cka.analysis, name).__name__ == name


def test_a_name_that_is_not() -> None:
    with pytest.raises(AttributeError, match=r"'lit_cka\.analysis' has no attribute 'comparing'"):
        lit_cka.analysis.__getattr__("comparing")


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, lit_cka.analysis; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
