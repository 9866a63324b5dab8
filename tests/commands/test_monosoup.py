"""`lit-cka monosoup` from the command line to the files, on tiny checkpoints of the demo's model."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_cka import MonoSoupEditor
from lit_cka import __main__ as lit_cka_command
from lit_cka.commands import monosoup, training
from lit_cka.data import DigitShiftsDataModule, ImageNetShiftsDataModule
from lit_cka.models import CLIPImageClassifier, ImageClassifier
from tests.tracking.helpers import trainer

ROOT = Path(__file__).parents[2]
CONFIG = "configs/monosoup_digits.yaml"


def digit_model(seed: int) -> ImageClassifier:
    arguments = yaml.safe_load((ROOT / CONFIG).read_text())["editor"]["model"]["init_args"]
    torch.manual_seed(seed)
    return ImageClassifier(**arguments)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pretrained.ckpt`, and `finetuned.ckpt` not far from it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pretrained, other = digit_model(0).state_dict(), digit_model(1).state_dict()
    finetuned = {name: value + 0.3 * (other[name] - value) for name, value in pretrained.items()}
    torch.save({"state_dict": pretrained, "epoch": 1}, folder / "pretrained.ckpt")
    torch.save({"state_dict": finetuned, "epoch": 2}, folder / "finetuned.ckpt")
    return folder


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def arguments(checkpoints: Path, *more: str) -> list[str]:
    files = [f"--editor.{name}={checkpoints / name}.ckpt" for name in ("pretrained", "finetuned")]
    few = ["--data.init_args.classes=[5, 6, 7, 8, 9]", "--data.init_args.parts=[test]"]
    return ["monosoup", "--config", CONFIG, *files, *few, "--needs={}", "--output=out", *more]


def run(checkpoints: Path, *more: str) -> MonoSoupEditor:
    editor = lit_cka_command.run(arguments(checkpoints, *more))
    assert isinstance(editor, MonoSoupEditor)
    return editor


def read(name: str) -> Any:
    return json.loads(Path("out", name).read_text())


def in_process(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "analyze.py"), *args]
    return subprocess.run(command, text=True, capture_output=True, timeout=200, env=env)


def test_the_config_end_to_end(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(checkpoints, "--export={monosoup: new/monosoup.ckpt, wise_ft_0.4: new/half.ckpt}")
    printed = capsys.readouterr().out
    variants = ["pretrained", "finetuned", "monosoup", "highonly", "lowonly", "shrink", "shrink_global", "dg_hard"]
    variants += [f"wise_ft_{alpha}" for alpha in (0.2, 0.4, 0.6, 0.8)]
    names = ["digits", "rotated", "noisy", "blurred"]
    pictures = [*(f"cka_{number}_{name}" for number, name in enumerate(names)), "lambdas", "accuracy_plane"]
    expected = {
        "index.html",
        "monosoup.json",
        "summary.json",
        *(f"{name}{end}" for name in pictures for end in (".svg", ".png", ".pdf")),
    }
    assert {path.name for path in Path("out").iterdir()} == expected
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "out", "new"}  # no logs beside
    full = read("monosoup.json")
    assert full["config"]["seed"] == 0
    assert full["config"]["editor"]["pretrained"] == str(checkpoints / "pretrained.ckpt")
    assert full["config"]["data"]["init_args"]["classes"] == [5, 6, 7, 8, 9]
    assert full["config"]["working_directory"] == str(tmp_path)
    assert list(full["metrics"]) == list(read("summary.json")["variants"]) == variants
    # By the API, from the models themselves, the same; with debiased CKA, as the config says.
    editor = MonoSoupEditor(*(checkpoints / f"{name}.ckpt" for name in variants[:2]), digit_model(5), debiased=True)
    trainer(tmp_path / "api").test(editor, datamodule=DigitShiftsDataModule(classes=[5, 6, 7, 8, 9]), verbose=False)
    for variant in variants[:5]:
        for name in names:
            assert full["metrics"][variant][name] == pytest.approx(editor.results.metrics[variant][name], abs=1e-5)
        assert full["cka"]["noisy"].get(variant) == pytest.approx(editor.results.cka["noisy"].get(variant), abs=1e-5)
    for found, record in zip(full["parameters"], editor.edited.records, strict=True):
        assert (found["name"], found["k"], found["reason"]) == (record["name"], record["k"], record["reason"])
        assert found["lambda_low"] == (record["lambda_low"] and pytest.approx(record["lambda_low"], abs=1e-6))
    for said in (
        "Variants by test set",
        "wise_ft_0.8",
        "tensors edited",
        "monosoup: new/monosoup.ckpt",
        "Results: out",
    ):
        assert said in printed
    content = torch.load("new/monosoup.ckpt", weights_only=True)
    assert content["epoch"] == 2
    for name, value in editor.edited.variants["monosoup"].items():
        torch.testing.assert_close(content["state_dict"][name], value)


@pytest.mark.slow
def test_it_is_repeatable_and_options_count(checkpoints: Path) -> None:
    quick = ["--editor.wise_ft=[]", "--editor.max_cka_batches=0", "--trainer.limit_test_batches=1"]
    quick += ["--data.init_args.batch_size=50", "--editor.rule=energy", "--editor.R=0.5"]
    found = []
    for _ in range(2):
        editor = run(checkpoints, *quick, "--seed=7")
        found.append((read("monosoup.json"), editor.results))
        seconds, written_at = (found[-1][0].pop(key) for key in ("seconds", "written_at"))
        assert set(seconds) == {"edit", "test"}
        assert all(0 < value < 600 for value in seconds.values())
        assert abs(datetime.now().astimezone() - datetime.fromisoformat(written_at)).total_seconds() < 600
    assert found[0] == found[1]
    full = found[0][0]
    assert full["config"]["seed"] == 7
    assert full["num_samples"] == dict.fromkeys(("digits", "rotated", "noisy", "blurred"), 50)
    assert set(full["cka"]["digits"]) == set()
    edited = [record for record in full["parameters"] if record["reason"] is None]
    assert edited
    assert all(record["energy"] >= 0.5 for record in edited)


def test_cka_alone_without_pictures(checkpoints: Path) -> None:
    options = ["--editor.evaluate=false", "--editor.cka_sets=[noisy]", "--editor.max_cka_batches=1", "--plots=false"]
    results = run(checkpoints, *options, "--editor.variants=[finetuned, monosoup]").results
    assert results.metrics == {}
    assert {name: list(scores) for name, scores in results.cka.items()} == {"noisy": ["finetuned", "monosoup"]}
    assert sorted(path.suffix for path in Path("out").iterdir()) == [".html", ".json", ".json"]
    summary = read("summary.json")["variants"]
    assert all(0 < summary[name]["cka_mean"]["noisy"] < 1 for name in ("finetuned", "monosoup"))


@pytest.mark.slow
def test_it_is_deterministic_while_it_runs(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during, start = [], MonoSoupEditor.on_test_start

    def seeing(editor: MonoSoupEditor) -> None:
        during.append(torch.are_deterministic_algorithms_enabled())
        start(editor)

    monkeypatch.setattr(MonoSoupEditor, "on_test_start", seeing)
    torch.use_deterministic_algorithms(False)
    run(checkpoints, "--editor.cka_sets=[]", "--trainer.limit_test_batches=1", "--plots=false")
    assert during == [True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("limit", ["1", "1.0", "0.5", "null"])
def test_one_batch_is_not_all(limit: str, checkpoints: Path) -> None:
    """Whatever the order in which a process has made the union of int and float."""
    options = arguments(checkpoints, f"--trainer.limit_test_batches={limit}")[1:]
    parser = monosoup.parser()
    trainer = parser.instantiate_classes(parser.parse_args(options)).trainer
    assert repr(trainer.limit_test_batches) == {"null": "1.0"}.get(limit, limit)


@pytest.mark.slow
def test_what_is_needed_is_trained_first(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fit(args: list[str]) -> None:
        calls.append(args)
        Path("made.ckpt").write_bytes((checkpoints / "finetuned.ckpt").read_bytes())

    monkeypatch.setattr(training, "main", fit)
    Path("some.yaml").touch()
    Path("other.yaml").touch()
    options = ["--needs={made.ckpt: some.yaml}", "--editor.finetuned=made.ckpt", "--editor.max_cka_batches=0"]
    for _ in range(2):
        run(checkpoints, *options, "--editor.wise_ft=[]")
    assert calls == [["fit", "--config", "some.yaml"]]
    with pytest.raises(SystemExit):
        run(checkpoints, "--needs={never.ckpt: other.yaml}")
    assert "Expected 'other.yaml' to write 'never.ckpt' (`save_weights`)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--editor.R=0", "--editor.rule=energy"], 1, "to be in (0, 1], but got 0.0"),
        (["--editor.R=much"], 2, "R"),
        (["--editor.rule=most"], 2, "rule"),
        (["--editor.rulez=energy"], 2, "rulez"),
        (["--trainer.max_epochs=3"], 2, "max_epochs"),
        (["--data.class_path=lit_cka.data.Nothing"], 2, "Nothing"),
        (["--config=none.yaml"], 2, "none.yaml"),
        (["--editor.finetuned=none.ckpt"], 1, "'none.ckpt'"),
        (["--editor.layers=model.block"], 1, "model.block"),
        (["--export={monosoup: there.ckpt}"], 1, "'there.ckpt' exists already"),
        (["--export={monosoop: new.ckpt}"], 1, "wise_ft_0.8), but got ['monosoop']"),
        (["--data.init_args.classes=[]"], 1, ""),
        (["--trainer.limit_test_batches=0"], 1, "Expected samples to test on, but there were none"),
    ],
)
@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_wrong_options_are_one_clear_error(
    checkpoints: Path, options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.ckpt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run(checkpoints, *options)
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert {path.name for path in Path().iterdir()} == {"configs", "there.ckpt"}
    assert Path("there.ckpt").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        lit_cka_command.run(["monosoup", flag])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for option in ("--editor.rule", "--editor.max_cka_batches", "--data", "--trainer.precision", "--export", "--needs"):
        assert option in said
    assert "so many batches of each test set" in said  # from the docstring
    assert "--trainer.max_epochs" not in said


@pytest.mark.slow
def test_as_a_process(checkpoints: Path) -> None:
    done = in_process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = in_process("soup")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "got 'soup'; did you mean `monosoup`?" in done.stderr
    done = in_process(*arguments(checkpoints, "--export={monosoop: new.ckpt}"))
    assert done.returncode == 1
    assert "got ['monosoop']" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_flag_of_the_published_scripts_has_its_option() -> None:
    """As the table in docs/monosoup.md says."""
    rows = [
        line.split("|") for line in (ROOT / "docs/monosoup.md").read_text().splitlines() if line.startswith("| `--")
    ]
    named = {flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[1])}
    assert named >= {"--pretrained-checkpoint", "--cka-datasets", "--run-eval", "--eval-models", "--no-plots", "--R"}
    ours = {option for row in rows for option in re.findall(r"`(--[\w.-]+)", "|".join(row[2:]))} - {"--report"}
    assert len(ours) > 15
    known = {option for action in monosoup.parser()._actions for option in action.option_strings}
    of_data = {option for option in ours if option.startswith(("--data.init_args.", "--editor.model.init_args."))}
    assert ours - of_data <= known
    names = {"--data.init_args.": ImageNetShiftsDataModule, "--editor.model.init_args.": CLIPImageClassifier}
    for prefix, kind in names.items():
        arguments = set(inspect.signature(kind).parameters)
        assert {option.removeprefix(prefix) for option in of_data if option.startswith(prefix)} <= arguments
