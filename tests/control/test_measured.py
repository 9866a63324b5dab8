"""FreezeConverged by what it measures itself: the CKA of each block with the validation before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_cka import CKACallback, FreezeConverged
from lit_cka.control.measurement import tracking_callbacks
from tests.control.helpers import Adam, train_data, weights
from tests.tracking.helpers import Keeper, frozen, hand_cka, loader, trainer

LAYERS = [f"net.blocks.{i}" for i in range(4)]


class Settling(Adam):
    """Of which the stem and the first two blocks learn less and less."""

    def configure_optimizers(self) -> Any:
        first = [self.net.shift, *self.net.stem.parameters(), *self.net.blocks[:2].parameters()]
        rest = [*self.net.blocks[2:].parameters(), *self.net.head.parameters()]
        optimizer = torch.optim.AdamW([{"params": first}, {"params": rest}], lr=self.lr, weight_decay=0.1)
        factors = [lambda epoch: 0.2**epoch, lambda epoch: 1.0]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factors)]


def new() -> Settling:
    torch.manual_seed(0)
    return Settling(lr=5e-3)


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    checkpoint = options.pop("ckpt_path", None)
    run = trainer(folder, *callbacks, **{"max_epochs": 6, **options})
    run.fit(module, train_data(), loader(100), ckpt_path=checkpoint)
    return run


def converging(**options: Any) -> FreezeConverged:
    return FreezeConverged(**options)


def test_alone_in_a_trainer_it_freezes_what_has_moved_less_than_its_share(tmp_path: Path) -> None:
    module, callback, keeper = new(), converging(), Keeper()
    run = fit(tmp_path, module, callback, keeper)
    (measurement,) = tracking_callbacks(run)
    models = [frozen(new()), *keeper.models]
    expected: list[int] = [0]
    for before, after, record in zip(models, models[1:], measurement.history, strict=False):
        batches = [[x.double(), y] for x, y in loader(100)]
        scores = hand_cka(before, after, LAYERS, batches)
        assert record["scores"] == pytest.approx(scores, abs=1e-9)
        ends = [record["low"].get(layer, record["scores"][layer]) for layer in LAYERS]
        shares = [(1 - end) / (1 - scores[LAYERS[-1]]) for end in ends]  # of squared distances
        is_below = [share <= (number / 4) ** 2 for number, share in enumerate(shares, 1)]
        count = is_below.index(False) if False in is_below else 3
        expected.append(expected[-1] or min(count, 3))
    # What was decided after the last validation is not carried out.
    changes = [(epoch, number) for epoch, number in enumerate(expected[:-1]) if number != expected[max(epoch - 1, 0)]]
    assert [(event["epoch"], event["num_frozen"]) for event in callback.history] == changes
    assert changes


@pytest.mark.slow
def test_reads_a_callback_of_the_user(tmp_path: Path) -> None:
    module, callback = new(), converging()
    cka = CKACallback(reference="previous", log_figures=False)
    run = fit(tmp_path, module, CKACallback(prefix="initial", log_figures=False), callback, cka)
    assert len(tracking_callbacks(run)) == 2
    alone, own = new(), converging()
    fit(tmp_path, alone, own)
    assert callback.history == own.history
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(module).items())


def test_too_few_samples_for_intervals_are_said(tmp_path: Path) -> None:
    callback = converging()
    with pytest.warns(UserWarning, match="FreezeConverged can't tell .* takes 8 samples, but the validate .* gives 7"):
        trainer(tmp_path, callback, max_epochs=2).fit(new(), train_data(), loader(7))
    assert callback.history == []


def test_intervals_are_needed(tmp_path: Path) -> None:
    cka = CKACallback(reference="previous", intervals=False)
    with pytest.raises(ValueError, match="to have intervals, but it has `intervals=False`"):
        fit(tmp_path, new(), converging(), cka)


# The model as it is resumed is what the validation before the checkpoint saw.
@pytest.mark.filterwarnings("ignore:Resumed with reference='previous'", "ignore:Checkpoint directory")
def test_goes_on_bit_for_bit_with_what_it_has_measured(tmp_path: Path) -> None:
    whole, callback = new(), converging()
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, whole, callback, saving, enable_checkpointing=True)
    assert callback.history
    for epoch in (0, callback.history[0]["epoch"], 4):
        module, again = Settling(lr=5e-3), converging()
        saving = ModelCheckpoint(tmp_path, "again-{epoch}", save_on_train_epoch_end=False)
        checkpoint = tmp_path / f"epoch={epoch}.ckpt"
        fit(tmp_path, module, again, saving, enable_checkpointing=True, ckpt_path=checkpoint)
        assert again.history == callback.history
        assert all(torch.equal(value, weights(module)[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_a_second_fit_has_one_measurement_again(tmp_path: Path) -> None:
    callback = converging()
    run = fit(tmp_path, new(), callback)
    first = [(event["epoch"], event["num_frozen"]) for event in callback.history]
    run.fit_loop.epoch_progress.reset()
    run.fit(new(), train_data(), loader(100))
    assert len(tracking_callbacks(run)) == 1
    assert [(event["epoch"], event["num_frozen"]) for event in callback.history] == first
