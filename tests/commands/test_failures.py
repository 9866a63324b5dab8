"""Errors that a user can mend are a line and status 1; bugs and code of the user's own keep their traceback."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from lit_cka.__main__ import run
from lit_cka.commands.failures import failing_in_a_line

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def code_of(module: str, source: str) -> Callable[[], None]:
    """A function `f` as if it stood in `module`."""
    made = ModuleType(module)
    exec(compile(source, f"{module}.py", "exec"), vars(made))
    function: Callable[[], None] = vars(made)["f"]
    return function


def guarded(function: Callable[[], None]) -> Callable[[], None]:
    """`function` within a command of ours."""
    made = ModuleType("lit_cka.commands.some")
    vars(made).update(guard=failing_in_a_line, function=function)
    exec("def f():\n    with guard():\n        function()\n", vars(made))
    command: Callable[[], None] = vars(made)["f"]
    return command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ValueError('Expected a,\\n  but got b.')", "error: Expected a, but got b.\n"),
        ("FileNotFoundError('none at x')", "error: none at x\n"),
        ("ImportError('takes datasets: pip install x')", "error: takes datasets: pip install x\n"),
        (
            "PermissionError(13, 'Permission denied', 'out/x')",
            "error: Expected access to 'out/x', but got 'Permission den",
        ),
    ],
)
@pytest.mark.parametrize("module", ["lit_cka.editing.some", "lightning.pytorch.some", "transformers.some", "json.some"])
def test_what_can_be_mended_is_a_line(error: str, said: str, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        guarded(code_of(module, f"def f(): raise {error}"))()
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "source", "kind"),
    [
        ("lit_cka.editing.some", "def f(): None.x", AttributeError),
        ("lit_cka.editing.some", "def f(): assert False", AssertionError),
        ("lit_cka.editing.some", "def f(): from lit_cka.files import nothing", ImportError),
        ("lightning.pytorch.some", "def f(): raise RuntimeError('x')", RuntimeError),
        ("their_package.model", "def f(): raise ValueError('x')", ValueError),
        ("mine", "def f(): open('none')", FileNotFoundError),
    ],
)
def test_bugs_and_code_of_the_user_keep_the_traceback(module: str, source: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        guarded(code_of(module, source))()


def test_what_a_user_s_code_caused_keeps_the_traceback() -> None:
    """Also where a library makes another error of it, as jsonargparse does for a class that can't be made."""
    theirs = code_of("mine", "def f(): raise ValueError('x')")
    between = code_of(
        "jsonargparse.some",
        "def f():\n    try:\n        theirs()\n    except ValueError as e:\n        raise ValueError('y') from e\n",
    )
    between.__globals__["theirs"] = theirs  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="y"):
        guarded(between)()


def test_a_model_of_the_user_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_of_a_user.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Model(pl.LightningModule):\n"
        "    def __init__(self):\n"
        "        raise ValueError('in my own code')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["fit", "--model=model_of_a_user.Model", "--data=lit_cka.data.DigitsDataModule"]
    with pytest.raises(ValueError, match="in my own code"):
        run([*line, "--trainer.accelerator=cpu", "--seed_everything=0"])


def without_overriding_permissions() -> None:
    """A superuser may write anywhere: give that up, in a process that is about to run something else."""
    if os.geteuid() == 0:
        drop_from_bounding_set, dac_override = 24, 1
        ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


SCRIPT = """
import sys
from lit_cka.__main__ import run
for line in sys.argv[1:]:
    try:
        run(line.split())
    except SystemExit as ended:
        assert ended.code == 1, ended.code
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's capabilities")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Said before anything is computed; in one process, which loads the libraries once."""
    edit = "edit --pretrained W0.safetensors --finetuned W1.safetensors --output"
    cases = {
        f"{edit} out/edited.safetensors": "Expected access to 'out",
        f"{edit} edited.safetensors": "Expected access to 'edited.safetensors",
        "compare --features W0.safetensors --output out": "Expected `output` to be a folder that can be written to",
        "configs digits --copy .": "Expected `--copy` to be a folder to write to, but got '.': Permission denied.",
        "fit --config digits": "Expected `trainer.default_root_dir` to be a folder that can be written to",
    }
    torch.manual_seed(0)
    for name in ("W0", "W1"):
        save_file({"weight": torch.randn(4, 4)}, tmp_path / f"{name}.safetensors")
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *cases], text=True, capture_output=True, timeout=200, env=ENV, cwd=tmp_path,
            preexec_fn=without_overriding_permissions,
        )  # fmt: skip
    finally:
        tmp_path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line != "Seed set to 0"]
    assert len(errors) == len(cases), done.stderr
    for error, said in zip(errors, cases.values(), strict=True):
        assert error.startswith(f"error: {said}")
    assert {path.name for path in tmp_path.iterdir()} == {"W0.safetensors", "W1.safetensors"}


def test_of_several_ranks_the_first_alone_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun (RANK), and where Lightning has started the processes (LOCAL_RANK)."""
    line = ["edit", "--pretrained", "none", "--finetuned", "none", "--output", "out"]
    for name, value, speaks in (("LOCAL_RANK", "1", False), ("LOCAL_RANK", "0", True), ("RANK", "2", False)):
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            run(line)
        assert ended.value.code == 1
        assert bool(capsys.readouterr().err) == speaks
