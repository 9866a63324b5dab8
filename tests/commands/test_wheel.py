"""The wheel by itself: what is in it, and that its command runs where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
pytestmark = pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds and installs it")


def ran(command: Sequence[str | Path], folder: Path) -> str:
    """What a command prints, run without the repository and the environment of the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept, text=True, capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    constraints = folder / "build-constraints.txt"
    constraints.write_text("\n".join(PROJECT["tool"]["uv"]["build-constraint-dependencies"]))
    ran(["uv", "build", "--wheel", "--build-constraints", constraints, "--out-dir", folder, ROOT], folder)
    (built,) = folder.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"lit_cka-{PROJECT['project']['version']}.dist-info"
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        digits = archive.read("lit_cka/configs/digits.yaml").decode()
    assert digits == (ROOT / "configs" / "digits.yaml").read_text()
    assert {path.name for path in (ROOT / "configs").iterdir()} == {
        Path(name).name for name in names if name.startswith("lit_cka/configs/")
    }
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lit_cka").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert {"lit_cka/py.typed", "lit_cka/plots/assets/map.html", f"{info}/licenses/LICENSE"} <= names
    assert "lit-cka = lit_cka.__main__:main" in entry_points
    assert metadata["Name"] == "lit-cka"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# lit_cka\n")
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)} <= set(classifiers)
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_alone(wheel: Path, tmp_path: Path) -> None:
    """The demo and an edit, in a fresh environment and an empty folder."""
    environment, folder = tmp_path / "environment", tmp_path / "folder"
    folder.mkdir()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(PROJECT["tool"]["uv"]["constraint-dependencies"]))
    ran(["uv", "venv", "--python", sys.executable, environment], tmp_path)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    ran(["uv", "pip", "install", "--python", python, "--constraints", constraints, wheel], tmp_path)
    command = python.with_name("lit-cka")

    assert ran([command, "--version"], folder) == f"lit-cka {PROJECT['project']['version']}\n"
    listed = ran([command, "configs"], folder)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        path.stem for path in (ROOT / "configs").iterdir()
    )
    said = ran([command, "fit", "--config", "digits", "--trainer.max_epochs", "1"], folder)
    assert "val_acc: " in said
    assert "First: " in said
    assert (folder / "runs" / "digits" / "tensorboard" / "version_0" / "cka" / "cka_heatmap.png").is_file()

    torch.manual_seed(0)
    W0 = {"layer.weight": torch.randn(16, 16)}
    W1 = {"layer.weight": W0["layer.weight"] + 0.1 * torch.randn(16, 16)}
    for name, weights in (("W0", W0), ("W1", W1)):
        save_file(weights, folder / f"{name}.safetensors")
    files = [f"--{option}={name}.safetensors" for option, name in (("pretrained", "W0"), ("finetuned", "W1"))]
    said = ran([command, "edit", *files, "--output=edited.safetensors"], folder)
    assert "1 of 1 tensors edited" in said
    edited = load_file(folder / "edited.safetensors")["layer.weight"]
    assert not torch.equal(edited, W0["layer.weight"])
    assert (edited - W0["layer.weight"]).norm() < (W1["layer.weight"] - W0["layer.weight"]).norm()
