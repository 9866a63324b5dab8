"""From a pretrained encoder to where fine-tuning rewrote it, by the commands of docs/where_finetuning_rewrites.md."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_cka import __main__ as lit_cka_command
from tests import small_models

PAGE = Path(__file__).parents[2] / "docs" / "where_finetuning_rewrites.md"
GOOD = ["wonderful", "moving", "clever", "funny", "honest", "gripping", "lovely"]
BAD = ["dull", "clumsy", "tedious", "hollow", "awful", "lazy", "shallow"]
NOUNS = ["film", "plot", "acting", "script", "music", "cast", "ending", "dialogue", "camera", "story"]
TEMPLATES = (
    "i saw this {noun} with friends last week and the {other} was {word}",
    "the {noun} is {word} , and so is the {other}",
    "what a {word} {noun} ! we talked about the {other} all night",
    "nobody told me that the {noun} would be so {word}",
    "a {word} {other} can not change what the {noun} is about",
)


def reviews(num_reviews: int, seed: int) -> list[dict[str, str | int]]:
    """Sentences as people write them, label 1 for praise."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, str | int]] = []
    for number in range(num_reviews):
        label = number % 2
        sentences = []
        for template in rng.choice(TEMPLATES, 2, replace=False):
            noun, other = rng.choice(NOUNS, 2, replace=False)
            sentences.append(str(template).format(noun=noun, other=other, word=rng.choice(GOOD if label else BAD)))
        rows.append({"text": " . ".join(sentences) + " .", "label": label})
    return rows


def written(path: Path, rows: list[dict[str, str | int]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def documented() -> list[list[str]]:
    """The arguments of each `lit-cka` in the page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [line[line.index("lit-cka") + 1 :] for line in lines if "lit-cka" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CKA is biased upward:UserWarning")
@pytest.mark.parametrize("encoder", ["bert", "distilbert"])
def test_the_documented_chain(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = sorted({word for row in reviews(400, 0) for word in str(row["text"]).split()} | {*GOOD, *BAD, *NOUNS})
    model = str(getattr(small_models, f"tiny_{encoder}")(tmp_path / "pretrained", [*small_models.WORDS[:5], *words]))
    files = {part: written(tmp_path / f"{part}.csv", reviews(n, seed)) for seed, (part, n) in enumerate(PARTS.items())}
    ours = {
        "fit": [
            f"--model.init_args.model_name={model}", "--data.init_args.dataset=null",
            *(f"--data.init_args.{part}={file}" for part, file in files.items()), "--trainer.accelerator=cpu",
            "--trainer.precision=32-true", "--data.init_args.batch_size=16", "--num_threads=1",
        ],
        "probe": [
            f"--before.init_args.path={model}", f"--data.init_args.path={files['test']}", "--num_jobs=1",
            "--data.init_args.num_samples=null",
        ],
    }  # fmt: skip
    commands = documented()
    assert [command[0] for command in commands] == ["fit", "fit", "probe"]
    head, fine_tuning, probe = commands
    of_head = lit_cka_command.run([*head, *ours["fit"]])
    # Short texts, a small network: more steps than the config has, at a higher rate.
    more = ["--trainer.max_epochs=15", "--model.init_args.learning_rate=5e-3", "--trainer.val_check_interval=1.0"]
    of_all = lit_cka_command.run([*fine_tuning, *ours["fit"], *more])
    accuracies = [cli.trainer.callback_metrics["val_acc"].item() for cli in (of_head, of_all)]
    assert "Model and tokenizer: runs/text_classification/model" in capsys.readouterr().out
    rows = lit_cka_command.run([*probe, *ours["probe"]])

    pretrained = load_file(Path(model) / "model.safetensors")
    head_weights = torch.load("runs/text_head/head.ckpt", weights_only=True)["state_dict"]
    body = {name.removeprefix(f"model.{encoder}."): value for name, value in head_weights.items()}
    assert all(torch.equal(value, body[name]) for name, value in pretrained.items())  # the head alone was trained
    assert accuracies[1] > accuracies[0]  # of all weights, after the head's
    assert accuracies[1] > 0.9
    found = json.loads(Path("runs/probe_distilbert/probe.json").read_text())
    assert [row["layer"] for row in found["layers"]] == ["embeddings", "layers.0", "layers.1", "layers.2"]
    assert found["comparison"]["settings"]["debiased"] is False
    cka = [row.cka for row in rows]
    assert cka[0] > cka[-1] + 0.2  # more so towards the top
    assert rows[-1].verdict == "rewritten"
    assert rows[-1].gained
    assert rows[-1].accuracy_after > 0.9
    assert f"{rows[-1].layer} changed and gained" in found["advice"]
    assert Path("runs/probe_distilbert/index.html").is_file()


PARTS = {"train": 240, "val": 80, "test": 160}
