"""Lightning's evaluation loops, run once more than the trainer does: private to Lightning, checked with 2.6.6."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.seed import isolate_rng

from lit_cka.features.lightning_private import combined_loader, evaluation_loop

# How far an evaluation loop is.
_PROGRESS = ("batch_progress", "_restarting", "_restart_stage", "_has_run", "_seen_batches_per_dataloader")


def evaluation_loops(trainer: pl.Trainer) -> list[Any]:
    """Return the loops of validation within `fit`, of validation alone, and of testing."""
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]


def is_empty(loop: Any) -> bool:
    """Whether the loop has dataloaders, but no batches."""
    return combined_loader(loop) is not None and not sum(loop.max_batches)


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the batch that runs is the evaluation's last one, of all its dataloaders."""
    return bool(evaluation_loop(trainer).batch_progress.is_last_batch)


def repeat_step(trainer: pl.Trainer, callback: pl.Callback, batch: Any, batch_idx: int, dataloader: int) -> None:
    """Run the validation or test step on a batch as the loop that runs does, and what comes before it.

    Args:
        trainer: whose loop runs.
        callback: whose hook for the start of the batch has got it; those that come later get it first.
        batch: what that hook has got, or a copy.
        batch_idx: its number.
        dataloader: the number of its dataloader.
    """
    loop: Any = evaluation_loop(trainer)
    has_several = loop._is_sequential and loop.num_dataloaders > 1
    kwargs = loop._build_kwargs(batch, batch_idx, dataloader if has_several else None)
    stage = "test" if trainer.testing else "validation"
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    later = callbacks[callbacks.index(callback) + 1 :]
    _call_hooks(trainer, filter(_may_change_batches, later), f"on_{stage}_batch_start", *kwargs.values())
    call._call_lightning_module_hook(trainer, f"on_{stage}_batch_start", *kwargs.values())
    step = f"{stage}_step"
    call._call_strategy_hook(trainer, step, *loop._build_step_args_from_hook_kwargs(kwargs, step))


def call_before_runs(trainer: pl.Trainer, before: Callable[[Any], None]) -> Callable[[], None]:
    """Have `before(loop)` called whenever an evaluation loop of the trainer is about to run; return how to stop it."""
    stops = []
    for loop in evaluation_loops(trainer):
        stops.append(_call_before(loop, before))

    def stop() -> None:
        for each in stops:
            each()

    return stop


def _call_before(loop: Any, before: Callable[[Any], None]) -> Callable[[], None]:
    callers: list[Callable[[Any], None]] = vars(loop).setdefault("_lit_cka_callers", [])
    if not callers:

        def run() -> Any:
            with _set_up_once(loop):
                for caller in list(callers):
                    caller(loop)
                return type(loop).run(loop)

        loop.run = run
    callers.append(before)

    def stop() -> None:
        if before in callers:
            callers.remove(before)
        if not callers:
            vars(loop).pop("run", None)

    return stop


@contextmanager
def _set_up_once(loop: Any) -> Iterator[None]:
    """Have the loop ask the user for dataloaders once, though it runs twice."""
    is_set_up = False

    def setup_data() -> None:
        nonlocal is_set_up
        if not is_set_up:
            type(loop).setup_data(loop)
        is_set_up = True

    loop.setup_data = setup_data
    try:
        yield
    finally:
        del loop.setup_data


@contextmanager
def unnoticed(trainer: pl.Trainer, callback: pl.Callback, max_batches: int | None = None) -> Iterator[None]:
    """Let a loop run for this callback alone: no other one, no logger, no metric and no random state sees it.

    To the module it is a sanity check, if it is no test. Other callbacks may change the batches, as they always do.

    Args:
        trainer: whose loop.
        callback: the one whose hooks are called.
        max_batches: how many batches of each dataloader to run, if it is no test; None for all.
    """
    loop: Any = evaluation_loop(trainer)
    connector: Any = trainer._logger_connector
    loggers, verbose, num_steps = trainer.loggers, loop.verbose, trainer.num_sanity_val_steps
    connected = {name: value for name, value in vars(connector).items() if name != "trainer"}
    # A loop that goes on where a checkpoint was written would leave out batches; and does so afterwards.
    of_loop, times = {name: vars(loop)[name] for name in _PROGRESS}, _last_times(trainer)
    vars(loop).update(
        batch_progress=type(loop.batch_progress)(), _restarting=False, _seen_batches_per_dataloader=defaultdict(int)
    )
    stage = trainer.state.stage
    if not trainer.testing:
        trainer.sanity_checking = True
        trainer.num_sanity_val_steps = float("inf") if max_batches is None else max_batches
    connector.reset_results()  # of this loop: a training has logged, too
    connector.reset_metrics()
    trainer.loggers, loop.verbose = [_SilentLogger(logger) for logger in loggers], False
    try:
        with isolate_rng(), _hooks_of(trainer, callback):
            yield
    finally:
        trainer.loggers, loop.verbose, trainer.num_sanity_val_steps = loggers, verbose, num_steps
        connector.reset_results()
        trainer.state.stage = stage
        vars(connector).update(connected)
        vars(loop).update(of_loop)
        vars(trainer).pop("_last_val_time", None)
        vars(trainer).update(times)


@contextmanager
def unnoticed_step(trainer: pl.Trainer) -> Iterator[None]:
    """Let a step run once more in an evaluation that goes on: no logger, no value and no random state notices."""
    loop: Any = evaluation_loop(trainer)
    connector: Any = trainer._logger_connector
    results, loggers = loop._results, trainer.loggers
    connected = {name: value for name, value in vars(connector).items() if name != "trainer"}
    loop._results = type(results)(training=False)
    loop._results.batch, loop._results.dataloader_idx = results.batch, results.dataloader_idx
    trainer.loggers = [_SilentLogger(logger) for logger in loggers]
    try:
        with isolate_rng():
            yield
    finally:
        loop._results, trainer.loggers = results, loggers
        vars(connector).update(connected)


def changed_by_steps(trainer: pl.Trainer, callback: pl.Callback) -> list[Any]:
    """Return what an unnoticed step or run may change, and has to be put back: it belongs to the user."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
    return [trainer.lightning_module, datamodule, *batch_changers(trainer, callback)]


def _last_times(trainer: pl.Trainer) -> dict[str, Any]:
    """When the last validation was, of a trainer that knows."""
    return {name: value for name, value in vars(trainer).items() if name == "_last_val_time"}


class _SilentLogger(DummyLogger):
    """Takes everything and logs nothing, in the place of a logger."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._replaced = logger

    @property
    def name(self) -> str:
        return self._replaced.name or ""

    @property
    def version(self) -> Any:
        return self._replaced.version

    @property
    def save_dir(self) -> str | None:
        return getattr(self._replaced, "log_dir", None) or self._replaced.save_dir

    @property
    def log_dir(self) -> str | None:
        return self.save_dir


@contextmanager
def _hooks_of(trainer: pl.Trainer, callback: pl.Callback) -> Iterator[None]:
    """Have no hooks of the trainer's callbacks called but this one's, and those that may change a batch."""
    call_all = call._call_callback_hooks

    def call_some(caller: pl.Trainer, hook_name: str, *args: Any, **kwargs: Any) -> None:
        if caller is not trainer:
            call_all(caller, hook_name, *args, **kwargs)
            return
        others = hook_name in ("on_validation_batch_start", "on_test_batch_start")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        chosen = [each for each in callbacks if each is callback or (others and _may_change_batches(each))]
        _call_hooks(trainer, chosen, hook_name, *args)

    call._call_callback_hooks = call_some  # type: ignore[assignment]  # it passes on what it is given
    try:
        yield
    finally:
        call._call_callback_hooks = call_all


def _call_hooks(trainer: pl.Trainer, callbacks: Iterable[pl.Callback], hook_name: str, *args: Any) -> None:
    module = trainer.lightning_module
    outer, module._current_fx_name = module._current_fx_name, hook_name
    for callback in callbacks:
        getattr(callback, hook_name)(trainer, module, *args)
    module._current_fx_name = outer


def _may_change_batches(callback: pl.Callback) -> bool:
    """Whether it is of the user's own: Lightning's show progress and statistics."""
    is_lightnings = type(callback).__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
    return isinstance(callback, LambdaCallback) or not is_lightnings


def batch_changers(trainer: pl.Trainer, callback: pl.Callback) -> list[pl.Callback]:
    """Return the other callbacks, of which some hooks are called in an unnoticed run."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if _may_change_batches(each) and type(each) is not type(callback)]
