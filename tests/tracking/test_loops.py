"""Trainings of every kind: validations when they are due, scores of the weights that were validated, nothing disturbed.

Each training runs twice from one seed, with and without the callback, and has to end bit for bit the same.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    NUM_VAL,
    WIDTH,
    Classifier,
    Net,
    Run,
    first_item,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)


class Seen(pl.Callback):
    """The weights and the batches of every validation but the sanity check's, as they are while it runs."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[list[Any]] = []
        self.when: list[tuple[int, int]] = []  # step and epoch
        self.modes: list[bool] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, *args: Any
    ) -> None:
        if trainer.sanity_checking:
            return
        if index == 0:
            self.weights.append(copy.deepcopy(module.state_dict()))
            self.batches.append([])
            self.when.append((trainer.global_step, trainer.current_epoch))
        self.batches[-1].append(batch)
        self.modes.append(module.training)


def states(module: Classifier, run: pl.Trainer) -> list[Any]:
    """All that a training leaves behind."""
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    numpy_state = np.random.get_state()
    return [
        module.losses,
        module.state_dict(),
        optimizers,
        torch.get_rng_state(),
        [numpy_state[1], *numpy_state[2:]],
        random.getstate(),
        [part.training for part in module.modules()],
        [parameter.requires_grad for parameter in module.parameters()],
        [None if parameter.grad is None else parameter.grad for parameter in module.parameters()],
        (run.global_step, run.current_epoch, hooks_of(module)),
    ]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, (Tensor, np.ndarray)):
        np.testing.assert_array_equal(one, other)  # NaN are equal to NaN
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


class Training:
    """One training without the callback and the same with it."""

    def __init__(
        self,
        folder: Path,
        build: Callable[[], Classifier] = Classifier,
        *,
        others: Callable[[], list[pl.Callback]] = list,
        options: dict[str, Any] | None = None,
        data: Callable[[], Any] = loader,
        first: bool = False,
        **trainer_options: Any,
    ) -> None:
        ends = []
        for tracked in (False, True):
            pl.seed_everything(11, verbose=False)
            self.module = build()
            self.before = frozen(self.module)
            self.callback, self.seen, others_now = CKACallback(log_figures=False, **(options or {})), Seen(), others()
            callbacks = [self.callback, *others_now] if first else [*others_now, self.callback]
            callbacks = [*(callbacks if tracked else others_now), self.seen]
            self.run = trainer(folder, *callbacks, **trainer_options)
            self.run.fit(self.module, train_loader(), data())
            ends.append(states(self.module, self.run))
        assert_same(*ends)
        assert len(self.module.losses) > 0
        assert not any(self.seen.modes)
        assert hooks_of(self.module) == 0

    def records(self) -> list[tuple[int, int, int]]:
        """Step, epoch and number of samples of each."""
        return [(record["step"], record["epoch"], record["n"]) for record in self.callback.history]

    def assert_scores(self, layer_names: list[str] = BLOCKS, run: Run = first_item, **how: Any) -> None:
        """Those of the weights that were validated, on the batches that they were validated on."""
        assert len(self.callback.history) == len(self.seen.weights) > 0
        after = copy.deepcopy(self.before)
        for record, weights, batches in zip(self.callback.history, self.seen.weights, self.seen.batches, strict=True):
            after.load_state_dict(weights)
            by_hand = hand_cka(self.before, after, layer_names, batches, run=run, **how)
            assert record["scores"] == pytest.approx(by_hand, abs=1e-9)
        assert min(self.callback.scores.values()) < 1 - 1e-4  # it has learned something


# When validations run.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(4, 0, 44), (8, 1, 44)]),
        ({"num_sanity_val_steps": 0}, [(4, 0, 44), (8, 1, 44)]),
        ({"num_sanity_val_steps": -1}, [(4, 0, 44), (8, 1, 44)]),
        ({"val_check_interval": 0.25}, [(step, (step - 1) // 4, 44) for step in range(1, 9)]),
        ({"val_check_interval": 0.5, "limit_val_batches": 2}, [(2, 0, 32), (4, 0, 32), (6, 1, 32), (8, 1, 32)]),
        ({"val_check_interval": 3}, [(3, 0, 44), (7, 1, 44)]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [(3, 0, 44), (6, 1, 44)]),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None, "max_epochs": 3}, [(6, 1, 44), (12, 2, 44)]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 5}, [(8, 1, 44), (16, 3, 44)]),
        ({"limit_val_batches": 1.0}, [(4, 0, 44), (8, 1, 44)]),
        ({"limit_val_batches": 0.67}, [(4, 0, 32), (8, 1, 32)]),
        ({"limit_train_batches": 2}, [(2, 0, 44), (4, 1, 44)]),
        ({"limit_train_batches": 0.5, "max_epochs": 3}, [(2, 0, 44), (4, 1, 44), (6, 2, 44)]),
        ({"accumulate_grad_batches": 2}, [(2, 0, 44), (4, 1, 44)]),
        ({"accumulate_grad_batches": 3, "val_check_interval": 2}, [(0, 0, 44), (2, 0, 44), (2, 1, 44), (4, 1, 44)]),
        ({"max_steps": 6, "max_epochs": None}, [(4, 0, 44)]),
        ({"max_steps": 6, "val_check_interval": 3, "max_epochs": None}, [(3, 0, 44)]),
        ({"min_epochs": 2, "max_epochs": 3}, [(4, 0, 44), (8, 1, 44), (12, 2, 44)]),
        ({"reload_dataloaders_every_n_epochs": 1}, [(4, 0, 44), (8, 1, 44)]),
        ({"gradient_clip_val": 0.1}, [(4, 0, 44), (8, 1, 44)]),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, [(4, 0, 44), (8, 1, 44)]),
        ({"detect_anomaly": True}, [(4, 0, 44), (8, 1, 44)]),
        ({"deterministic": True}, [(4, 0, 44), (8, 1, 44)]),
        ({"inference_mode": False}, [(4, 0, 44), (8, 1, 44)]),
    ],
    ids=str,
)
def test_validations_when_they_are_due(
    tmp_path: Path, options: dict[str, Any], expected: list[tuple[int, int, int]]
) -> None:
    training = Training(tmp_path, **options)
    assert training.records() == expected
    assert [(step, epoch) for step, epoch, _ in training.records()] == training.seen.when
    training.assert_scores()


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 9}], ids=str)
def test_no_validation(tmp_path: Path, options: dict[str, Any]) -> None:
    # At the start, if that is known by then.
    message = "will track nothing: this" if "limit_val_batches" in options else "has tracked nothing: no validation"
    with pytest.warns(UserWarning, match=message):
        training = Training(tmp_path, **options)
    assert training.callback.history == []
    assert training.run.global_step == 8


@pytest.mark.parametrize("num_batches", [True, 1, 3])
def test_fast_dev_run(tmp_path: Path, num_batches: bool | int) -> None:
    training = Training(tmp_path, options={"debiased": True}, fast_dev_run=num_batches)
    assert training.records() == [(num_batches, 0, [16, 32, 44][num_batches - 1])]
    training.assert_scores(debiased=True)


def test_validation_batches_of_a_part_of_the_training(tmp_path: Path) -> None:
    """`overfit_batches` replaces both, and turns shuffling off with a warning."""
    with pytest.warns(UserWarning, match="You requested to overfit but enabled"):
        training = Training(tmp_path, options={"debiased": True}, overfit_batches=2)
    assert training.records() == [(2, 0, 32), (4, 1, 32)]
    training.assert_scores(debiased=True)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")  # on purpose
def test_data_loaded_anew_and_shuffled(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def val_dataloader(self) -> DataLoader:
            return loader(NUM_VAL - 2 * (self.trainer.current_epoch % 2), shuffle=True)

        def train_dataloader(self) -> DataLoader:
            return train_loader()

    pl.seed_everything(11, verbose=False)
    module, callback, seen = Classifier(), CKACallback(log_figures=False), Seen()
    before = frozen(module)
    run = trainer(tmp_path, callback, seen, reload_dataloaders_every_n_epochs=1, max_epochs=3, num_sanity_val_steps=0)
    run.fit(module, datamodule=Data())
    assert [record["n"] for record in callback.history] == [44, 42, 44]
    for record, weights, batches in zip(callback.history, seen.weights, seen.batches, strict=True):
        after = frozen(module)
        after.load_state_dict(weights)
        # Features were recorded in other batches than those that they are compared in: rounded otherwise, in float32.
        assert record["scores"] == pytest.approx(hand_cka(before, after, BLOCKS, batches), abs=1e-7)


# How it is trained.


class Manual(Classifier):
    """Two optimizers, of which the second steps in every other batch, and a scheduler, all by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_blocks, of_head = self.optimizers()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.clip_gradients(of_blocks, 0.5)
        of_blocks.step()
        of_blocks.zero_grad()
        if batch_idx % 2:
            of_head.step()
            of_head.zero_grad()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        of_blocks = torch.optim.SGD(self.net.blocks.parameters(), lr=0.3)
        of_head = torch.optim.Adam(self.net.head.parameters(), lr=0.1)
        return [of_blocks, of_head], [torch.optim.lr_scheduler.ExponentialLR(of_blocks, 0.9)]


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    training = Training(tmp_path, Manual, val_check_interval=2)
    assert training.records() == [(3, 0, 44), (6, 0, 44), (9, 1, 44), (12, 1, 44)]  # steps of both are counted
    training.assert_scores()


class Toggled(Manual):
    """A second network, trained in turns with the first, each frozen while the other is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Net()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        loss = self.loss(batch) + nn.functional.cross_entropy(self.other(batch[0]), batch[1])
        self.losses.append(loss.item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        self.other(batch[0])

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.3) for net in (self.net, self.other)]


def test_optimizers_that_are_toggled(tmp_path: Path) -> None:
    training = Training(tmp_path, Toggled, val_check_interval=1)
    names = [*BLOCKS, *(f"other.blocks.{i}" for i in range(3))]
    assert [step for step, _, _ in training.records()] == [1, 2, 3, 4, 5, 6, 7, 8]
    training.assert_scores(names, lambda model, batch: (model(batch[0]), model.other(batch[0])))


class ByClosure(Classifier):
    def __init__(self) -> None:
        super().__init__(lr=0.02)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=3)


def test_an_optimizer_that_calls_the_step_several_times(tmp_path: Path) -> None:
    training = Training(tmp_path, ByClosure)
    assert len(training.module.losses) > 8
    assert training.records() == [(4, 0, 44), (8, 1, 44)]
    training.assert_scores()


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_accumulation_that_changes(tmp_path: Path) -> None:
    others = lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]  # noqa: E731
    training = Training(tmp_path, Scheduled, others=others)
    assert training.records() == [(4, 0, 44), (6, 1, 44)]
    training.assert_scores()


class Checkpointed(Net):
    """Computes its blocks a second time in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(dropout=0.2)
        self.use_reentrant = use_reentrant
        self.stem = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad=True:UserWarning"
)  # in validation there is none
def test_activation_checkpointing(tmp_path: Path, use_reentrant: bool) -> None:
    training = Training(tmp_path, lambda: Classifier(Checkpointed(use_reentrant)))
    assert training.records() == [(4, 0, 44), (8, 1, 44)]
    training.assert_scores()


def test_activation_checkpointing_with_gradients_in_the_validation(tmp_path: Path) -> None:
    """A step that computes gradients for itself, as for the penalty of one, runs its blocks twice as well."""

    class Penalised(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self(x).sum(), x)
            self.log("penalty", gradient.norm())

    training = Training(tmp_path, Penalised, inference_mode=False)
    assert training.records() == [(4, 0, 44), (8, 1, 44)]
    training.assert_scores()


def test_running_statistics_are_those_of_the_training_batches(tmp_path: Path) -> None:
    """And the reference's stay as they were at the start, whatever it runs on."""
    training = Training(tmp_path, val_check_interval=1)
    counts = [weights["net.blocks.0.norm.num_batches_tracked"].item() for weights in training.seen.weights]
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8]
    training.assert_scores()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # on purpose
def test_blocks_that_are_frozen_in_eval_mode(tmp_path: Path) -> None:
    def build() -> Classifier:
        module = Classifier()
        module.net.blocks[0].requires_grad_(False).eval()
        return module

    training = Training(tmp_path, build)
    assert training.callback.scores[BLOCKS[0]] == pytest.approx(1.0, abs=1e-12)
    assert not training.module.net.blocks[0].training  # Lightning puts back the modes, and the reference none
    training.assert_scores()


class Momentum(Net):
    """Batch statistics in validation too, which change the running ones there: the reference has its own."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)


def test_statistics_of_the_batch_in_validation(tmp_path: Path) -> None:
    training = Training(tmp_path, lambda: Classifier(Momentum()))
    training.assert_scores()


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")  # Lightning takes bf16-mixed instead
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "16-true", "bf16-mixed", "64-true"])
def test_precisions_leave_the_training_as_it_is(tmp_path: Path, precision: Any) -> None:
    training = Training(tmp_path, precision=precision)
    dtype = {"16-true": torch.float16, "64-true": torch.float64}.get(precision, torch.float32)
    training.before.to(dtype)

    def run(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled="mixed" in precision):
            return model(batch[0].to(dtype))

    assert [n for _, _, n in training.records()] == [44, 44]
    training.assert_scores(run=run)


# Other callbacks.


FIRST = pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])


@FIRST
@pytest.mark.parametrize("kind", ["average", "ema"])
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_averaged_weights(tmp_path: Path, kind: str, first: bool, num_sanity_val_steps: int) -> None:
    """They are in the model while it is validated, and it is they that are compared with the start."""
    kinds = {"average": WeightAveraging, "ema": lambda: EMAWeightAveraging(decay=0.7)}
    training = Training(
        tmp_path, others=lambda: [kinds[kind]()], first=first, num_sanity_val_steps=num_sanity_val_steps, max_epochs=3
    )
    assert training.records() == [(4, 0, 44), (8, 1, 44), (12, 2, 44)]
    training.assert_scores()
    # Not the weights that are trained.
    plain = Training(tmp_path, num_sanity_val_steps=num_sanity_val_steps, max_epochs=3)
    assert plain.callback.scores != pytest.approx(training.callback.scores, abs=1e-4)
    assert training.module.losses == plain.module.losses


@FIRST
def test_stochastic_weight_averaging(tmp_path: Path, first: bool) -> None:
    """An epoch more, in which the running statistics of the averaged weights are taken, and a validation of them."""
    others = lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)]  # noqa: E731
    training = Training(tmp_path, others=others, first=first, max_epochs=4)
    steps = [(step, epoch) for step, epoch, _ in training.records()]
    assert steps == training.seen.when
    assert steps[:4] == [(4, 0), (8, 1), (12, 2), (16, 3)]
    assert len(steps) == 5
    training.assert_scores()
    after = copy.deepcopy(training.before)
    after.load_state_dict(training.module.state_dict())
    assert training.callback.scores == pytest.approx(hand_cka(training.before, after, BLOCKS, loader()), abs=1e-9)


@FIRST
def test_stopping_early_on_the_mean(tmp_path: Path, first: bool) -> None:
    """Whoever comes first in the list, the value is that of this validation."""
    pl.seed_everything(11, verbose=False)
    plain = CKACallback(log_figures=False)
    trainer(tmp_path, plain, val_check_interval=1).fit(Classifier(lr=0.05), train_loader(), loader())
    means = [np.mean(list(record["scores"].values())) for record in plain.history]
    assert means == sorted(means, reverse=True)
    stopping = EarlyStopping(
        "cka/mean",
        mode="max",
        divergence_threshold=(means[4] + means[5]) / 2,
        patience=99,
        check_on_train_epoch_end=False,  # but after each validation: Lightning takes an interval of 1 for one of 1.0
    )
    pl.seed_everything(11, verbose=False)
    callback = CKACallback(log_figures=False)
    callbacks = [callback, stopping] if first else [stopping, callback]
    run = trainer(tmp_path, *callbacks, val_check_interval=1)
    run.fit(Classifier(lr=0.05), train_loader(), loader())
    assert run.global_step == 6  # and not one later, by an old value
    assert callback.history == plain.history[:6]


def test_the_reference_after_a_search_for_the_learning_rate(tmp_path: Path) -> None:
    """The search trains, and restores the weights: they are what the scores start from."""
    ends = []
    for tracked in (False, True):
        pl.seed_everything(11, verbose=False)
        module, callback, seen = Classifier(), CKACallback(log_figures=False), Seen()
        before = frozen(module)
        run = trainer(tmp_path, *([callback] if tracked else []), seen)
        found = Tuner(run).lr_find(module, train_loader(), loader(), num_training=8, early_stop_threshold=None)
        assert found is not None
        assert len(found.results["loss"]) == 8
        for name, value in module.state_dict().items():
            assert torch.equal(value, before.state_dict()[name])
        num_found, seen.weights, seen.batches = len(seen.weights), [], []
        module.losses.clear()
        run.fit(module, train_loader(), loader())
        ends.append(states(module, run))
    assert_same(*ends)
    assert num_found == 0
    assert [record["step"] for record in callback.history] == [4, 8]
    for record, weights in zip(callback.history, seen.weights, strict=True):
        after = copy.deepcopy(before)
        after.load_state_dict(weights)
        assert record["scores"] == pytest.approx(hand_cka(before, after, BLOCKS, loader()), abs=1e-9)


@FIRST
def test_a_search_for_the_learning_rate_by_a_callback(tmp_path: Path, first: bool) -> None:
    others = lambda: [LearningRateFinder(num_training_steps=6, early_stop_threshold=None)]  # noqa: E731
    training = Training(tmp_path, others=others, first=first)
    assert training.records() == [(4, 0, 44), (8, 1, 44)]
    training.assert_scores()


class Sized(Classifier):
    """Takes its batch size from an attribute, for the search to set."""

    batch_size = 4

    def train_dataloader(self) -> DataLoader:
        return train_loader(self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader()


def test_the_reference_after_a_search_for_the_batch_size(tmp_path: Path) -> None:
    pl.seed_everything(11, verbose=False)
    module, callback, seen = Sized(), CKACallback(log_figures=False), Seen()
    before = frozen(module)
    run = trainer(tmp_path, callback, seen)
    assert Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=2, init_val=4) == 8
    seen.weights.clear()
    run.fit(module)
    assert [record["step"] for record in callback.history][-2:] == [4, 8]
    for record, weights in zip(callback.history[-2:], seen.weights, strict=True):
        after = copy.deepcopy(before)
        after.load_state_dict(weights)
        assert record["scores"] == pytest.approx(hand_cka(before, after, BLOCKS, loader()), abs=1e-9)
    assert len(callback.history) == 2


# Other stages.


def test_predictions_are_left_alone(tmp_path: Path) -> None:
    class Predicting(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert hooks_of(self) == 0
            return self(batch[0])

    pl.seed_everything(11, verbose=False)
    module, callback = Predicting(), CKACallback(log_figures=False)
    run = trainer(tmp_path, callback)
    first = run.predict(module, loader())
    assert callback.history == []
    run.fit(module, train_loader(), loader())
    history = copy.deepcopy(callback.history)
    then = run.predict(module, loader())
    assert callback.history == history
    without = trainer(tmp_path).predict(module, loader())
    assert_same(then, without)
    assert not torch.equal(first[0], then[0])


ASKED: list[str] = []  # where nothing puts back what a module holds


class WithTestData(Classifier):
    """Is tested in training mode, in which running statistics move on."""

    def test_dataloader(self) -> DataLoader:
        ASKED.append("test")
        return loader()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net.train()
        super().test_step(batch, batch_idx)


@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("reference", ["initial", WithTestData], ids=["initial", "beside"])
def test_a_test_asks_for_data_once_and_leaves_buffers_as_they_would_be(
    tmp_path: Path, reference: Any, fits: bool
) -> None:
    buffers = []
    reference = reference if isinstance(reference, str) else reference()
    for callbacks in ([], [CKACallback(debiased=True, reference=reference)]):
        ASKED.clear()
        pl.seed_everything(3, verbose=False)
        module, run = WithTestData(), trainer(tmp_path, *callbacks, max_epochs=1)
        if fits:
            run.fit(module, train_loader(), loader())
        run.test(module, verbose=False)
        assert ASKED == ["test"]
        buffers.append({name: buffer.clone() for name, buffer in module.named_buffers()})
    assert callbacks[0].history[-1]["stage"] == "test"
    assert all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())


def test_stages_in_any_order(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(log_figures=False)
    before = frozen(module)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.validate(module, loader(), verbose=False)
    run.fit(module, train_loader(), loader())
    run.test(module, loader(), verbose=False)
    run.validate(module, loader(), verbose=False)
    after = hand_cka(before, module, BLOCKS, loader())
    fitted = callback.history[-3:]
    assert [record["stage"] for record in fitted] == ["validate", "test", "validate"]
    assert all(record["scores"] == pytest.approx(after, abs=1e-9) for record in fitted)
    assert callback.history[0]["scores"] == pytest.approx(dict.fromkeys(BLOCKS, 1.0))


def test_what_was_logged_before_a_recording_stays(tmp_path: Path) -> None:
    """Of data that come later in a fit, which are recorded then, between two validations."""

    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def val_dataloader(self) -> Any:
            return loader(seed=self.current_epoch + 1)

        def train_dataloader(self) -> Any:
            return train_loader()

    class Notes(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    seen = []
    for callbacks in ([], [CKACallback()]):
        pl.seed_everything(0, verbose=False)
        notes = Notes()
        trainer(tmp_path, notes, *callbacks, reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(Logs())
        seen.append(
            [{name: value for name, value in each.items() if not name.startswith("cka/")} for each in notes.seen]
        )
    assert seen[0] == seen[1]
    assert ["train_loss" in each for each in seen[0]] == [False, True, True, True]  # a sanity check, and three epochs
