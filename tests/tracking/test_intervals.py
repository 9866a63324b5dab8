"""Intervals in a training: in the history, the log, the table and the files, and what they say of changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lit_cka import CKACallback
from lit_cka.functional import change_interval, cka_interval, linear_jackknife, rankme
from lit_cka.tracking.history import change_mark
from lit_cka.tracking.report import curves
from tests.tracking.helpers import (
    BLOCKS,
    Classifier,
    Keeper,
    PlainLogger,
    dataset,
    features,
    frozen,
    loader,
    train_loader,
    trainer,
)

N = 44


def by_hand(before: Any, models: list[Any], batches: Any) -> tuple[list[Any], list[Any]]:
    """The intervals of each epoch's model by layer, and those of its changes since the last."""
    X = features(before, BLOCKS, batches)
    intervals, changes, last = [], [], None
    for model in models:
        Y = features(model, BLOCKS, batches)
        samples = {name: linear_jackknife(torch.cat(Y[name]), torch.cat(X[name])) for name in BLOCKS}
        intervals.append({name: [e.item() for e in cka_interval(s.value, N, s)] for name, s in samples.items()})
        if last is not None:
            ends = {
                name: change_interval(s.value, last[name].value, N, (s.without, last[name].without))
                for name, s in samples.items()
            }
            changes.append({name: [each.item() for each in pair] for name, pair in ends.items()})
        last = samples
    return intervals, changes


@pytest.mark.parametrize("options", [{}, {"debiased": False}, {"cache_dtype": "float64"}], ids=str)
def test_they_are_those_of_all_samples(tmp_path: Path, options: dict[str, Any]) -> None:
    """Also beside a plain estimate: of the debiased one, so that it is seen how far off that is."""
    module, keeper, callback = Classifier(), Keeper(), CKACallback(**options)
    before = frozen(module)
    trainer(tmp_path, callback, keeper, max_epochs=3).fit(module, train_loader(), loader())
    intervals, changes = by_hand(before, keeper.models, list(loader()))
    for record, expected in zip(callback.history, intervals, strict=True):
        for name in BLOCKS:
            assert [record["low"][name], record["high"][name]] == pytest.approx(expected[name], abs=2e-5)
            assert record["low"][name] < record["high"][name]
    assert callback.history[0]["change_low"] == callback.history[0]["change_high"] == {}
    for record, expected in zip(callback.history[1:], changes, strict=True):
        for name in BLOCKS:
            found = [record["change_low"][name], record["change_high"][name]]
            assert found == pytest.approx(expected[name], abs=2e-5)
            mark = change_mark(record, name)
            assert mark == ("\u2193" if found[1] < 0 else "\u2191" if found[0] > 0 else "=")


def test_they_are_logged_and_written(tmp_path: Path) -> None:
    callback, logger = CKACallback(prefix="old"), PlainLogger()
    run = trainer(tmp_path, callback, logger=logger)
    run.fit(Classifier(), train_loader(), loader())
    logged = [(step, values) for step, values in logger.seen if f"old_low/{BLOCKS[0]}" in values]
    scores = [step for step, values in logger.seen if f"old/{BLOCKS[0]}" in values]
    assert [step for step, _ in logged] == scores
    for (_, values), record in zip(logged, callback.history, strict=True):
        for end in ("low", "high"):
            assert {name: values[f"old_{end}/{name}"] for name in BLOCKS} == record[end]  # type: ignore[literal-required]
    assert not any(key.startswith("old_") for key in run.callback_metrics)
    callback.save(tmp_path / "report")
    assert json.loads((tmp_path / "report/cka_history.json").read_text()) == callback.history
    with (tmp_path / "report/cka_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = callback.history[-1]
    for name, row in zip(BLOCKS, rows[-len(BLOCKS) :], strict=True):
        for key in ("low", "high", "change_low", "change_high"):
            assert float(row[key]) == last[key][name]  # type: ignore[literal-required]
    assert rows[0]["change_low"] == ""
    bands = [each for each in curves(callback.history).axes[0].collections]
    assert len(bands) == len(BLOCKS)


@pytest.mark.parametrize("options", [{"intervals": False}, {"estimator": "minibatch"}], ids=str)
def test_there_are_none_if_not_asked_for_nor_of_batches_estimates(tmp_path: Path, options: dict[str, Any]) -> None:
    callback, logger = CKACallback(**options), PlainLogger()
    trainer(tmp_path, callback, logger=logger).fit(Classifier(), train_loader(), loader())
    assert all("low" not in record for record in callback.history)
    assert not any(key.startswith("cka_") for _, values in logger.seen for key in values)


def test_fewer_samples_than_they_take(tmp_path: Path) -> None:
    callback = CKACallback()
    trainer(tmp_path, callback).fit(Classifier(), train_loader(), loader(7))
    assert all(record["low"] == {} and record["scores"] for record in callback.history)


def test_a_fit_that_goes_on_knows_what_has_changed(tmp_path: Path) -> None:
    """As one that was never interrupted."""
    histories = []
    for stops in ([3], [2, 3]):
        pl.seed_everything(0, verbose=False)
        for end in stops:
            module, callback = Classifier(), CKACallback()
            run = trainer(tmp_path, callback, max_epochs=end)
            path = tmp_path / "last.ckpt" if end == 3 and len(stops) == 2 else None
            if path is None:
                pl.seed_everything(0, verbose=False)
                module = Classifier()
            run.fit(module, DataLoader(dataset(32), 8), loader(), ckpt_path=path)
            run.save_checkpoint(tmp_path / "last.ckpt")
        histories.append(callback.history)
    assert histories[0] == histories[1]
    assert histories[0][-1]["change_low"]


def test_other_samples_are_not_compared(tmp_path: Path) -> None:
    """Their number differs, and so does what a change would be of."""
    module, callback = Classifier(), CKACallback()
    run = trainer(tmp_path, callback)
    run.fit(module, train_loader(), loader())
    run.validate(module, loader(30), verbose=False)
    assert callback.history[-1]["n"] == 30
    assert callback.history[-1]["low"]
    assert callback.history[-1]["change_low"] == {}


def test_samples_that_repeat_others_are_said(tmp_path: Path) -> None:
    """Their intervals would be too narrow."""
    repeated = DataLoader(Subset(dataset(30, 1), [*range(30), *range(10)]), 16)
    one_hot = DataLoader([(sample[0].clone(), sample[1]) for sample in repeated.dataset], 16)
    with pytest.warns(UserWarning, match="10 of 40 samples of validate dataloader 0 have the features of another one"):
        trainer(tmp_path, CKACallback()).fit(Classifier(), train_loader(), one_hot)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_more_samples_than_are_drawn(tmp_path: Path) -> None:
    """The same ones in any order and batches, and about the score of all."""
    seen = []
    for batch_size, shuffle in ((16, False), (50, True)):
        torch.manual_seed(0)
        module, callback = Classifier(), CKACallback()
        run = trainer(tmp_path, callback, max_epochs=1, reload_dataloaders_every_n_epochs=1)
        run.fit(module, train_loader(), loader(700, batch_size=batch_size, shuffle=shuffle))
        seen.append(callback.history[-1])
    for name in BLOCKS:
        assert seen[0]["low"][name] == pytest.approx(seen[1]["low"][name], abs=1e-5)
        assert seen[0]["low"][name] < seen[0]["scores"][name] < seen[0]["high"][name]


def test_effective_ranks(tmp_path: Path) -> None:
    module, logger, keeper = Classifier(), PlainLogger(), Keeper()
    callback = CKACallback(effective_ranks=True)
    trainer(tmp_path, callback, keeper, logger=logger).fit(module, train_loader(), loader())
    logged = [values for _, values in logger.seen if f"cka_rank/{BLOCKS[0]}" in values]
    for record, model, values in zip(callback.history, keeper.models, logged, strict=True):
        taken = features(model, BLOCKS, list(loader()))
        for name in BLOCKS:
            expected = rankme(torch.cat(taken[name]), centre=True)
            assert record["rank"][name] == pytest.approx(expected, rel=1e-4)
            assert values[f"cka_rank/{name}"] == record["rank"][name]
    callback.save(tmp_path / "report")
    with (tmp_path / "report/cka_history.csv").open() as file:
        assert float(next(csv.DictReader(file))["rank"]) == callback.history[0]["rank"][BLOCKS[0]]
    with pytest.raises(ValueError, match=r'Expected `intervals` and the "exact" estimator with `effective_ranks`'):
        CKACallback(effective_ranks=True, estimator="minibatch")


def test_another_training_is_not_compared_with_the_last_one(tmp_path: Path) -> None:
    callback = CKACallback()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), train_loader(), loader())
    (record,) = callback.history
    assert record["low"]
    assert record["change_low"] == {}


def test_evaluations_with_other_references_are_not_compared(tmp_path: Path) -> None:
    callback = CKACallback(reference="previous")
    trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), train_loader(), loader())
    assert all(record["low"] and not record["change_low"] for record in callback.history)


@pytest.mark.parametrize(
    "state",
    [
        3,
        {"validate 0": 3},
        {"validate 0": {"a": {"n": 3}}},
        {"validate 0": {"a": {"n": 3, "cka": 0.5, "hashes": [1], "without": [0.5]}}},
        {"validate 0": {"a": {"n": 3, "cka": 0.5, "hashes": torch.arange(3), "without": torch.zeros(2).double()}}},
    ],
    ids=str,
)
def test_a_damaged_state_is_one_error(state: Any) -> None:
    callback = CKACallback()
    with pytest.raises(ValueError, match="Expected the checkpoint to hold intervals of CKACallback, but it holds"):
        callback.load_state_dict({"history": [], "intervals": state})
