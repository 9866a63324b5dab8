"""What FreezeConverged and DriftBudget did to layers, as the event files of real trainings have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lit_cka import DriftBudget
from lit_cka.control.drift import DriftEvent, drift_events
from lit_cka.tracking.layer_events import LayerEvent, LayerEvents, from_text, spans_of
from tests.control.helpers import STEPS, Adam, Chain, NormedBlock, fit, freezing
from tests.tracking.helpers import WIDTH, dataset

# With the last block all of "net.blocks" would be.
GROUPS = (("net.stem", "net.blocks.0"), ("net.blocks.1",), ("net.blocks.2",), ("net.blocks",))


def written(folder: Path, tag: str = "freeze/layers") -> list[LayerEvents]:
    read = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    data = read.Tensors(f"{tag}/text_summary") if f"{tag}/text_summary" in read.Tags()["tensors"] else []
    found = [from_text(each.tensor_proto.string_val[0].decode()) for each in data]
    assert None not in found
    return found  # type: ignore[return-value]


def logger(folder: Path, name: str = "run") -> TensorBoardLogger:
    return TensorBoardLogger(folder, name=name, version="")


def test_a_text_a_change_says_which_layers_were_frozen_from_which_step_on(tmp_path: Path) -> None:
    """In steps of the loggers: with two batches an optimizer step there is half of those. Also with other prefixes."""
    callback = freezing(0, 1, 3, prefix="mine")
    loggers = [CSVLogger(tmp_path, name="csv"), logger(tmp_path)]
    fit(tmp_path, Adam(), callback, logger=loggers, max_epochs=4, accumulate_grad_batches=2)
    first, last = written(tmp_path / "run", "mine/layers")
    steps = [event["logged_step"] for event in callback.history]
    assert steps == [event["step"] for event in callback.history] == [STEPS, 3 * STEPS // 2]
    assert last == LayerEvents(
        GROUPS, (LayerEvent(steps[0], "frozen", (0,), "converged"), LayerEvent(steps[1], "frozen", (1, 2), "converged"))
    )
    assert first == last._replace(events=last.events[:1])
    assert written(tmp_path / "run") == []


class Turning(Adam):
    def on_validation_epoch_end(self) -> None:
        self.log("turning", float(self.current_epoch))


def test_what_is_trained_again_ends(tmp_path: Path) -> None:
    fit(tmp_path, Turning(), freezing(2, monitor="turning", patience=1), logger=logger(tmp_path))
    last = written(tmp_path / "run")[-1]
    assert [(span["start"], span["end"]) for span in spans_of("net.blocks.1.linear", last)] == [(STEPS, 2 * STEPS)]
    assert last.events[-1].why == "the loss turned"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_has_what_was_frozen_before(tmp_path: Path) -> None:
    for name, checkpoint in (("one", None), ("two", tmp_path / "one-epoch=2.ckpt")):
        saving = ModelCheckpoint(tmp_path, filename=f"{name}-{{epoch}}", save_top_k=-1)
        options = {"max_epochs": 4, "enable_checkpointing": True, "logger": logger(tmp_path, name)}
        fit(tmp_path, Adam(), freezing(0, 1, 3), saving, ckpt_path=checkpoint, **options)
    whole, resumed = written(tmp_path / "one"), written(tmp_path / "two")
    assert [len(each.events) for each in whole] == [1, 2]
    assert [len(each.events) for each in resumed] == [1, 2]  # at its start, and when more was frozen
    assert resumed[-1] == whole[-1]


class Staged(nn.Module):
    """A stem whose weight the head uses, too, a stage of two blocks with a norm of its own, and a third block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(0.0)
        self.stage = nn.Sequential(NormedBlock(), NormedBlock(), nn.LayerNorm(WIDTH))
        self.last = NormedBlock()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stage(self.drop(self.embed(x)))))


def test_a_stage_is_frozen_with_its_last_part_and_a_tied_layer_never(tmp_path: Path) -> None:
    callback = freezing(1, blocks=["net.stage.0", "net.stage.1", "net.last"], max_frozen=3)
    fit(tmp_path, Adam(Staged()), callback, logger=logger(tmp_path), max_epochs=2)
    (last,) = written(tmp_path / "run")
    assert last.groups == (("net.drop", "net.stage.0"), ("net.stage.1",), ("net.stage", "net.last"))
    assert [bool(spans_of(f"net.{name}", last)) for name in ("drop", "stage.0.norm", "stage.1", "stage", "embed")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_what_was_not_trained_is_frozen_once_it_has_run(tmp_path: Path) -> None:
    """As the base of a model with adapters is."""
    net = Chain()
    net.requires_grad_(False)
    for part in (*net.blocks, net.head):
        (part.linear.bias if isinstance(part, NormedBlock) else part.bias).requires_grad_(True)
    callback = freezing(2)
    fit(tmp_path, Adam(net), callback, logger=logger(tmp_path), max_epochs=2)
    assert written(tmp_path / "run")[-1].groups == GROUPS


def test_what_was_done_about_drift(tmp_path: Path) -> None:
    probe = [dataset(60, 7)[:][0].double()]
    torch.manual_seed(0)
    budget = DriftBudget(0.3, "slow", probe=probe, factor=0.5)
    fit(tmp_path, Adam(lr=0.1), budget, logger=logger(tmp_path), max_epochs=4)
    assert len(budget.history) > 1
    last = written(tmp_path / "run", "drift/layers")[-1]
    assert last == drift_events(budget.history, 0.5)
    layer = budget.history[0]["layers"][0]
    start = spans_of(layer, last)[0]
    assert (start["what"], start["why"]) == ("slowed", "learning rate x 0.5")
    assert start["start"] == budget.history[0]["logged_step"] == budget.history[0]["step"] - 1


def test_a_layer_that_is_slowed_again_has_the_product() -> None:
    def event(step: int, action: str, *layers: str) -> DriftEvent:
        return {"step": step, "logged_step": step, "epoch": 0, "action": action, "layers": [*layers], "cka": []}

    slowed = [event(4, "slow", "b"), event(8, "slow", "a", "b"), event(12, "slow", "b")]
    found = drift_events(slowed, 0.1)
    assert found.groups == (("b",), ("a",))
    assert [(each.step, each.groups, each.why) for each in found.events] == [
        (4, (0,), "learning rate x 0.1"),
        (8, (1,), "learning rate x 0.1"),
        (8, (0,), "learning rate x 0.01"),
        (12, (0,), "learning rate x 0.001"),
    ]
    stopped = drift_events([event(4, "stop", "b")], 0.1)
    assert stopped.events == (LayerEvent(4, "stopped", (0,), "beyond the drift budget"),)
