"""A frozen copy of a model as it is now: `snapshot`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_cka.features.compiled import forget_compiled_steps
from lit_cka.features.lightning_private import attach_trainer, attached_trainer


def snapshot(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` in eval mode that shares no tensor with it; datasets and trainers aren't copied.

    Raises:
        ValueError: if the model holds something that can't be copied.
    """
    memo: dict[int, Any] = {id(held): held for held in _held_data(model)}
    try:
        with torch.inference_mode(False):
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be copied to keep its weights as the reference "
            f"({type(error).__name__}: {error}). Pass `reference=` a module or the path of a checkpoint."
        ) from error
    forget_compiled_steps(copied)
    if isinstance(model, pl.LightningModule):  # a forward may look at the trainer, and may log: the copy must not
        attach_trainer(copied, attached_trainer(model))
        vars(copied)["log"] = vars(copied)["log_dict"] = lambda *args, **kwargs: None
    return copied.requires_grad_(False).eval()


def _held_data(model: nn.Module) -> Sequence[object]:
    """Datasets and the like that the model's modules hold, in containers and plain objects too: not to be copied."""
    data, seen = [], set()
    todo: list[Any] = [vars(module) for module in model.modules()]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, type, ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, (Dataset, DataLoader, pl.LightningDataModule, pl.Trainer)):
            data.append(value)
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif not isinstance(value, nn.Module) and hasattr(value, "__dict__") and not callable(value):
            todo.append(vars(value))
    return data
