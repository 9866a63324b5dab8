"""`lit-cka study` from the command line to the files, on tiny networks; what is wrong is said before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_cka import __main__ as lit_cka_command
from lit_cka.commands import training
from lit_cka.study.study import StudyResults
from tests.commands.test_monosoup_configs import CONFIGS, disturbed, image_sets, know_some_classes, top1_of_v2
from tests.study.helpers import write_checkpoints


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoints(tmp_path / "models")


def arguments(*more: str) -> list[str]:
    options = ["--study.pretrained=models/pretrained.pt", "--study.checkpoints=[models/*.pt]", "--study.device=cpu"]
    options += ["--study.model=tests.study.helpers.Net", '--study.edits={"monosoup": {}, "trim": {"density": 0.3}}']
    return ["study", *options, "--data=tests.study.helpers.Sets", "--output=out", *more]


def run(*more: str) -> StudyResults:
    results = lit_cka_command.run(arguments(*more))
    assert isinstance(results, StudyResults)
    return results


def test_it_prints_a_table_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("models") / "torn.pt").write_bytes(b"no model")
    results = run("--study.wise_ft=[0.5]")
    assert [each.name for each in results.checkpoints] == ["tuned_0", "tuned_1", "tuned_2"]
    said = capsys.readouterr()
    for words in ("Gains in percentage points", "trim", "wise_ft_0.5", "shrinkage", "Report: out/index.html"):
        assert words in said.out
    assert "shrink(trim)" not in said.out
    assert "note: torn was left out." in said.err
    content = json.loads(Path("out/study.json").read_text())
    assert content["config"]["study"]["wise_ft"] == [0.5]
    assert list(content["failed"]) == ["torn"]
    first = Path("out/study.json").read_bytes()
    run("--study.wise_ft=[0.5]")
    assert "3 of 4 checkpoints are evaluated already." in capsys.readouterr().out
    assert Path("out/study.json").read_bytes() == first
    with pytest.raises(SystemExit):
        run("--study.wise_ft=[0.6]")
    said = capsys.readouterr()
    assert "error: Expected the options that the study in 'out' was begun with, but these differ: `study.wise_ft`" in (
        said.err
    )


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--study.edits={monosop: {}}"], 1, "got 'monosop'. Did you mean 'monosoup'?"),
        (["--study.edits={trim: {drop: 0.2}}"], 1, "'drop' is an option of dare."),
        (["--study.checkpoints=[models/tuned_9.pt]"], 1, "'models/tuned_9.pt' in `checkpoints` to be there"),
        (["--study.pretrained=none.pt"], 1, "none.pt"),
        (["--study.include=[block.*]"], 1, "Expected patterns of the model's parameters in `include`"),
        (["--study.max_batches=0"], 1, "Expected `max_batches` to be at least 1"),
        (["--study.device=abacus"], 1, "Expected `device` to be one that computes"),
        (["--study.model=tests.study.helpers.Net", "--study.model.width=9"], 1, "of another architecture"),
        (["--data.num_sets=1"], 1, "Expected at least two test sets"),
        (["--study.edit={}"], 2, "did you mean"),
        (["--output=models/tuned_0.pt"], 1, "Expected `output` to be a folder"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        lit_cka_command.run([each for each in arguments() if not each.startswith("--data")])
    assert ended.value.code == 2
    assert "data" in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_is_needed_is_trained_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fit(args: list[str]) -> None:
        calls.append(args)
        where = next(each for each in args if each.startswith("--save_weights=")).partition("=")[2]
        Path(where).write_bytes(Path("models/tuned_0.pt").read_bytes())

    monkeypatch.setattr(training, "main", fit)
    Path("some.yaml").touch()
    needs = {"models/tuned_0.pt": ["some.yaml"], "models/new.pt": ["some.yaml", "--seed_everything=7"]}
    results = run(f"--needs={json.dumps(needs)}")
    assert calls == [["fit", "--config", "some.yaml", "--seed_everything=7", "--save_weights=models/new.pt"]]
    assert len(results.checkpoints) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run('--needs={"models/other.pt": ["some.yaml"]}')


def test_the_study_of_digits_needs_what_it_reads() -> None:
    """Twelve checkpoints that differ in seed, rate or length, each trained from the pretrained model."""
    config = yaml.safe_load((CONFIGS / "study_digits.yaml").read_text())
    pretrained, *tuned = config["needs"].items()
    assert pretrained[0] == config["study"]["pretrained"]
    folder = Path(config["study"]["checkpoints"][0]).parent
    assert all(Path(path).parent == folder for path, _ in tuned)
    assert len(tuned) == len({tuple(how) for _, how in tuned}) >= 12
    finetuning = yaml.safe_load((CONFIGS / "study_digits_finetune.yaml").read_text())
    assert finetuning["model"]["init_args"]["checkpoint"] == pretrained[0]
    model = config["study"]["model"]["init_args"]
    assert {**finetuning["model"]["init_args"], **model} == finetuning["model"]["init_args"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ObjectNet has 18574 images")
def test_the_study_of_model_soups_on_small_models(tmp_path: Path) -> None:
    from lit_cka.models import CLIPImageClassifier
    from tests import small_models

    small_models.tiny_clip(tmp_path / "clip")
    model = CLIPImageClassifier(small_models.CLIP_NAME, 1000)
    know_some_classes(model.classification_head)
    tuned: Any = model
    for number in (0, 2, 10):
        held = {f"module.{key}": value.clone() for key, value in tuned.state_dict().items()}
        torch.save({**held, "module.model.logit_scale": torch.ones(())}, tmp_path / "models" / f"model_{number}.pt")
        disturbed(tuned)
    options = [
        "--config",
        str(CONFIGS / "study_model_soups.yaml"),
        *image_sets(tmp_path / "data"),
        "--study.device=cpu",
    ]
    name = f"--study.model.init_args.model_name={small_models.CLIP_NAME}"
    results = lit_cka_command.run(["study", *options, name, "--output=out"])
    assert isinstance(results, StudyResults)
    assert [each.name for each in results.checkpoints] == ["model_2", "model_10"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in held.items()})
    v2 = results.checkpoints[1].sets[1]
    place = results.checkpoints[1].variants.index("finetuned")
    assert v2.right[place].mean() == pytest.approx(top1_of_v2(model, tmp_path / "data"))
    assert 0 < v2.right[place].mean() < 1
    content = json.loads(Path("out/study.json").read_text())
    assert next(iter(content["test_sets"])) == "ImageNet"
    assert {each["label"] for each in content["edits"]} >= {"monosoup", "lines", "shrink(trim)", "wise_ft_0.8"}
