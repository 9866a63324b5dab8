"""References that are earlier evaluations: the previous one, and the best one so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    Classifier,
    Keeper,
    dataset,
    frozen,
    hand_cka,
    loader,
    train_loader,
    trainer,
)

LOSSES = [3.0, 1.0, 2.0, 0.5, 0.7]


class Planned(Classifier):
    """Logs a validation loss that is known beforehand."""

    def on_validation_epoch_end(self) -> None:
        self.log("planned", torch.tensor(LOSSES[self.current_epoch]))


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"estimator": "minibatch"}, {"cache_dtype": "float64"}], ids=str)
def test_the_evaluation_before(tmp_path: Path, options: dict[str, Any]) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback(reference="previous", **options)
    models = [frozen(module)]
    trainer(tmp_path, callback, keeper, max_epochs=4).fit(module, train_loader(), loader())
    models += keeper.models
    hand = {key: value for key, value in options.items() if key == "estimator"}
    for before, after, record in zip(models, models[1:], callback.history, strict=False):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, loader(), **hand))
    assert len(callback.history) == 4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_one(tmp_path: Path, mode: str) -> None:
    module, keeper, callback = Planned(), Keeper(), CKACallback(reference="best")
    models = [frozen(module)]
    best = ModelCheckpoint(tmp_path, monitor="planned", mode=mode)
    run = trainer(tmp_path, callback, keeper, best, max_epochs=5, enable_checkpointing=True)
    run.fit(module, train_loader(), loader())
    models += keeper.models
    # Epochs from 0 on; models[0] is the initial one.
    references = [0, 1, 2, 2, 4] if mode == "min" else [0, 1, 1, 1, 1]
    for epoch, (place, record) in enumerate(zip(references, callback.history, strict=True)):
        expected = hand_cka(models[place], models[epoch + 1], BLOCKS, loader())
        assert record["scores"] == close(expected), epoch


def test_the_best_one_by_early_stopping(tmp_path: Path) -> None:
    callback = CKACallback(reference="best")
    stopping = EarlyStopping("planned", patience=9)
    trainer(tmp_path, callback, stopping, max_epochs=3).fit(Planned(), train_loader(), loader())
    assert len(callback.history) == 3


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [CKACallback(reference="previous")]):
        pl.seed_everything(0, verbose=False)
        module = Classifier()
        trainer(tmp_path, *callbacks).fit(module, train_loader(), loader())
        states.append(module.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_shuffled_data_are_matched(tmp_path: Path) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback(reference="previous")
    models = [frozen(module)]
    trainer(tmp_path, callback, keeper, max_epochs=3).fit(module, train_loader(), loader(shuffle=True))
    for before, after, record in zip(models + keeper.models, keeper.models, callback.history, strict=False):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, loader()))


@pytest.mark.parametrize("options", [{}, {"probe_every_n_steps": 2}], ids=str)
def test_on_a_probe(tmp_path: Path, options: dict[str, Any]) -> None:
    class Kept(pl.Callback):
        def __init__(self) -> None:
            self.models: list[nn.Module] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            if not options or trainer.global_step % 2 == 0:
                self.models.append(frozen(module))

    module, kept = Classifier(), Kept()
    callback = CKACallback(reference="previous", probe=list(loader()), **options)
    models = [frozen(module)]
    trainer(tmp_path, kept, callback).fit(module, train_loader(), loader())
    models += kept.models if options else [kept.models[3], kept.models[7]]
    assert len(callback.history) == len(models) - 1
    for before, after, record in zip(models, models[1:], callback.history, strict=False):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, [batch[0] for batch in loader()]))


def test_resumed_it_goes_on_from_the_model_of_the_last_evaluation(tmp_path: Path) -> None:
    histories = []
    for ends in ([3], [2, 3]):
        for end in ends:
            path = tmp_path / "last.ckpt" if end == 3 and len(ends) == 2 else None
            pl.seed_everything(0, verbose=False)
            module, callback = Classifier(), CKACallback(reference="previous")
            run = trainer(tmp_path, callback, max_epochs=end)
            if path is None:
                run.fit(module, DataLoader(dataset(32), 8), loader())
            else:
                with pytest.warns(UserWarning, match="the reference is the model as it was resumed"):
                    run.fit(module, DataLoader(dataset(32), 8), loader(), ckpt_path=path)
            run.save_checkpoint(tmp_path / "last.ckpt")
        histories.append(callback.history)
    assert histories[0] == histories[1]


def test_what_they_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`stages` to have \"validate\" with reference='previous'"):
        CKACallback(reference="previous", stages=["test"])
    with pytest.raises(ValueError, match='reference="best" without `probe_every_n_steps`'):
        CKACallback(reference="best", probe=[torch.zeros(4, 6)], probe_every_n_steps=1)
    with pytest.raises(ValueError, match="`ModelCheckpoint` or an `EarlyStopping` with `monitor=`"):
        trainer(tmp_path, CKACallback(reference="best")).fit(Classifier(), train_loader(), loader())


def test_a_name_with_a_slip_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file 'previuos': did you mean 'previous'"):
        trainer(tmp_path, CKACallback(reference="previuos")).fit(Classifier(), train_loader(), loader())


def test_the_table_says_what_the_reference_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, CKACallback(reference="previous")).fit(Classifier(), train_loader(), loader())
    assert "reference: the model at the evaluation before" in capsys.readouterr().out


def test_data_that_differ_at_every_pass(tmp_path: Path) -> None:
    class Drawn(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 44

        def __getitem__(self, index: int) -> Any:
            x, y = dataset(44, 1)[index]
            return x + torch.randn_like(x), y

    with pytest.raises(ValueError, match="Expected the same data at every pass with reference='previous'"):
        trainer(tmp_path, CKACallback(reference="previous")).fit(Classifier(), train_loader(), DataLoader(Drawn(), 16))


def test_tests_are_not_tracked(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(reference="previous")
    run = trainer(tmp_path, callback)
    run.fit(module, train_loader(), loader())
    run.test(module, loader(), verbose=False)
    assert [record["stage"] for record in callback.history] == ["validate", "validate"]
