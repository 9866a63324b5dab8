"""Wrong options: one line on stderr with what was expected, what came and the nearest names, and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_cka.__main__ import run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], line: str, *more: str) -> str:
    """What is said of a command line that is wrong, in one line, or in two of which the second is an example."""
    with pytest.raises(SystemExit) as ended:
        run([*line.split(), *more])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    first, _, second = captured.err.removesuffix("\n").partition("\n")
    assert first.startswith("error: ")
    assert second == "" or second.startswith(f"For example: lit-cka {line.split()[0]} ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fit --config digits --trainer.max_epoch 3", "got `--trainer.max_epoch`; did you mean `--trainer.max_epochs`"),
        ("fit --config digits --max_epochs=3", "got `--max_epochs`; did you mean `--trainer.max_epochs`?"),
        ("fit --config digits --model.num_class 3", "got `num_class`; did you mean `num_classes`?"),
        (
            "fit --config digits --data.init_args.batchsize 3",
            "DigitsDataModule in `data`, but got `batchsize`; did",
        ),
        ("fit --config digits --nothing 3", "Expected an option of lit-cka fit, but got `--nothing`"),
        ("compare --settings.measur=cka --output=o", "got `--settings.measur`; did you mean `--settings.measure`"),
        ("compare --output=o --output_folder=o", "got `--output_folder`"),
        ("edit --pretrain a --finetuned b --output c", "got `--pretrain`; did you mean `--pretrained`"),
        ("monosoup --config monosoup_digits --editor.rulez x", "got `--editor.rulez`; did you mean `--editor.rule`"),
        ("fit digits", "Expected options, `--name value`, but got 'digits'. Did you mean `--config digits`?"),
        ("edit base tuned", "Expected options, `--name value`, but got 'base'."),
    ],
)
def test_unknown_options(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, line)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ("max_epochs", "max_epoch"),
            "an option of lit-cka fit, but got `trainer.max_epoch` in wrong.yaml; did you mean",
        ),
        (("model:\n", "modell:\n"), "an option of lit-cka fit, but got `modell` in wrong.yaml; did you mean `model`?"),
        (
            ("num_classes", "num_class"),
            "an argument of lit_cka.models.ImageClassifier in `model`, but got `num_class`",
        ),
        (
            (
                "- class_path: lit_cka.CKACallback\n",
                "- class_path: lit_cka.CKACallback\n      init_args: {debias: true}\n",
            ),
            "CKACallback in `trainer.callbacks`, but got `debias` in wrong.yaml; did you mean",
        ),
        (
            ("DigitsDataModule", "DigitDataModule"),
            "`data` to be a class, but 'lit_cka.data' has no 'DigitDataM",
        ),
        (("max_epochs: 20", "max_epochs: many"), "Expected `trainer.max_epochs` to be an int, but got 'many'."),
        (("batch_size: 16", "batch_size: big"), "Expected `data.init_args.batch_size` to be an int, but got 'big'."),
        (("seed_everything", "\tseed"), "Expected 'wrong.yaml' to be YAML, but in line 2: "),
    ],
)
def test_wrong_configs(wrong: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = (CONFIGS / "digits.yaml").read_text()
    assert wrong[0] in content
    Path("wrong.yaml").write_text(content.replace(*wrong, 1))
    assert said in refused(capsys, "fit --config wrong.yaml")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fit --config nope.yaml", "Expected a config at 'nope.yaml', but there is none."),
        ("fit --config digit", "Expected a config at 'digit', but there is none; did you mean `digits`"),
        ("fit -c compare_digit", "did you mean `compare_digits`"),
        ("probe --config folder", "Expected a config file, but 'folder' is a folder."),
        ("compare --config", "Expected a value for `--config`, but got none."),
    ],
)
def test_configs_that_are_not_there(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    assert said in refused(capsys, line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "compare",
            "Expected `--output` (Folder for the results), but got none.\nFor example: lit-cka compare --config",
        ),
        (
            "edit --pretrained a --output b",
            "Expected `--finetuned` (W1: a safetensors file, a folder of `save_pretrained`",
        ),
        (
            "fit",
            "`--model` (A LightningModule, by its class path), but got none.\nFor example: lit-cka fit --config digits",
        ),
        ("probe --output o", "Expected `--before` (The pretrained model"),
        ("monosoup", "`--editor.pretrained` (W0: a module"),
    ],
)
def test_required_options(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fit --config digits --trainer.max_epochs x", "Expected `trainer.max_epochs` to be an int, but got 'x'."),
        ("edit --pretrained a --finetuned b --output c --R x", "Expected `R` to be a float, but got 'x'."),
        (
            "edit --pretrained a --finetuned b --output c --rule x",
            "`--rule` to be one of 'effective_rank', 'freevariance', ",
        ),
        (
            "compare --output=o --settings.measure=cca",
            "to be one of 'cka', 'minibatch_cka', 'rbf_cka', 'sampled_features_cka', 'rsa', ",
        ),
        ("compare --output=o --num_threads=0", "Expected `num_threads` to be a PositiveInt, but got '0'."),
        ("compare --output=o --models=x", "Expected `models` to be a list, but got 'x'."),
        (
            "fit --config digits --model lit_cka.models.ImageClassifer",
            "no 'ImageClassifer'; did you mean",
        ),
        ("fit --config digits --model no_module.X", "could not use 'no_module.X': No module named 'no_module'"),
        ("fit --config digits --trainer.callbacks=x", "`trainer.callbacks` to be a list or a class path, but got 'x'."),
    ],
)
def test_wrong_values(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, line)


def test_an_argument_that_a_class_must_have(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "compare --output=o", "--models=[{class_path: lit_cka.analysis.TextModel}]")
    assert "Expected `models.init_args.path`, which lit_cka.analysis.TextModel takes, but got none." in said


def test_the_later_config_wins_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("trainer: {max_epochs: 3}\nnum_threads: 1\n")
    with pytest.raises(SystemExit) as ended:
        run(["fit", "--config", "digits", "--config", "mine.yaml", "--print_config"])
    captured = capsys.readouterr()
    assert ended.value.code == 0
    assert captured.err == (
        f"note: `trainer.max_epochs`: mine.yaml wins over {CONFIGS / 'digits.yaml'}, since it comes later.\n"
    )
    assert "  max_epochs: 3\n" in captured.out
    with pytest.raises(SystemExit):
        run(["fit", "--config", "mine.yaml", "--config", "digits", "--print_config"])
    captured = capsys.readouterr()
    assert f"{CONFIGS / 'digits.yaml'} wins over mine.yaml" in captured.err
    assert "  max_epochs: 20\n" in captured.out
