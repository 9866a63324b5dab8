"""Models, steps and data of many kinds: all train as they do without the callback, and an unchanged one scores 1.

The kinds are in `zoo.py`.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, GeneratorType, MethodType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_cka import CKACallback
from tests.tracking.helpers import PlainLogger, trainer
from tests.tracking.zoo import KINDS, Kind

# Of a module: what it holds of the trainer and of the compiler, and what is compared by its values.
NOT_COMPARED = {"_trainer", "_parameters", "_buffers", "_modules", "_compiler_ctx", "dynamo_ctx"}
DIFFERS = "does not give the same features for the same batch twice"
REPEATS = "have the features of another one"
MIXES = "depends on the other samples of its batch"
SILENT = (
    "Lazy modules",
    "weight_norm",
    "CKA is biased",
    "shuffling enabled",
    "in eval mode at the start",
    "Swapping",
    "flex_attention called",
)


HOOKS_CALLED: list[Any] = []  # where nothing puts back what a callback holds


class Hooks(pl.Callback):
    """Notes which hooks of callbacks are called, and when."""

    def __init__(self) -> None:
        self.seen: list[Any] = []


def _noting(name: str) -> Any:
    # Those before a batch may change it: they are called in a run of their own, too, which nothing shows afterwards.
    is_kept = name not in ("on_validation_batch_start", "on_test_batch_start")

    def hook(self: Hooks, trainer: pl.Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        numbers = [value for value in args if isinstance(value, int)]
        called = (name, trainer.global_step, trainer.sanity_checking, *numbers)
        self.seen.append(called)
        if is_kept:
            HOOKS_CALLED.append(called)

    return hook


for name in dir(pl.Callback):
    if name.startswith("on_"):
        setattr(Hooks, name, _noting(name))


class Log(PlainLogger):
    @property
    def experiment(self) -> Any:
        return self


class Training:
    """One training, and all that it leaves behind."""

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        *,
        tracked: bool,
        lr: float = 0.1,
        num_sanity_val_steps: int = 0,
        against_module: bool = False,
    ) -> None:
        pl.seed_everything(12, verbose=False)
        reference = kind.build() if against_module else "initial"
        pl.seed_everything(11, verbose=False)
        self.module = kind.build()
        self.module.lr = lr  # type: ignore[assignment]
        self.callback = CKACallback(layers=kind.layers, reference=reference, log_figures=False)
        hooks, log, others = Hooks(), Log(), kind.callbacks(lr)
        HOOKS_CALLED.clear()
        options = {"logger": log, "num_sanity_val_steps": num_sanity_val_steps, **kind.options}
        callbacks = [*others, hooks, *([self.callback] if tracked else [])]
        data = kind.train(), kind.val()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run = trainer(folder, *callbacks, **options)
            run.fit(self.module, *data)
        shutil.rmtree(folder, ignore_errors=True)  # so that files of the next one have the same names
        self.warnings = [str(each.message) for each in seen if each.category is UserWarning]
        self.left = {
            "random states": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "weights": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "attributes": {name: attributes(part) for name, part in self.module.named_modules()},
            "buffers": dict(self.module.named_buffers()),
            "data": data,
            "hooks": (hooks.seen, list(HOOKS_CALLED)),
            "callbacks": [callback.state_dict() for callback in others],
            "logged": [(step, values) for step, values in map(without_scores, log.seen) if values.keys() - {"epoch"}],
            "metrics": without_scores((0, run.callback_metrics)),
            "progress": (run.global_step, run.current_epoch, run.num_sanity_val_steps),
            "batches": run.fit_loop.epoch_loop.val_loop.batch_progress,
        }


def attributes(module: nn.Module) -> dict[str, Any]:
    """All of a module but its tensors, with hooks by their number alone."""
    kept = {name: value for name, value in vars(module).items() if name not in NOT_COMPARED and "dynamo" not in name}
    hooks = {name: len(value) for name, value in kept.items() if name.endswith("_hooks")}
    return {**kept, **hooks, "names": [list(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")]}


def without_scores(logged: tuple[int | None, Mapping[str, Any]]) -> tuple[int | None, dict[str, Any]]:
    step, values = logged
    return step, {name: value for name, value in values.items() if not name.startswith(("cka/", "cka_"))}


def parts(value: Any) -> dict[Any, Any] | None:
    """What a value is made of, by name; None for what has a value of its own, or is compared elsewhere."""
    if isinstance(value, (Tensor, np.ndarray, str, bytes, nn.Module, pl.Trainer, type, FunctionType, MethodType)):
        return None
    if isinstance(value, torch.Generator):
        return {"state": value.get_state()}
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return {"state": value.getstate()}
    if isinstance(value, (GeneratorType, type(iter([])))):
        return {"what is left": list(value)}
    held = dict(getattr(value, "__dict__", {}))
    if isinstance(value, Mapping):
        return {**held, "keys": list(value), **value}
    if isinstance(value, (Sequence, set, deque)):
        return {**held, "length": len(value), **dict(enumerate(value))}
    return held or None


def same_values(one: Any, other: Any) -> bool:
    values = [torch.as_tensor(each).detach().double() for each in (one, other)]
    return torch.equal(*(value.nan_to_num(1e300) for value in values))


def differences(one: Any, other: Any, place: str, around: tuple[int, ...] = ()) -> Iterator[str]:
    """Where two values differ, whatever they are made of."""
    if type(one) is not type(other):
        yield f"{place}: {type(one).__name__} and {type(other).__name__}"
        return
    if id(one) in around:
        return
    mine, others = parts(one), parts(other)
    if mine is not None and others is not None:
        if list(mine) != list(others):
            yield f"{place}: {list(mine)} and {list(others)}"
        for name in mine.keys() & others.keys():
            yield from differences(mine[name], others[name], f"{place}.{name}", (*around, id(one)))
    elif isinstance(one, (Tensor, np.ndarray)):
        same = one.shape == other.shape and one.dtype == other.dtype
        if not same or not same_values(one, other):
            yield f"{place}: {one.reshape(-1)[:4]} and {other.reshape(-1)[:4]}"
    elif isinstance(one, (str, bytes, int, float, type(None))) and one != other:
        yield f"{place}: {one!r} and {other!r}"


def tracked_and_not(folder: Path, kind: Kind, **how: Any) -> Training:
    """Train twice from one seed, compare all that is left, and return the tracked one."""
    plain, tracked = (Training(folder, kind, tracked=each, **how) for each in (False, True))
    found = [text for name in plain.left for text in differences(plain.left[name], tracked.left[name], name)]
    assert not found, "\n".join(found[:20])
    assert len(tracked.callback.history) > 0
    return tracked


ALL = pytest.mark.parametrize("name", KINDS)


@ALL
def test_trained_as_without_the_callback(tmp_path: Path, name: str) -> None:
    tracked_and_not(tmp_path, KINDS[name])


@ALL
def test_trained_as_without_the_callback_after_a_sanity_check(tmp_path: Path, name: str) -> None:
    tracked_and_not(tmp_path, KINDS[name], num_sanity_val_steps=2)


@pytest.mark.parametrize("name", ["BatchNormInTrainMode", "CountsItsCalls"])
def test_trained_as_without_the_callback_against_another_model(tmp_path: Path, name: str) -> None:
    """Whose weights the live one plays: there are no initial weights to put its buffers back from."""
    tracked_and_not(tmp_path, KINDS[name], against_module=True)


@ALL
def test_an_unchanged_model_scores_1(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    training = Training(tmp_path, kind, tracked=True, lr=0.0)
    said = [text for text in training.warnings if not any(part in text for part in SILENT)]
    own = [text for text in said if REPEATS not in text]
    assert len(said) - len(own) == (name in ("SequencesWithPadding", "CombinedLoader max_size_cycle"))
    assert training.callback.history
    if kind.differs or kind.mixes:
        (text,) = own
        assert (DIFFERS if kind.differs else MIXES) in text
        assert min(training.callback.scores.values()) < 0.99
    else:
        assert own == []
        for record in training.callback.history:
            assert record["scores"] == pytest.approx(dict.fromkeys(record["scores"], 1.0), abs=1e-6)
            assert len(record["scores"]) > 0
