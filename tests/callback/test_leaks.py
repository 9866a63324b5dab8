"""Long trainings and many evaluations: nothing is left but the history, which grows by a record for each of them."""

from __future__ import annotations

import gc
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_cka import CKACallback
from lit_cka.features import FeatureExtractor
from tests.callback.helpers import BLOCKS, Classifier, hooks_of, loader, train_loader, trainer

RECORD_OBJECTS, RECORD_BYTES = 1, 700  # of the history, each: a record and its scores
NOISE_OBJECTS, NOISE_BYTES = 20, 20_000  # what Python and Lightning may keep in all


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
        len(_get_current_dispatch_mode_stack()) + _len_torch_function_stack() + len(FeatureExtractor._only),
    )


def assert_no_growth(first: Usage, last: Usage, num_records: int, without: tuple[Usage, Usage] | None = None) -> None:
    """No more than the history's records, on top of what grows `without` the callback (pytest keeps what is logged)."""
    start, end = without or (first, first)
    assert last.objects - first.objects <= end.objects - start.objects + RECORD_OBJECTS * num_records + NOISE_OBJECTS
    assert last.bytes - first.bytes <= end.bytes - start.bytes + RECORD_BYTES * num_records + NOISE_BYTES
    for name in ("tensors", "files", "threads", "hooks", "modes"):
        assert getattr(last, name) <= getattr(first, name), name


@pytest.fixture(autouse=True, scope="module")
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


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
    ("options", "num_epochs", "num_warm_up"),
    [("exact", 200, 50), ("minibatch", 60, 20), ("no cache", 60, 20), ("bfloat16", 60, 20), ("in between", 60, 20)],
)
def test_epochs(tmp_path: Path, options: str, num_epochs: int, num_warm_up: int) -> None:
    meter, callback = Meter(num_warm_up - 1, num_epochs - 1), CKACallback(log_figures=False, **OPTIONS[options])
    run = trainer(tmp_path, callback, meter, max_epochs=num_epochs, limit_train_batches=1, num_sanity_val_steps=0)
    run.fit(Quiet(lr=1e-3), train_loader(), loader(32))
    every = OPTIONS[options].get("every_n_validations", 1)
    assert len(callback.history) == num_epochs // every
    assert len(meter.seen) == 2
    assert_no_growth(*meter.seen, (num_epochs - num_warm_up) // every)


def repeated(module: pl.LightningModule, once: Callable[[], None], times: int = 20) -> tuple[Usage, Usage]:
    for _ in range(3):
        once()
    first = usage(module)
    for _ in range(times):
        once()
    return first, usage(module)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluations(tmp_path: Path, stage: str) -> None:
    module, callback = Quiet(), CKACallback(log_figures=False)
    run = trainer(tmp_path, callback)
    first, last = repeated(module, lambda: getattr(run, stage)(module, loader(32), verbose=False))
    assert len(callback.history) == 23
    assert_no_growth(first, last, 20)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Usage, Usage]:
    """Fits without a callback."""
    folder, module = tmp_path_factory.mktemp("plain"), Quiet()
    return repeated(module, lambda: trainer(folder, max_epochs=1).fit(module, train_loader(), loader(32)))


@pytest.mark.parametrize("kind", ["a new callback", "one callback", "a new module"])
def test_fits(tmp_path: Path, kind: str, plain: tuple[Usage, Usage]) -> None:
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

    first, last = repeated(module, fit)
    assert len(callback.history) == (23 if kind == "one callback" else 1)
    assert hooks_of(module) == 0
    assert_no_growth(first, last, 20 if kind == "one callback" else 0, plain)


class Failing(Quiet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        if batch_idx == 1:
            raise ArithmeticError("The step has failed.")


def test_fits_that_fail(tmp_path: Path, plain: tuple[Usage, Usage]) -> None:
    module = Failing()

    def fit() -> None:
        with pytest.raises(ArithmeticError):
            trainer(tmp_path, CKACallback(), max_epochs=1).fit(module, train_loader(), loader(32))

    assert_no_growth(*repeated(module, fit), 0, plain)
