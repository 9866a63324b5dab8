"""DriftBudget in real trainings: layers that drift too far are slowed down or rolled back, or the training ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_cka import CKACallback, DriftBudget
from lit_cka.control.slowed_layers import SlowedLayers
from lit_cka.functional.edits import wise_ft
from tests.control.helpers import Adam, train_data, weights
from tests.tracking.helpers import PlainLogger, dataset, loader, trainer

LAYERS = [f"net.blocks.{i}" for i in range(4)]
PROBE = [dataset(60, 7)[:][0].double()]


def new(lr: float = 0.1) -> Adam:
    torch.manual_seed(0)
    return Adam(lr=lr)


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    checkpoint = options.pop("ckpt_path", None)
    run = trainer(folder, *callbacks, **{"max_epochs": 4, **options})
    run.fit(module, train_data(), loader(), ckpt_path=checkpoint)
    return run


def test_ends_the_training_once_a_layer_is_beyond_for_sure(tmp_path: Path) -> None:
    cka, budget = CKACallback(probe=PROBE, log_figures=False), DriftBudget(0.3)
    run = fit(tmp_path, new(), cka, budget)
    beyond = [[layer for layer in LAYERS if record["high"][layer] < 0.7] for record in cka.history]
    assert run.current_epoch == len(cka.history) < 4
    assert [bool(layers) for layers in beyond] == [False] * (len(beyond) - 1) + [True]
    (event,) = budget.history
    assert event["layers"] == beyond[-1]
    assert event["cka"] == [cka.history[-1]["high"][layer] for layer in beyond[-1]]
    assert event["action"] == "stop"


def test_rolls_layers_back_by_an_edit(tmp_path: Path) -> None:
    first, module = new(), new()
    seen: list[dict[str, torch.Tensor]] = []

    class Before(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append(weights(module))

    budget = DriftBudget(0.3, "roll_back", probe=PROBE, edit=partial(wise_ft, alpha=0.25))
    fit(tmp_path, module, Before(), budget, max_epochs=2, num_sanity_val_steps=0)
    initial, last = weights(first), seen[-1]
    rolled = budget.history[-1]["layers"]
    assert len(rolled) > 0
    assert budget.history[-1]["step"] == 8
    for name, value in weights(module).items():
        is_rolled = any(name.startswith(f"{layer}.") for layer in rolled)
        expected = 0.75 * initial[name] + 0.25 * last[name] if is_rolled else last[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_slowed_layer_takes_steps_of_a_smaller_learning_rate(optimizer: Any) -> None:
    """As in a parameter group of its own: for one step, since Adam's state is the same for both."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    x = torch.randn(5, 3)
    slowed, grouped = modules
    slow = SlowedLayers()
    slow.slow(["0"], 0.5)
    slow.slow(["0"], 0.2)
    optimizers = [
        optimizer(slowed.parameters(), lr=0.1, weight_decay=0.1),
        optimizer([{"params": grouped[0].parameters(), "lr": 0.01}, {"params": grouped[1].parameters()}], lr=0.1,
                  weight_decay=0.1),
    ]  # fmt: skip
    for _ in range(3):
        for module, each in zip(modules, optimizers, strict=True):
            each.zero_grad()
            module(x).square().sum().backward()
        slow.before_step(slowed)
        for each in optimizers:
            each.step()
        slow.after_step()
    for ours, expected in zip(slowed.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_slows_layers_down(tmp_path: Path) -> None:
    module, plain = new(), new()
    cka = CKACallback(probe=PROBE, log_figures=False)
    budget = DriftBudget(0.3, "slow", factor=0.0)
    fit(tmp_path, module, cka, budget)
    still = CKACallback(probe=PROBE, log_figures=False)
    fit(tmp_path, plain, still)
    layers = budget.history[0]["layers"]
    step = budget.history[0]["step"]
    assert 0 < step < 16
    drift = [[1 - history[-1]["scores"][layer] for layer in layers] for history in (cka.history, still.history)]
    assert sum(drift[0]) < sum(drift[1])
    assert budget._slowed.factors.keys() >= set(layers)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("action", ["slow", pytest.param("roll_back", marks=pytest.mark.slow)])
def test_goes_on_bit_for_bit(tmp_path: Path, action: Any) -> None:
    def callbacks() -> list[pl.Callback]:
        saving = ModelCheckpoint(tmp_path, f"{action}-{{epoch}}", save_top_k=-1, save_on_train_epoch_end=True)
        return [DriftBudget(0.3, action, probe=PROBE), saving]

    module, (budget, saving) = new(), callbacks()
    fit(tmp_path, module, budget, saving, enable_checkpointing=True)
    again, (later, saving) = Adam(lr=0.1), callbacks()
    checkpoint = tmp_path / f"{action}-epoch=2.ckpt"
    fit(tmp_path, again, later, saving, enable_checkpointing=True, ckpt_path=checkpoint)
    assert later.history == budget.history  # type: ignore[attr-defined]
    assert {event["epoch"] for event in budget.history} > {2, 3}  # type: ignore[attr-defined]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(module).items())


def test_a_training_within_its_budget_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    module, plain, logger = new(1e-3), new(1e-3), PlainLogger()
    budget = DriftBudget(0.9, "roll_back", probe=PROBE)
    fit(tmp_path, module, budget, logger=logger, log_every_n_steps=1)
    fit(tmp_path, plain)
    assert budget.history == []
    assert all(torch.equal(value, weights(module)[name]) for name, value in weights(plain).items())
    assert [values["drift/num_beyond"] for _, values in logger.seen if "drift/num_beyond" in values] == [0] * 4
    assert any("cka_kept/net.blocks.0" in values for _, values in logger.seen)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_two_budgets_have_a_measurement_and_a_state_each(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        others = [dataset(40, 8)[:][0].double()]
        return [
            DriftBudget(0.3, "slow", PROBE, LAYERS[:2]), DriftBudget(0.4, "slow", others, LAYERS[1:], 0.5, prefix="b"),
            saving,
        ]  # fmt: skip

    module, (first, second, saving) = new(), callbacks()
    logger = PlainLogger()
    fit(tmp_path, module, first, second, saving, enable_checkpointing=True, max_epochs=3, logger=logger)
    logged = {key for _, values in logger.seen for key in values}
    assert {"cka_kept/net.blocks.0", "cka_kept_b/net.blocks.3", "drift/num_beyond", "b/num_beyond"} <= logged
    assert len(first.history) > 1
    assert len(second.history) > 1
    again, (one, two, saving) = Adam(lr=0.1), callbacks()
    checkpoint = tmp_path / "epoch=1.ckpt"
    fit(tmp_path, again, one, two, saving, enable_checkpointing=True, max_epochs=3, ckpt_path=checkpoint)
    assert (one.history, two.history) == (first.history, second.history)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(module).items())


@pytest.mark.parametrize("num_samples", [0, 7])
@pytest.mark.filterwarnings("ignore:The probe dataloader 0 is empty")
def test_a_probe_that_is_too_small_to_tell_is_said(tmp_path: Path, num_samples: int) -> None:
    budget = DriftBudget(0.01, probe=[PROBE[0][:num_samples]] if num_samples else [])
    with pytest.warns(UserWarning, match=f"DriftBudget can't tell .* but the probe dataloader 0 gives {num_samples}"):
        fit(tmp_path, new(), budget, max_epochs=1)
    assert budget.history == []


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `probe`.*DriftBudget\(probe=old_batches\)"):
        fit(tmp_path, new(), DriftBudget(), CKACallback(log_figures=False))
    for options, message in (
        ({"budget": 0.0}, "`budget`"),
        ({"action": "pause"}, "`action` to be one of 'stop', 'slow', 'roll_back', but got 'pause'"),
        ({"factor": 1.0}, "`factor`"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftBudget(**options)  # type: ignore[arg-type]
