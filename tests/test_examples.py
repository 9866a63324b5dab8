"""Each example runs, is short and listed, and its numbers are those of features taken by hand."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracking.helpers import hand_cka

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NUM_VAL = 359  # digits in the validation part: an odd number, of which two processes can't have as many each
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run in, and for no longer than a test the seed that Lightning leaves in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def source_of(name: str) -> str:
    """The code of an example, of a notebook that of all its cells."""
    text = (EXAMPLES / name).read_text()
    if not name.endswith(".ipynb"):
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def executed(name: str) -> tuple[dict[str, Any], nn.Module | None]:
    """The names of an example that has run, and a copy of its `module` from before `trainer.fit(module, ...)`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = None
    for statement in ast.parse(source_of(name)).body:
        if ast.unparse(statement).startswith("trainer.fit(module"):
            before = copy.deepcopy(names["module"])
        exec(compile(ast.Module([statement], []), name, "exec"), names)
    return names, before


def over_tokens(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens that the attention mask keeps."""
    output = output[0] if isinstance(output, tuple) else output
    kept = [tokens[mask > 0].mean(0) for tokens, mask in zip(output, batch["attention_mask"], strict=True)]
    return torch.stack(kept)


def of_first(output: Tensor, batch: list[Tensor]) -> Tensor:
    return output.mean(1)


def test_each_example_is_listed_and_short() -> None:
    listed = re.findall(r"\| \[`(\S+)`\]\((\S+)\) \|", (EXAMPLES / "README.md").read_text())
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(listed) == {(name, name) for name in files}
    assert {path.name: n for path in SCRIPTS if (n := len(path.read_text().splitlines())) > 60} == {}


@pytest.mark.slow
def test_the_first_example_as_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    names, before = executed("first.ipynb")
    run = {"run": lambda module, batch: module.network(batch[0]), "pool": of_first}
    scores = names["callback"].scores
    assert list(scores) == [f"network.blocks.{i}" for i in range(4)]
    expected = hand_cka(before, names["module"], [*scores], names["data"].val_dataloader(), **run)
    assert scores == pytest.approx(expected, abs=1e-5)
    printed = capsys.readouterr().out
    assert float(re.findall(r"val_acc: (\S+)", printed)[0]) > 0.7
    assert all(f"{score:.4f}" in printed for score in scores.values())
    assert list(Path().glob("lightning_logs/*/cka/cka_heatmap.png"))


def test_the_notebook_does_what_the_script_does() -> None:
    _docstring, *statements = ast.parse(source_of("first.py")).body
    assert ast.dump(ast.parse(source_of("first.ipynb"))) == ast.dump(ast.Module(statements, []))


def test_text_classifier() -> None:
    names, before = executed("text_classifier.py")
    scores, batches = names["callback"].scores, list(names["trainer"].val_dataloaders)
    run = {"run": lambda module, batch: module.model(**batch), "pool": over_tokens}
    assert len(scores) == 6
    assert scores == pytest.approx(hand_cka(before, names["module"], [*scores], batches, **run), abs=1e-5)
    assert names["trainer"].callback_metrics["val_acc"] > 0.9


@pytest.mark.slow
def test_language_model_lora() -> None:
    names, before = executed("language_model_lora.py")  # before the fit, adapters add nothing
    scores, batches = names["callback"].scores, list(names["trainer"].val_dataloaders)
    run = {"run": lambda module, batch: module.model(**batch), "pool": over_tokens}
    assert len(scores) == 3
    assert max(scores.values()) < 0.99
    assert scores == pytest.approx(hand_cka(before, names["module"], [*scores], batches, **run), abs=1e-5)
    assert names["trainer"].callback_metrics["val_loss"] < 2.5  # of random weights: log(128) = 4.9


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = executed("plain_loop.py")
    layers, batches = [f"blocks.{i}" for i in range(4)], names["data"].val_dataloader()
    expected = hand_cka(names["before"], names["model"], layers, batches, pool=of_first)
    assert names["scores"] == pytest.approx(expected, abs=1e-5)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(score) for name, score in printed.items()} == pytest.approx(expected, abs=6e-5)


@pytest.mark.slow
def test_freezing(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = executed("freezing.py")
    printed = capsys.readouterr().out
    whole, frozen = (float(accuracy) for accuracy in re.findall(r"val_acc (\S+)", printed))
    assert min(whole, frozen) > 0.85
    saved, count = re.findall(r"(\d+) % of the FLOPs saved, (\d) of 4", printed)[0]
    freeze = names["freeze"]
    assert int(saved) == round(100 * freeze.flops_saved) > 10
    assert int(count) == freeze.num_frozen == freeze.history[-1]["num_frozen"] > 0
    assert any(skipped for _, skipped in freeze.savings.num_steps)
    assert all(parameter.requires_grad for parameter in names["module"].parameters())


@pytest.mark.slow
def test_forgetting(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = executed("forgetting.py")
    (old, new), (old_kept, new_kept) = re.findall(r"old digits (\S+), new digits (\S+)", capsys.readouterr().out)
    assert float(old_kept) > float(old) + 0.05
    assert min(float(new), float(new_kept)) > 0.5
    assert {event["action"] for event in names["budget"].history} == {"roll_back"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_each_script_runs_by_itself(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b0\.\d{3}", done.stdout)
    if script.stem == "fsdp2":
        assert done.stdout.count(f"n = {NUM_VAL} samples") == 1
        rows = re.findall(r" blocks\.(\d) │ +(\S+) │ +(\S+) │ +(\S+)(?: [↓↑=])? │", done.stdout)
        assert [row[0] for row in rows] == list("0123")
        assert all(0 < float(lowest) <= float(last) < 0.99 for _, _, lowest, last in rows)
        assert float(re.findall(r"val_acc: (\S+)", done.stdout)[0]) > 0.7
