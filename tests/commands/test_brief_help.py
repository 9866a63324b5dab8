"""Help that fits a screen or two, and the rest of it behind `--help.all`."""

from __future__ import annotations

import re

import pytest

from lit_cka.__main__ import COMMANDS, run

WITH_OPTIONS = [command for command in COMMANDS if command != "configs"]


def help_of(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        run([command, flag])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_the_help_fits_a_screen_or_two(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(command, "--help", capsys)
    lines = said.splitlines()
    assert re.fullmatch(rf"usage: lit-cka {command} (A B \[C\] )?\[options\]", lines[0])
    assert len(lines) <= 60
    assert lines[-2] == f"Every option, in full: lit-cka {command} --help.all; as a config: --print_config."
    assert lines[-1].startswith(f"For example: lit-cka {command} ")
    assert all(len(line) < 80 for line in lines[:-2])
    options = re.findall(r"^  (?:-c, )?(--\S+)", said, re.MULTILINE)
    assert options[0] == "--config"
    own = ["." not in option for option in options]
    assert own == sorted(own, reverse=True)  # the command's own options first
    assert len(options) == len(set(options)) > 5


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_the_full_help_has_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    brief, full = help_of(command, "--help", capsys), help_of(command, "--help.all", capsys)
    assert set(re.findall(r"^  (?:-c, )?(--[\w.]+)", brief, re.MULTILINE)) <= set(re.findall(r"--[\w.]+", full))
    assert "--print_config" in full
    if command in ("fit", "test"):
        assert "--trainer.barebones" in full
        assert "--trainer.barebones" not in brief


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (
            "fit",
            ["--pretrain ", "--save_weights ", "--model ", "--data ", "--trainer.max_epochs ", "--trainer.callbacks "],
        ),
        ("edit", ["--pretrained ", "--variant ", "--options ", "--keep_pretrained ", "--min_rel_update "]),
        ("diff", ["--output ", "--spectra ", "--trusted ", "--weights "]),
        ("compare", ["--models ", "--data ", "--settings.distance cosine|correlation|euclidean"]),
        ("monosoup", ["--data ", "--editor.pretrained ", "--trainer.precision "]),
        ("probe", ["--before ", "--after "]),
    ],
)
def test_what_is_shown(command: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(command, "--help", capsys)
    for line in lines:
        assert f"  {line}" in said


@pytest.mark.parametrize(
    ("command", "option", "class_path", "argument"),
    [
        ("fit", "--model.help", "lit_cka.models.ImageClassifier", "--model.num_classes"),
        ("compare", "--models.help", "TextModel", "--models.max_length"),
    ],
)
def test_the_help_of_a_class_has_all_of_it(
    command: str, option: str, class_path: str, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run([command, f"{option}={class_path}"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert argument in said
    assert "type: int" in said


def test_defaults_and_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(help_of("edit", "--help", capsys).split())
    assert "--R Share of the energy, for the rule `energy` (0.8)" in said
    assert "--output What to write: as `finetuned`, a file or a folder (required)" in said
    assert "--allow_differences Let tensors that differ in shape be (false)" in said
    assert "--device Where to compute, such as cuda --report" in said
    said = " ".join(help_of("fit", "--help", capsys).split())
    assert "--model A LightningModule, by its class path (required)" in said
    assert "--trainer.accelerator Such as auto, cpu, gpu or mps (auto)" in said


def test_a_narrow_and_a_wide_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, longest in ((10, 52), (500, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = help_of("edit", "--help", capsys).splitlines()[3:-2]
        assert max(map(len, lines)) <= longest
