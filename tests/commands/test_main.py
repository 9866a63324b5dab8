"""`lit-cka` itself: which command, what it says first, and the doors to it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lit_cka
from lit_cka.__main__ import COMMANDS, run

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def ended(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        run(list(args))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, flag)
    assert (code, err) == (0, "")
    for command, (said, _) in COMMANDS.items():
        assert f"  {command} " in out
        assert said in out
    assert len(out.splitlines()) < 25


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys)
    assert (code, err) == (2, "")
    assert out.startswith("usage: lit-cka COMMAND")


@pytest.mark.parametrize(
    ("command", "near"),
    [("fitt", "`fit`"), ("compair", "`compare`"), ("config", "`configs`"), ("soup", "`monosoup`"), ("xyz", "")],
)
def test_an_unknown_command_is_one_line(command: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, command, "--config", "digits")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: Expected a command, but got {command!r}")
    assert err.endswith("`lit-cka --help` lists them.\n")
    assert err.count("\n") == 1
    assert near in err
    assert ("did you mean" in err) == bool(near)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_cka.__version__ == version("lit-cka")
    assert ended(capsys, "--version") == (0, f"lit-cka {version('lit-cka')}\n", "")


@pytest.mark.parametrize("door", [["-m", "lit_cka"], [str(ROOT / "train.py")], [str(ROOT / "analyze.py")]])
def test_every_door_leads_to_it(door: list[str]) -> None:
    done = subprocess.run([sys.executable, *door, "configs"], text=True, capture_output=True, timeout=60, env=ENV)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The first half of the demo" in done.stdout
    done = subprocess.run([sys.executable, *door, "fitt"], text=True, capture_output=True, timeout=60, env=ENV)
    assert done.returncode == 2
    assert "`fit`" in done.stderr


def test_doors_are_a_few_lines() -> None:
    for door in ("train.py", "analyze.py"):
        assert len((ROOT / door).read_text().splitlines()) < 12


def test_an_installed_command_finds_classes_of_the_working_folder(tmp_path: Path) -> None:
    """The script of an installed command has its own folder in `sys.path`, not the working one."""
    (tmp_path / "mine.py").write_text("print('found mine')\n")
    (tmp_path / "json.py").write_text("raise AssertionError('not that of Python')\n")
    script = "from lit_cka.__main__ import main; main(); import json, mine"
    command = [sys.executable, "-P", "-c", script, "configs", "digits"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60, env=ENV)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("found mine\n")
