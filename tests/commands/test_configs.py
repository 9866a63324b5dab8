"""`lit-cka configs`, and configs found by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_cka.__main__ import run
from lit_cka.commands.configs import find_config, shipped

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_configs_of_the_repository_ship() -> None:
    assert shipped() == {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def test_every_config_begins_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert names == list(shipped()) == [line.split()[0] for line in lines]
    for line in lines:
        assert line.endswith((".", ").")), line
        first = shipped()[line.split()[0]].read_text().splitlines()[0]
        assert line.endswith(first.removeprefix("# "))


def test_a_reader_may_have_enough() -> None:
    """As `head` has, which closes the pipe."""
    env = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    command = [sys.executable, "-m", "lit_cka", "configs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_a_config_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(["configs", name])
    assert capsys.readouterr().out == (CONFIGS / "digits.yaml").read_text()


def test_a_copy_is_whole_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["configs", "digits", "--copy", "new/folder"])
    copied = tmp_path / "new" / "folder" / "digits.yaml"
    assert copied.read_text() == (CONFIGS / "digits.yaml").read_text()
    assert capsys.readouterr().out == "new/folder/digits.yaml\n"
    copied.write_text("mine: 1\n")
    with pytest.raises(SystemExit) as ended:
        run(["configs", "digits", "--copy", "new/folder"])
    assert ended.value.code == 1
    assert "'new/folder/digits.yaml' exists already" in capsys.readouterr().err
    assert copied.read_text() == "mine: 1\n"
    assert [path.name for path in copied.parent.iterdir()] == ["digits.yaml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["digitz"], "got 'digitz'; did you mean `digits`"),
        (["--copy", "."], "the name of a config to copy"),
    ],
)
def test_wrong_names(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["configs", *args])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_copy_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        run(["configs", "digits", "--copy", "file"])
    assert ended.value.code == 1
    assert "Expected `--copy` to be a folder to write to, but got 'file'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_a_name_is_a_config_that_ships(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("digits").mkdir()  # a folder is no config
    assert find_config(name) == str(CONFIGS / "digits.yaml")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["digits", "digits.yaml"])
def test_a_file_wins_over_a_config_that_ships_and_that_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("digits.yaml").write_text("seed: 1\n")
    assert find_config(name) == "digits.yaml"
    said = capsys.readouterr().err
    assert said.startswith(f"note: `{name}` is digits.yaml of this folder")
    assert str(CONFIGS / "digits.yaml") in said
    assert said.count("\n") == 1


def test_paths_are_taken_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    Path("own").mkdir()
    for path in ("own/digits.yaml", "other.yaml", "plain"):
        Path(path).write_text("seed: 1\n")
        assert find_config(path) == path
    assert find_config("configs/digits.yaml") == "configs/digits.yaml"  # the one that ships, by its path
    for other in ("s3://bucket/digits.yaml", "{seed: 1}", "seed: 1\nn: 2"):
        assert find_config(other) == other
    assert capsys.readouterr().err == ""


def test_what_is_not_there_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match=r"at 'digts', but there is none; did you mean `digits`"):
        find_config("digts")
    with pytest.raises(FileNotFoundError, match=r"at 'own/digits\.yaml', but there is none; did you mean `digits`"):
        find_config("own/digits.yaml")  # a folder that was named is not looked past
    with pytest.raises(FileNotFoundError, match=r"but there is none\. `lit-cka configs` lists those that ship\."):
        find_config("nothing_like_it.yaml")
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Expected a config file, but 'folder' is a folder"):
        find_config("folder")


def test_configs_name_others_that_are_found_from_any_folder() -> None:
    content = {name: yaml.safe_load(path.read_text()) for name, path in shipped().items()}
    named = [each["pretrain"] for each in content.values() if "pretrain" in each]
    needed = [how for each in content.values() for how in each.get("needs", {}).values()]
    named += [how if isinstance(how, str) else how[0] for how in needed]
    assert len(named) >= 2
    for name in named:
        assert find_config(name) == str(shipped()[name])
