"""`lit-cka fit` and every config, for a few steps on small data in real formats; the demo as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_cka.commands import training
from lit_cka.data.tokenizer import load_tokenizer
from tests import small_models

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in configs (`runs/...`) belong to the current folder."""
    monkeypatch.chdir(tmp_path)

    (tmp_path / "configs").symlink_to(CONFIGS)


def run(subcommand: str, config: str, *overrides: str) -> training.TrainCLI:
    few = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    few += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"]
    return training.main([subcommand, "--config", f"configs/{config}", *few, *overrides])


def logged_tags(folder: str) -> list[str]:
    accumulator = EventAccumulator(folder)
    accumulator.Reload()
    return [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("cka/")]


# Few samples, and thus the hint that CKA is biased there.
biased = pytest.mark.filterwarnings("ignore:CKA is biased upward:UserWarning")


@biased
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the test is another run, in another folder
def test_clip_imagefolder(tmp_path: Path) -> None:
    weights = small_models.tiny_clip(tmp_path / "clip")
    root = small_models.image_folder(tmp_path / "data")
    options = [f"--model.init_args.model_name={small_models.CLIP_NAME}", f"--model.init_args.pretrained={weights}"]
    options += ["--model.init_args.num_classes=3", f"--data.init_args.root={root}"]
    options += ["--data.init_args.batch_size=4", "--data.init_args.num_workers=0"]
    cli = run("fit", "clip_imagefolder.yaml", *options)
    blocks = [f"cka/model.visual.transformer.resblocks.{index}" for index in range(3)]
    assert logged_tags(cli.trainer.log_dir) == [*blocks, "cka/mean", "cka/num_samples"]
    checkpoint = cli.trainer.checkpoint_callback.last_model_path
    tested = run("test", "clip_imagefolder.yaml", *options, f"--ckpt_path={checkpoint}")
    assert "test_acc" in tested.trainer.callback_metrics
    # The reference of a test on its own: the weights that the config starts from.
    assert 0 < tested.trainer.callback_metrics["cka/mean"] < 1


@biased
def test_convnext_imagefolder(tmp_path: Path) -> None:
    name = small_models.tiny_convnext(tmp_path / "model")
    root = small_models.image_folder(tmp_path / "data")
    options = [f"--model.init_args.model_name={name}", "--model.init_args.num_classes=3"]
    options += [f"--data.init_args.root={root}", "--data.init_args.batch_size=4", "--data.init_args.num_workers=0"]
    cli = run("fit", "convnext_imagefolder.yaml", *options)
    blocks = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"]
    assert logged_tags(cli.trainer.log_dir) == [
        *(f"cka/model.{block}" for block in blocks),
        "cka/mean",
        "cka/num_samples",
    ]


@biased
@pytest.mark.parametrize(("source", "encoder"), [("files", "bert"), ("dataset", "distilbert")])
def test_text_classification(tmp_path: Path, source: str, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = getattr(small_models, f"tiny_{encoder}")(tmp_path / "model")
    files = small_models.text_files(tmp_path / "set")
    options = [
        f"--model.init_args.model_name={model}",
        "--trainer.val_check_interval=0.5",
        "--data.init_args.batch_size=8",
    ]
    if source == "files":
        options += ["--data.init_args.dataset=null"]
        options += [f"--data.init_args.{part}={file}" for part, file in files.items()]
    else:
        (tmp_path / "set" / "test.parquet").unlink()
        (tmp_path / "set" / "val.jsonl").rename(tmp_path / "set" / "test.jsonl")
        (tmp_path / "set" / "train.csv").unlink()
        options += [f"--data.init_args.dataset={tmp_path / 'set'}", "--data.init_args.train=test"]
    cli = run("fit", "text_classification.yaml", *options)
    blocks = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer"}[encoder]
    assert logged_tags(cli.trainer.log_dir) == [
        *(f"cka/model.{blocks}.{index}" for index in range(3)),
        "cka/mean",
        "cka/num_samples",
    ]
    assert len(cli.trainer.callbacks[0].history) == 2  # twice within the epoch
    # For transformers, with the tokenizer.
    folder = tmp_path / "runs/text_classification/model"
    written = load_file(folder / "model.safetensors")
    assert {f"model.{name}" for name in written} == {name for name in cli.model.state_dict() if name[:6] == "model."}
    for name, value in written.items():
        torch.testing.assert_close(value, cli.model.state_dict()[f"model.{name}"], rtol=0, atol=0)
    assert load_tokenizer(folder)("a good film")["input_ids"] == load_tokenizer(model)("a good film")["input_ids"]
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_for_transformers_that_can_not_be_written_is_an_error_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    for option, message in (
        ("there", "`save_pretrained` to be a new folder, but 'there' exists already. Remove it"),
        ("new", "a method `save_pretrained`, such as TextClassifier, but ImageClassifier has none"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("fit", "digits_pretrain.yaml", f"--save_pretrained={option}")
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "digits").exists() or not list((tmp_path / "runs" / "digits").glob("*.ckpt"))
    assert not (tmp_path / "new").exists()


def test_a_wrong_key_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "digits.yaml", "--trainer.max_epochz=3")
    assert "max_epochz" in capsys.readouterr().err


def test_a_wrong_key_in_the_callback_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (CONFIGS / "digits.yaml").read_text()
    callback = "- class_path: lit_cka.CKACallback\n"
    config = config.replace(callback, f"{callback}      init_args: {{layer: blocks.0}}\n")
    assert "layer: blocks.0" in config
    (tmp_path / "wrong.yaml").write_text(config)
    with pytest.raises(SystemExit):
        training.main(["fit", "--config", "wrong.yaml"])
    assert "layer" in capsys.readouterr().err


def test_pretraining_needs_a_place_for_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text("seed_everything: 0\n")
    with pytest.raises(SystemExit) as ended:
        run("fit", "digits.yaml", "--pretrain=p.yaml")
    assert ended.value.code == 1
    assert "'p.yaml' to have `save_weights`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_saved_config_trains_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with a list of layers, which jsonargparse may take for a callable."""
    monkeypatch.delenv("UV", raising=False)  # as from a shell in which the package is installed
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--pretrain=null", "--save_weights=null"]
    few += ["--model.checkpoint=null", "--trainer.callbacks.layers=[model.blocks.0, '*.blocks.1']"]
    first = training.main(["fit", "--config", "digits", *few])
    assert "Look at it with: tensorboard --logdir runs/digits" in capsys.readouterr().out
    saved = Path(first.trainer.log_dir) / "config.yaml"
    again = training.main(["fit", "--config", str(saved)])
    scores = [cli.trainer.callbacks[0].history[-1]["scores"] for cli in (first, again)]
    assert list(scores[0]) == ["model.blocks.0", "model.blocks.1"]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_on_several_ranks_the_end_is_said_once(tmp_path: Path) -> None:
    """By any name of a config, from any folder; Lightning starts the other processes as this one was started."""
    command = [sys.executable, "-m", "lit_cka", "fit", "--config", "digits"]
    command += ["--pretrain=null", "--model.checkpoint=null"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    command += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2"]
    env = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "UV": "/bin/uv"}
    (tmp_path / "configs").unlink()
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Look at it with: uv run tensorboard --logdir runs/digits") == 1
    assert (tmp_path / "runs/digits/tensorboard/version_0/cka/cka_history.json").is_file()
    assert (tmp_path / "runs/digits/finetuned.ckpt").is_file()


def test_demo(tmp_path: Path) -> None:
    """As in the README, but for the number of epochs: a pre-training, then a tracked fine-tuning, and what it says."""
    pretrain = (CONFIGS / "digits_pretrain.yaml").read_text()
    assert "max_epochs: 20" in pretrain
    (tmp_path / "pretrain.yaml").write_text(pretrain.replace("max_epochs: 20", "max_epochs: 5"))
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", "configs/digits.yaml"]
    command += ["--trainer.max_epochs=4", "--pretrain=pretrain.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, text=True, capture_output=True, timeout=280, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/digits/tensorboard/version_0"
    history = json.loads((folder / "cka/cka_history.json").read_text())
    assert [record["step"] for record in history] == sorted({record["step"] for record in history})
    last = history[-1]["scores"]
    assert list(last) == [f"model.blocks.{index}" for index in range(6)]
    assert last["model.blocks.0"] > last["model.blocks.5"]  # what is learned anew is learned at the top
    assert logged_tags(str(folder)) == [*(f"cka/{name}" for name in last), "cka/mean", "cka/num_samples"]
    assert not re.search("Tip:|LeafSpec|FLOPs|rank_zero_warn", done.stdout + done.stderr)
    for said in ("val_acc: 0.", "cka_heatmap.png", "tensorboard --logdir", "blocks.5", "cka/model.<layer>", "verdict"):
        assert said in done.stdout
    assert (folder / "cka/cka_heatmap.png").read_bytes().startswith(b"\x89PNG")
    weights = [
        torch.load(tmp_path / f"runs/digits/{name}.ckpt", weights_only=True) for name in ("pretrained", "finetuned")
    ]
    assert weights[0]["state_dict"].keys() == weights[1]["state_dict"].keys()


@pytest.mark.slow
def test_the_demo_has_layers_of_all_three_verdicts(tmp_path: Path) -> None:
    """As the README shows it, in words and in a picture."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "fit",
        "--config",
        "digits",
        "--trainer.enable_progress_bar=false",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, text=True, capture_output=True, timeout=280, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    words = re.findall(r"blocks\.\d .* (untouched|refined|rewritten) ", done.stdout)
    assert len(words) == 6
    assert list(dict.fromkeys(words)) == ["untouched", "refined", "rewritten"]
    assert float(re.findall(r"val_acc: ([\d.]+)", done.stdout)[-1]) > 0.88
