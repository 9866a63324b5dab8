"""SIGTERM and Ctrl-C end every command with a line and a status; what was done is kept, nothing is half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_cka import MonoSoupEditor
from lit_cka import __main__ as lit_cka_command
from lit_cka.commands import stopping
from lit_cka.commands.stopping import Terminated, stopping_in_a_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the tests' process are as before."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def kill() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02)  # the handler runs before


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_library() -> None:
    """As the Trainer does with Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (kill, 143, "error: Stopped by SIGTERM. Go on.\n"),
        (interrupt, 130, "error: Interrupted. Go on.\n"),
        (interrupted_library, 130, "error: Interrupted. Go on.\n"),
    ],
)
def test_a_line_and_a_status(
    stop: Callable[[], None], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def command() -> None:
        with stopping_in_a_line("Go on."):
            try:
                stop()
            finally:
                os.kill(os.getpid(), signal.SIGTERM) if stop is kill else None  # many send it twice
                cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == status
    assert capsys.readouterr().err == said
    assert cleaned == [True]


def test_other_ends_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with stopping_in_a_line():
        pass
    with pytest.raises(ZeroDivisionError), stopping_in_a_line():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as ended, stopping_in_a_line():
        sys.exit(2)
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


def test_another_handler_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with stopping_in_a_line():
            kill()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True]


def test_a_handler_around_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """As the Trainer has one: it notes the signal, and calls the one that was there."""
    done = []

    def command() -> None:
        with stopping_in_a_line():
            inner: Any = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *given: inner(*given))
            kill()
            done.append("batch")
            signal.signal(signal.SIGTERM, inner)
            done.append("end")

    with pytest.raises(SystemExit) as ended:
        command()
    assert (done, ended.value.code) == (["batch", "end"], 143)


def test_a_forked_process_ends_as_it_would_without() -> None:
    with stopping_in_a_line():
        child = os.fork()
        if child == 0:
            kill()
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_it_is_an_interrupt_for_whoever_cleans_up() -> None:
    assert issubclass(Terminated, KeyboardInterrupt)
    assert (stopping.INTERRUPTED, stopping.TERMINATED) == (130, 143)


@pytest.mark.parametrize("command", ["edit", "compare", "configs"])
def test_every_command_is_ended_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its first line on."""
    name = lit_cka_command.COMMANDS[command][1]
    monkeypatch.setattr(f"lit_cka.commands.{name}.main", lambda args: kill())
    with pytest.raises(SystemExit) as ended:
        lit_cka_command.run([command])
    assert ended.value.code == 143
    said = capsys.readouterr().err
    assert said.startswith("error: Stopped by SIGTERM.")
    assert said.count("\n") == 1
    assert ("goes on" in said) == (command == "edit")


@contextmanager
def stopping_at(name: str, call: int) -> Iterator[None]:
    """SIGTERM comes at so manyth call of a function."""
    calls = []

    def function(*args: Any, **options: Any) -> Any:
        calls.append(True)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        holder, _, attribute = name.rpartition(".")
        original = getattr(resolve_name(holder), attribute)
        patch.setattr(name, function)
        yield


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def stopped(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        lit_cka_command.run([*args])
    assert isinstance(ended.value.code, int)
    return ended.value.code


# The signal may come while a file is being opened, which nobody holds then.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_an_edit_goes_on(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(6, 6, generator=generator) for i in range(8)}
        save_file(tensors, f"{name}.safetensors")
    edit = ["edit", "--pretrained=a.safetensors", "--finetuned=b.safetensors", "--output"]
    with stopping_at("lit_cka.editing.files.edit_parameter", 5):
        assert stopped(*edit, "out.safetensors") == 143
    assert capsys.readouterr().err.endswith("error: Stopped by SIGTERM. The same command goes on from there.\n")
    assert {path.name for path in in_folder.iterdir()} == {"a.safetensors", "b.safetensors", "out.safetensors.partial"}
    for name in ("out", "whole"):
        lit_cka_command.run([*edit, f"{name}.safetensors"])
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


MODEL = """
import torch, lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    num_classes = 3
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        self.head = torch.nn.Linear(4, 3)
    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)
    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def loader(self):
        g = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g))
        return DataLoader(data, 10)
    def train_dataloader(self):
        return self.loader()
    def val_dataloader(self):
        return self.loader()
    def test_dataloader(self):
        return [self.loader(), self.loader()]
"""


MONOSOUP = ["monosoup", "--editor.pretrained=stopping_model.Net", "--editor.finetuned=stopping_model.Net"]
MONOSOUP += ["--editor.finetuned.init_args.seed=1", "--data=stopping_model.Data", "--trainer.accelerator=cpu"]
# Five variants of four batches of the first set, of two batches of the second, and a stop within the third.
CALLS = 5 * 6 + 2


def check_unfinished(folder: Path, num_samples: dict[str, int]) -> None:
    found = json.loads((folder / "out" / "monosoup.json").read_text())
    assert found["finished"] is json.loads((folder / "out" / "summary.json").read_text())["finished"] is False
    assert found["num_samples"] == num_samples
    whole = lit_cka_command.run([*MONOSOUP, "--output=all"])
    assert isinstance(whole, MonoSoupEditor)
    assert whole.results is not None
    for variant, metrics in found["metrics"].items():
        assert metrics["test_0"] == whole.results.metrics[variant]["test_0"]
    assert "finished" not in json.loads((folder / "all" / "monosoup.json").read_text())


@pytest.mark.timeout(120)
def test_monosoup_writes_what_it_has_evaluated(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the test set that it was through with, and of the next what there was."""
    (in_folder / "stopping_model.py").write_text(MODEL)
    with stopping_at("lit_cka.editing.variant_test.sample_values", CALLS):
        assert stopped(*MONOSOUP, "--output=out") == 143
    said = capsys.readouterr().err
    assert "the evaluation was stopped; the results of 40 of test_0, 30 of test_1 are in out." in said
    check_unfinished(in_folder, {"test_0": 40, "test_1": 30})


@pytest.mark.slow
def test_monosoup_writes_whole_test_sets_on_ctrl_c(in_folder: Path) -> None:
    """Which comes within a batch; in a process of its own, since the Trainer ignores it from then on."""
    (in_folder / "stopping_model.py").write_text(MODEL)
    code = f"""
import os, signal, warnings, lit_cka.editing.variant_test as variant_test
from lit_cka.__main__ import run
warnings.simplefilter("ignore")
original, calls = variant_test.sample_values, []
def stopping(*args):
    calls.append(1)
    if len(calls) == {CALLS}:
        os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
variant_test.sample_values = stopping
run({[*MONOSOUP, "--output=out"]})
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{in_folder}"}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=200, env=env)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("error: Interrupted.\n")
    check_unfinished(in_folder, {"test_0": 40})


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*ckpt_path=")  # which Lightning's own command line leaves out
def test_a_training_comes_to_the_end_of_its_batch(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer's own way: its callbacks know, and the checkpoint that they write can be resumed from."""
    (in_folder / "stopping_model.py").write_text(MODEL)
    args = ["fit", "--model=stopping_model.Net", "--data=stopping_model.Data", "--trainer.max_epochs=3"]
    args += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.callbacks=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=kept"]
    with stopping_at("stopping_model.Net.training_step", 6):
        assert stopped(*args) == 143
    assert capsys.readouterr().err.endswith("error: Stopped by SIGTERM.\n")
    (kept,) = (in_folder / "kept").iterdir()
    assert torch.load(kept, weights_only=True)["global_step"] == 6
