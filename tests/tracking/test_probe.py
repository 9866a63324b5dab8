"""A probe: fixed batches of its own, measured in trainings with and without a validation loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    Classifier,
    Keeper,
    Net,
    PlainLogger,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)


class TrainOnly(pl.LightningModule):
    """Without a validation loop, and with what a measurement might disturb: dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(dropout=0.2)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class AtEachStep(pl.Callback):
    """Copies of the model behind every optimizer step, by step."""

    def __init__(self) -> None:
        self.models: dict[int, nn.Module] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.models[trainer.global_step] = frozen(module)


def seeded(module: type[pl.LightningModule] = TrainOnly) -> pl.LightningModule:
    torch.manual_seed(0)
    return module()


PROBE = loader(37, seed=5, batch_size=8)


def test_every_n_steps_without_a_validation_loop(tmp_path: Path) -> None:
    module, callback, keeper, logger = (
        seeded(),
        CKACallback(probe=PROBE, probe_every_n_steps=3),
        AtEachStep(),
        PlainLogger(),
    )
    before = frozen(module)
    run = trainer(tmp_path, keeper, callback, logger=logger, max_epochs=2)
    run.fit(module, train_loader())
    assert [(record["step"], record["stage"], record["n"]) for record in callback.history] == [
        (3, "probe", 37),
        (6, "probe", 37),
    ]
    for record in callback.history:
        expected = hand_cka(before, keeper.models[record["step"]], BLOCKS, PROBE)
        assert record["scores"] == pytest.approx(expected, abs=1e-9)
        assert min(expected.values()) < 0.999
    # In the loggers at each measurement, and not only at every 50th step.
    logged = [(step, values) for step, values in logger.seen if "cka/mean" in values]
    assert [step for step, _ in logged] == [2, 5]
    assert logged[0][1][f"cka/{BLOCKS[0]}"] == callback.history[0]["scores"][BLOCKS[0]]
    assert run.callback_metrics["cka/mean"].item() == pytest.approx(np.mean(list(callback.scores.values())), abs=1e-6)


def test_every_epoch_without_a_validation_loop(tmp_path: Path) -> None:
    module, callback = seeded(), CKACallback(probe=PROBE)
    before = frozen(module)
    saving = ModelCheckpoint(tmp_path, monitor="cka/mean", filename="best")
    trainer(tmp_path, callback, saving, max_epochs=3, enable_checkpointing=True).fit(module, train_loader())
    assert [record["step"] for record in callback.history] == [4, 8, 12]
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, PROBE), abs=1e-9)
    assert saving.best_model_score.item() == pytest.approx(
        min(np.mean(list(record["scores"].values())) for record in callback.history), abs=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"every_n_validations": 2}], ids=str)
def test_at_validation_in_place_of_its_data(tmp_path: Path, options: dict[str, Any]) -> None:
    module, callback, keeper = seeded(Classifier), CKACallback(probe=PROBE, **options), Keeper()
    before = frozen(module)
    run = trainer(tmp_path, callback, keeper, max_epochs=3, val_check_interval=2, num_sanity_val_steps=2)
    run.fit(module, train_loader(), loader())
    every = options.get("every_n_validations", 1)
    assert [record["step"] for record in callback.history] == [2, 4, 6, 8, 10, 12][::every]
    for record, after in zip(callback.history, keeper.models[::every], strict=True):
        assert record["scores"] == pytest.approx(hand_cka(before, after, BLOCKS, PROBE), abs=1e-9)
    run.test(module, loader(), verbose=False)
    assert (callback.history[-1]["stage"], callback.history[-1]["n"]) == ("test", 37)


def test_batches_come_in_the_precision_of_the_training(tmp_path: Path) -> None:
    before, after = seeded(Classifier).double(), Classifier().double()
    callback = CKACallback(probe=PROBE, reference=before)
    trainer(tmp_path, callback, precision="64-true").validate(after, loader(), verbose=False)
    doubled = [[x.double(), y] for x, y in PROBE]
    assert callback.scores == pytest.approx(hand_cka(before, after, BLOCKS, doubled), abs=1e-12)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_alone(tmp_path: Path, stage: str) -> None:
    before, after = seeded(Classifier), Classifier()
    callback = CKACallback(probe=PROBE, reference=before)
    getattr(trainer(tmp_path, callback), stage)(after, loader(), verbose=False)
    assert callback.scores == pytest.approx(hand_cka(before, after, BLOCKS, PROBE), abs=1e-9)


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.filterwarnings("ignore:Batch 0 of probe dataloader 0 is not what it was")
def test_the_training_is_the_same_bit_for_bit(tmp_path: Path, every: int | None, shuffled: bool) -> None:
    """Shuffled, the probe draws from the same random numbers as the training."""
    tracked, plain = seeded(), seeded()
    probe = loader(37, seed=5, batch_size=8, shuffle=shuffled)
    for module, callbacks in ((tracked, [CKACallback(probe=probe, probe_every_n_steps=every)]), (plain, [])):
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, max_epochs=2).fit(module, train_loader())
    assert tracked.losses == plain.losses
    assert all(map(torch.equal, tracked.state_dict().values(), plain.state_dict().values()))
    assert hooks_of(tracked) == 0
    assert {child.training for child in tracked.modules()} == {child.training for child in plain.modules()}


def test_parts_in_eval_mode_stay_in_it(tmp_path: Path) -> None:
    class Frozen(TrainOnly):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net.blocks[0].eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.modes.append([child.training for child in self.modules()])
            return super().training_step(batch, batch_idx)

        modes: list[list[bool]]

    module = seeded(Frozen)
    module.modes = []
    trainer(tmp_path, CKACallback(probe=PROBE, probe_every_n_steps=1), max_epochs=2).fit(module, train_loader())
    assert len(module.modes) == 8
    assert module.modes[0] == module.modes[-1]
    assert {True, False} == set(module.modes[0])


def test_a_shuffled_probe_gives_right_numbers(tmp_path: Path) -> None:
    module = seeded()
    before = frozen(module)
    callback = CKACallback(probe=loader(37, seed=5, batch_size=8, shuffle=True))
    trainer(tmp_path, callback, max_epochs=3).fit(module, train_loader())
    assert callback.scores == pytest.approx(
        hand_cka(before, module, BLOCKS, PROBE), abs=1e-6
    )  # float32, in other batches


class Counted(nn.Module):
    """A reference that says how often it, or a copy of it, has run."""

    calls: ClassVar[list[int]] = []

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.net(x)


def test_the_reference_runs_once(tmp_path: Path) -> None:
    reference = Counted(Net())
    callback = CKACallback(probe=PROBE, probe_every_n_steps=2, reference=reference)
    trainer(tmp_path, callback, max_epochs=3).fit(seeded(), train_loader())
    assert len(callback.history) == 6
    assert len(Counted.calls) == len(PROBE)


class ByKeyword(TrainOnly):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(scale * x)


class Predicting(TrainOnly):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["inputs"]["x"])


INPUTS = [batch[0] for batch in PROBE]


@pytest.mark.parametrize(
    ("kind", "probe"),
    [
        (TrainOnly, INPUTS),
        (TrainOnly, [(x, "label") for x in INPUTS]),
        (TrainOnly, [[x] for x in INPUTS]),
        (ByKeyword, [{"x": x, "labels": torch.zeros(len(x)), "scale": 1.0} for x in INPUTS]),
        (Predicting, [{"inputs": {"x": x}} for x in INPUTS]),
    ],
    ids=["tensors", "tuples", "lists", "mappings", "predict_step"],
)
def test_batches_of_any_format(tmp_path: Path, kind: type[TrainOnly], probe: Any) -> None:
    module, callback = seeded(kind), CKACallback(probe=probe)
    before = frozen(module)
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, INPUTS), abs=1e-9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_measures_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def fit(folder: Path, max_epochs: int, resume: Path | None = None) -> CKACallback:
        torch.manual_seed(0)
        module, callback = TrainOnly(), CKACallback(probe=PROBE, probe_every_n_steps=3)
        module.net = Net()  # without dropout, since Lightning does not restore random states
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(folder, callback, saving, max_epochs=max_epochs, enable_checkpointing=True)
        run.fit(module, loader(32, seed=0, batch_size=8), ckpt_path=resume, weights_only=True)
        return callback

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "part", 2)
    resumed = fit(tmp_path / "part", 4, tmp_path / "part" / "epoch=1.ckpt")
    assert [record["step"] for record in whole.history] == [3, 6, 9, 12, 15]
    assert resumed.history == whole.history


def test_csv_has_every_measurement(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, CKACallback(probe=PROBE, probe_every_n_steps=2), logger=logger, max_epochs=2).fit(
        seeded(), train_loader()
    )
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "cka/num_samples" in lines[0]
    assert len(lines) == 1 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_every_n_steps": 3}, "Expected `probe`, batches to measure on, together with `probe_every_n_steps`"),
        ({"probe": PROBE, "probe_every_n_steps": 0}, "`probe_every_n_steps` to be at least 1, but got 0"),
        ({"probe": iter(INPUTS)}, "a dataloader or a list of batches, .* but got list_iterator"),
        ({"probe": 3}, "a dataloader or a list of batches, .* but got int"),
        ({"probe": PROBE, "max_batches": 2}, "Expected no `dataloaders` or `max_batches` with `probe`"),
        ({"probe": PROBE, "dataloaders": [0]}, "Expected no `dataloaders` or `max_batches` with `probe`"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CKACallback(**options)


def test_a_generator_is_refused() -> None:
    def batches() -> Iterator[Tensor]:
        yield INPUTS[0]

    with pytest.raises(ValueError, match="but got generator"):
        CKACallback(probe=batches())


def test_what_goes_wrong_is_known_before_the_first_training_batch(tmp_path: Path) -> None:
    module = seeded()
    with pytest.raises(RuntimeError, match="99 elements"):
        trainer(tmp_path, CKACallback(probe=[torch.ones(3, 99)])).fit(module, train_loader())
    assert module.losses == []
    assert hooks_of(module) == 0
