"""Long trainings and many evaluations: nothing is left but the history, which grows by a record for each of them."""

from __future__ import annotations

import gc
import logging
import os
import statistics
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_cka import CKACallback
from lit_cka.features.extractor import FeatureExtractor
from tests.tracking.helpers import BLOCKS, Classifier, hooks_of, loader, train_loader, trainer

RECORD_OBJECTS, RECORD_BYTES = 1, 2400  # of the history, each: a record, its scores and their bounds
NOISE_OBJECTS, NOISE_BYTES = 2, 6_000  # what Python and Lightning may keep, from one measurement to the next
NUM_BETWEEN = 5  # evaluations or fits from one measurement to the next


class Usage(NamedTuple):
    objects: int
    bytes: int
    tensors: int
    files: int
    threads: int
    hooks: int
    modes: int


def usage(module: pl.LightningModule) -> Usage:
    gc.collect()
    objects = gc.get_objects()
    return Usage(
        len(objects),
        tracemalloc.get_traced_memory()[0],
        sum(issubclass(type(held), torch.Tensor) for held in objects),
        len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,
        threading.active_count(),
        hooks_of(module),
        len(_get_current_dispatch_mode_stack()) + _len_torch_function_stack() + len(FeatureExtractor._alone.holders),
    )


def growth(seen: list[Usage], name: str) -> float:
    """From one measurement to the next; the median, since what earlier tests have left may go at any time."""
    return statistics.median(getattr(after, name) - getattr(before, name) for before, after in pairwise(seen))


def assert_no_growth(seen: list[Usage], num_records: int, plain: list[Usage] | None = None) -> None:
    """No more than `num_records` from one measurement to the next, on top of what grows without the callback.

    Something always does, since pytest keeps what Lightning logs.
    """
    objects, size = (growth(plain, "objects"), growth(plain, "bytes")) if plain else (0, 0)
    assert growth(seen, "objects") <= objects + RECORD_OBJECTS * num_records + NOISE_OBJECTS
    assert growth(seen, "bytes") <= size + RECORD_BYTES * num_records + NOISE_BYTES
    for name in ("tensors", "files", "threads", "hooks", "modes"):
        assert getattr(seen[-1], name) <= getattr(seen[0], name), name


@pytest.fixture(autouse=True, scope="module")
def _traced() -> Iterator[None]:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)  # pytest keeps every message
    tracemalloc.start()
    yield
    tracemalloc.stop()
    log.setLevel(level)


class Meter(pl.Callback):
    """Measures at the end of the epochs `at`."""

    def __init__(self, *at: int) -> None:
        self.at = at
        self.seen: list[Usage] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch in self.at:
            self.seen.append(usage(module))


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "minibatch": {"estimator": "minibatch"},
    "no cache": {"cache_memory": 0},
    "bfloat16": {"cache_dtype": "bfloat16", "debiased": True},
    "in between": {"every_n_validations": 2, "max_batches": 1, "debiased": True},
}


class Quiet(Classifier):
    """Keeps no losses and logs nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    test_step = validation_step


@pytest.mark.filterwarnings("ignore:Keeping the reference's features in bfloat16")  # either verdict will do
@pytest.mark.parametrize(
    ("options", "num_between"),
    [
        pytest.param("exact", 10, marks=pytest.mark.slow),
        *(pytest.param(name, 10, marks=pytest.mark.slow) for name in OPTIONS if name != "exact"),
        pytest.param("exact", 50, marks=pytest.mark.slow),
    ],
)
def test_epochs(tmp_path: Path, options: str, num_between: int) -> None:
    """The first ones make all that is made once."""
    num_epochs = 4 * num_between if options == "exact" else 6 * num_between
    meter = Meter(*range(num_epochs - 3 * num_between - 1, num_epochs, num_between))
    callback = CKACallback(log_figures=False, **OPTIONS[options])
    run = trainer(tmp_path, callback, meter, max_epochs=num_epochs, limit_train_batches=1, num_sanity_val_steps=0)
    run.fit(Quiet(lr=1e-3), train_loader(), loader(32))
    every = OPTIONS[options].get("every_n_validations", 1)
    assert len(callback.history) == num_epochs // every
    assert len(meter.seen) == 4
    assert_no_growth(meter.seen, num_between // every)


def repeated(module: pl.LightningModule, once: Callable[[], None]) -> list[Usage]:
    for _ in range(3):
        once()
    seen = [usage(module)]
    for _ in range(4):
        for _ in range(NUM_BETWEEN):
            once()
        seen.append(usage(module))
    return seen


@pytest.mark.parametrize(
    "stage", [pytest.param("validate", marks=pytest.mark.slow), pytest.param("test", marks=pytest.mark.slow)]
)
def test_evaluations(tmp_path: Path, stage: str) -> None:
    module, callback = Quiet(), CKACallback(log_figures=False)
    run = trainer(tmp_path, callback)
    seen = repeated(module, lambda: getattr(run, stage)(module, loader(32), verbose=False))
    assert len(callback.history) == 23
    assert_no_growth(seen, NUM_BETWEEN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    """Fits without a callback."""
    folder, module = tmp_path_factory.mktemp("plain"), Quiet()
    return repeated(module, lambda: trainer(folder, max_epochs=1).fit(module, train_loader(), loader(32)))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("a new callback", marks=pytest.mark.slow),
        pytest.param("one callback", marks=pytest.mark.slow),
        pytest.param("a new module", marks=pytest.mark.slow),
    ],
)
def test_fits(tmp_path: Path, kind: str, plain: list[Usage]) -> None:
    """The trainer goes with the fit, and so do a callback of its own, or another module, and the copy of the module."""
    module, callback = Quiet(), CKACallback(log_figures=False)

    def fit() -> None:
        nonlocal module, callback
        if kind == "a new callback":
            callback = CKACallback(log_figures=False)
        if kind == "a new module":
            module = Quiet()
        trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader(32))
        assert list(callback.scores) == BLOCKS

    seen = repeated(module, fit)
    assert len(callback.history) == (23 if kind == "one callback" else 1)
    assert hooks_of(module) == 0
    assert_no_growth(seen, NUM_BETWEEN if kind == "one callback" else 0, plain)


class Failing(Quiet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        if batch_idx == 1:
            raise ArithmeticError("The step has failed.")


@pytest.mark.slow
def test_fits_that_fail(tmp_path: Path, plain: list[Usage]) -> None:
    module = Failing()

    def fit() -> None:
        with pytest.raises(ArithmeticError):
            trainer(tmp_path, CKACallback(), max_epochs=1).fit(module, train_loader(), loader(32))

    assert_no_growth(repeated(module, fit), 0, plain)
