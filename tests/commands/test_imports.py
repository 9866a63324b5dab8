"""What a command may load before it answers, and what may be imported without Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lit_cka"
# Behind torch and what it loads by itself.
PARSING = {"jsonargparse", "typing_extensions", "yaml", "lazy_loader"}
FOR_SAMPLES = {"xxhash"}
FOR_SIGNATURES = {"attr", "attrs", "docstring_parser", "typeshed_client"}
READING = {"numpy", "rich", "safetensors"}
SLOW = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.onnx"}
SCRIPT = """
import contextlib, io, json, sys
from importlib import import_module
from lit_cka.__main__ import run

loaded = {}
for step in json.loads(sys.argv[1]):
    if step[0] == "import":
        import_module(step[1])
    else:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            run(step)
    loaded[" ".join(step)] = list(sys.modules)
print(json.dumps(loaded))
"""


def loaded_after(steps: list[list[str]]) -> dict[str, set[str]]:
    """The modules that are there after each command or `import`, one after the other."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(steps)], text=True, capture_output=True, timeout=200, env=env
    )
    assert done.returncode == 0, done.stderr
    return {step: set(modules) for step, modules in json.loads(done.stdout).items()}


def packages(modules: set[str]) -> set[str]:
    """Of third parties, by the first part of the name."""
    found = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"lit_cka"}
    # What a system's Python loads by itself (Debian's, say) is not ours.
    return {name for name in found if not name.startswith("_")} - {"sitecustomize", "usercustomize"}


@cache
def without_lightning() -> dict[str, set[str]]:
    commands = [[name, "--help"] for name in ("edit", "diff", "compare", "probe", "project")]
    return loaded_after([["--help"], ["--version"], ["configs"], ["import", "torch"], *commands])


@pytest.mark.parametrize("step", ["--help", "--version", "configs"])
def test_the_first_answers_load_nothing(step: str) -> None:
    assert packages(without_lightning()[step]) <= {"lazy_loader"}


@pytest.mark.parametrize("name", ["edit", "diff", "compare", "probe", "project"])
def test_commands_that_need_torch_load_no_more(name: str) -> None:
    torch, after = without_lightning()["import torch"], without_lightning()[f"{name} --help"]
    assert f"lit_cka.commands.{name}" in after
    assert packages(after) - packages(torch) <= PARSING | FOR_SIGNATURES | READING | FOR_SAMPLES
    assert not (after - torch) & SLOW


@pytest.mark.slow
def test_commands_that_train_load_lightning_and_no_more() -> None:
    found = loaded_after([["import", "lightning.pytorch"], ["monosoup", "--help"], ["fit", "--help"]])
    lightning = packages(found["import lightning.pytorch"])
    assert "lit_cka.tracking.callback" in found["fit --help"]
    assert packages(found["monosoup --help"]) - lightning <= PARSING | FOR_SIGNATURES | READING | FOR_SAMPLES
    assert packages(found["fit --help"]) - lightning <= PARSING | FOR_SIGNATURES | READING | FOR_SAMPLES


def test_mathematics_and_files_take_no_lightning() -> None:
    paths = [*(PACKAGE / "functional").glob("*.py"), *(PACKAGE / "checkpoints").glob("*.py")]
    paths += [PACKAGE / "editing" / f"{name}.py" for name in ("files", "checks", "partial", "parameter", "artifacts")]
    paths += [
        PACKAGE / "editing" / f"{name}.py" for name in ("difference", "tensor_diff", "diff_results", "diff_table")
    ]
    paths.append(PACKAGE / "commands" / "edit.py")
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    found = loaded_after([["import", "torch"], *(["import", name] for name in names)])
    after = found[f"import {names[-1]}"]
    assert set(names) - {"lit_cka.functional.__init__", "lit_cka.checkpoints.__init__"} <= after
    assert not packages(after) & {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
    assert not (after - found["import torch"]) & SLOW
