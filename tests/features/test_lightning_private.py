"""What Lightning keeps private is where `lightning_private` looks for it: each function is called in a training."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_cka.features import lightning_private
from lit_cka.features.lightning_private import (
    attach_trainer,
    attached_trainer,
    before_batch_transfer,
    combined_loader,
    drop_compiled_steps,
    evaluation_loop,
    has_compiled_steps,
    is_forward_redirected,
    is_sequential,
    logging_step,
)

PACKAGE = Path(lightning_private.__file__).parents[1]


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    @override
    def forward(self, x: Any) -> Tensor:
        return self.layer(next(iter(x.values())) if isinstance(x, dict) else x)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("size", self(batch).square().mean())

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"halved": batch / 2} if isinstance(batch, Tensor) and not self.training else batch


class Noted(pl.Callback):
    """What the functions give while Lightning runs."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.combined: list[bool] = []
        self.trainers: list[pl.Trainer | None] = []
        self.batches: list[Any] = []

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(logging_step(trainer))
        self.combined.append(not is_sequential(combined_loader(evaluation_loop(trainer))))
        self.trainers.append(attached_trainer(pl_module))
        self.batches.append(before_batch_transfer(pl_module, torch.full((2,), 4.0)))


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(8, 3), batch_size=2)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=CSVLogger(folder), callbacks=list(callbacks), num_sanity_val_steps=0,
        **silent, **options,
    )  # fmt: skip


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_step_is_the_one_that_loggers_get(tmp_path: Path, accumulated: int) -> None:
    noted = Noted()
    run = trainer(tmp_path, noted, max_epochs=2, accumulate_grad_batches=accumulated)
    run.fit(Regression(), loader(), loader())
    lines = (Path(str(run.logger.log_dir)) / "metrics.csv").read_text().splitlines()  # type: ignore[union-attr]
    column = lines[0].split(",").index("step")
    assert [int(line.split(",")[column]) for line in lines[1:]] == noted.steps
    assert noted.steps == [4 // accumulated - 1, 8 // accumulated - 1]


@pytest.mark.parametrize(
    ("loaders", "combined"),
    [
        (loader(), False),
        ([loader(), loader()], False),
        (CombinedLoader({"a": loader()}, "max_size_cycle"), True),
        (CombinedLoader([loader(), loader()], "sequential"), False),
    ],
    ids=["one", "several", "combined", "sequential"],
)
@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_whether_dataloaders_are_combined(tmp_path: Path, loaders: Any, combined: bool, stage: str) -> None:
    noted, module = Noted(), Regression()
    run = trainer(tmp_path, noted, max_epochs=1)
    run.fit(module, loader(), loaders) if stage == "fit" else run.validate(module, loaders, verbose=False)
    assert noted.combined == [combined]


def test_the_hook_before_a_batch_is_moved(tmp_path: Path) -> None:
    noted = Noted()
    trainer(tmp_path, noted).validate(Regression(), loader(), verbose=False)
    assert noted.batches[0]["halved"].tolist() == [2.0, 2.0]


def test_the_trainer_of_a_module(tmp_path: Path) -> None:
    module, noted = Regression(), Noted()
    assert attached_trainer(module) is None
    run = trainer(tmp_path, noted)
    run.validate(module, loader(), verbose=False)
    assert noted.trainers == [run]
    inner = Regression()
    copied = Regression()
    copied.inner = inner
    attach_trainer(copied, run)
    assert attached_trainer(copied) is copied.trainer is run
    assert attached_trainer(inner) is None
    assert attached_trainer(Regression()) is None


def test_compiled_steps_stay_with_the_original() -> None:
    module = Regression()
    assert not has_compiled_steps(module)
    compiled = from_compiled(torch.compile(module, backend="eager"))
    copied = copy.deepcopy(compiled)
    assert has_compiled_steps(copied)
    drop_compiled_steps(copied)
    assert not has_compiled_steps(copied)
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        assert getattr(copied, name).__self__ is copied
    assert has_compiled_steps(compiled)
    assert "forward" in vars(compiled)


def test_a_module_without_compiled_steps_keeps_what_it_has() -> None:
    module = Regression()
    patched = module.forward = lambda x: x  # type: ignore[method-assign]
    drop_compiled_steps(module)
    assert module.forward is patched
    assert not is_forward_redirected(module)


def test_whether_a_call_is_that_of_a_step() -> None:
    module, calls = Regression(), []
    module.register_forward_pre_hook(lambda module, args: calls.append(is_forward_redirected(module)))
    wrapper = nn.Sequential(module)  # as DDP does, calls the module
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx=0: module(batch)  # type: ignore[method-assign]
    _ForwardRedirection()(wrapper, module, "validation_step", torch.ones(2, 3))
    module.validation_step = step  # type: ignore[method-assign]
    assert calls == [True, False]  # the step's, and that of `forward` within it
    module(torch.ones(2, 3))
    assert calls[-1] is False


def test_nothing_else_uses_these_names() -> None:
    private = re.compile(
        r"_batches_that_stepped|\._evaluation_loop|\._combined_loader|_on_before_batch_transfer|_compiler_ctx"
        r"|_ForwardRedirection|\b(?!self\b)\w+\._trainer\b|\"_trainer\""
    )
    paths = [path for path in PACKAGE.rglob("*.py") if private.search(path.read_text())]
    assert [path.name for path in paths] == ["lightning_private.py"]
