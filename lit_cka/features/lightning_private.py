"""What this package uses of Lightning that Lightning keeps private, and nothing of it is used elsewhere.

Each function says what it gives, and reads it where Lightning 2.6.6 has it, with which all of them were checked. Other
releases may move it: `tests/features/test_lightning_private.py` calls each function in a training, and so tells which
one has to follow. Lightning itself is not imported here, so that features can be taken without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Attributes by which a LightningModule holds what runs it.
HOLDS_TRAINER = {"_trainer", "_fabric"}
# What `lightning.pytorch.utilities.compile.from_compiled` replaces on a module.
_COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def has_compiled_steps(module: nn.Module) -> bool:
    """Returns whether the module is a LightningModule whose steps `from_compiled` has replaced by compiled ones."""
    return getattr(module, "_compiler_ctx", None) is not None


def drop_compiled_steps(copied: nn.Module) -> None:
    """Give a deep copy of a compiled LightningModule the methods of its class back.

    `to_uncompiled` would give it the original's methods, which are bound to the original.
    """
    if vars(copied).pop("_compiler_ctx", None) is not None:
        for name in _COMPILED_METHODS:
            vars(copied).pop(name, None)


def is_forward_redirected(module: nn.Module) -> bool:
    """Returns whether a call of the LightningModule runs its step: a strategy that wraps the module, such as DDP, has
    for a moment put the step in the place of `forward` (`strategies/strategy.py`, `_ForwardRedirection`).
    """
    forward = vars(module).get("forward")
    return str(getattr(forward, "__qualname__", "")).startswith("_ForwardRedirection.")


def logging_step(trainer: pl.Trainer) -> int:
    """Returns the step that the trainer gives to the loggers with what is logged now: the number of batches before the
    current one that ended in an optimizer step, however many optimizers there are.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def note_same_on_all_ranks(key: str) -> None:
    """Have Lightning not recommend `sync_dist=True` for a scalar that has the same value on all ranks already."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import warning_cache

    warning_cache.add(
        f"It is recommended to use `self.log({key!r}, ..., sync_dist=True)` when logging on epoch level in distributed "
        "setting to accumulate the metric across devices."
    )


def evaluation_loop(trainer: pl.Trainer) -> Any:
    """Returns the loop of the evaluation that runs, or runs next: of validation, within `fit` or not, or of testing."""
    return trainer._evaluation_loop


def test_data(trainer: pl.Trainer) -> Any:
    """Returns what a test takes its data from, before it has any: a datamodule, dataloaders, or the module itself."""
    return trainer.test_loop._data_source.instance


def limit_batches(trainer: pl.Trainer, numbers: Sequence[int | None]) -> None:
    """Have the evaluation that has begun read at most so many batches of each of its dataloaders; None leaves it."""
    limits = trainer._evaluation_loop._max_batches
    for index, number in enumerate(numbers):
        if number is not None:
            limits[index] = min(limits[index], number)


def combined_loader(loop: Any) -> Any:
    """Returns the `CombinedLoader` of an evaluation loop's dataloaders; None where they are not set up yet."""
    return loop._combined_loader


def is_sequential(combined: Any) -> bool:
    """Returns whether a `CombinedLoader` gives one dataloader after the other, not a batch of each at a time."""
    return bool(combined._mode == "sequential")


def before_batch_transfer(module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Returns what `on_before_batch_transfer`, of the module or of its trainer's datamodule, makes of a batch."""
    return module._on_before_batch_transfer(batch, dataloader_idx)


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Returns the module's trainer, or None where `module.trainer` would raise."""
    return module._trainer


def attach_trainer(module: nn.Module, trainer: pl.Trainer | None) -> None:
    """Give a LightningModule a trainer; `module.trainer = ...` would give it to the modules inside, too."""
    vars(module)["_trainer"] = trainer
