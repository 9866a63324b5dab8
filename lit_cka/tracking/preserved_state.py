"""What a step may change of a module besides its weights, left as it was: `preserved_state`."""

from __future__ import annotations

import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_cka.features.lightning_private import HOLDS_TRAINER
from lit_cka.samples.generators import preserved_generators

_LEVELS = 3  # an object's list of dictionaries
_MOST_ITEMS = 64  # of a container that are looked into
_MOST_BYTES = 2**28  # of a tensor or array that is no buffer; a data set that a module holds is not copied
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
# The first two are exchanged, sharded and wrapped by others.
_NOT_KEPT = {"_parameters", "_modules", "_buffers", *HOLDS_TRAINER}
Undo = Callable[[], None]


@contextmanager
def preserved_state(objects: Iterable[Any]) -> Iterator[None]:
    """Leave modules and other objects as they were: buffers, attributes, and what these hold.

    Attributes are those of all submodules, counters and metrics among them. In lists, dictionaries, tensors, arrays
    and random generators that they hold, or that the user's hooks close over, the content is put back, and so are the
    attributes of plain objects; three levels deep. Weights are not: no step changes them, and `TrainingStart` has them.
    """
    objects = list(objects)
    undo: list[Undo] = []
    seen: set[int] = set()
    level = objects
    for _ in range(_LEVELS + 1):
        following: list[Any] = []
        for value in level:
            if id(value) not in seen:
                seen.add(id(value))
                following += _keep(value, undo)
        level = following
    with preserved_generators(objects):
        try:
            yield
        finally:
            with torch.inference_mode():  # in which any tensor may be changed in place
                for each in reversed(undo):
                    each()


def _keep(value: Any, undo: list[Undo]) -> list[Any]:
    """Add how to put back what a value is now, and return what it holds."""
    if isinstance(value, nn.Module):
        return [held for module in value.modules() for held in _keep_module(module, undo)]
    if isinstance(value, (Tensor, np.ndarray)):
        if value.nbytes <= _MOST_BYTES:
            _keep_content(value, undo)
        return []
    if type(value) in _CONTAINERS:
        return _keep_container(value, undo)
    if isinstance(value, FunctionType):
        return _keep_cells(value, undo)
    if isinstance(value, (MethodType, functools.partial)):
        return [value.__self__] if isinstance(value, MethodType) else [value.func, *value.args]
    if isinstance(value, tuple):
        return list(islice(value, _MOST_ITEMS))
    return _keep_attributes(vars(value), undo) if _is_of_the_user(value) else []


def _keep_module(module: nn.Module, undo: list[Undo]) -> list[Any]:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            _keep_content(buffer, undo)
            undo.append(functools.partial(_bind, module._buffers, name, buffer))
    undo.append(functools.partial(_keep_names, module._modules, dict(module._modules)))
    # torch's own modules have nothing else that a step changes, but sharded ones have what must not be put back.
    if type(module).__module__.partition(".")[0] == "torch":
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        return [hook for of_kind in hooks for hook in of_kind.values()]
    return _keep_attributes(vars(module), undo)


def _keep_names(modules: dict[str, nn.Module | None], before: dict[str, nn.Module | None]) -> None:
    """Of submodules, take out those that were added, as a tracker of metrics does, and put back those that are gone."""
    for name in modules.keys() - before.keys():
        del modules[name]
    for name in before.keys() - modules.keys():
        modules[name] = before[name]


def _keep_attributes(attributes: dict[str, Any], undo: list[Undo]) -> list[Any]:
    kept = {name: value for name, value in attributes.items() if name not in _NOT_KEPT}

    def put_back() -> None:
        for name in attributes.keys() - kept.keys() - _NOT_KEPT:
            del attributes[name]
        for name, value in kept.items():
            _bind(attributes, name, value)

    undo.append(put_back)
    return list(kept.values())


def _bind(names: dict[str, Any], name: str, value: Any) -> None:
    if name not in names or names[name] is not value:
        names[name] = value


def _keep_container(value: Any, undo: list[Undo]) -> list[Any]:
    content = value.copy()

    def put_back() -> None:
        if not _has_same(value, content):
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)

    undo.append(put_back)
    return list(islice(value.values() if isinstance(value, dict) else value, _MOST_ITEMS))


def _has_same(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, set):
        return bool(value == content)
    if isinstance(value, dict):
        pairs = zip(value.items(), content.items(), strict=True)
        return all(a is b and x is y for (a, x), (b, y) in pairs)
    return all(x is y for x, y in zip(value, content, strict=True))


def _keep_cells(function: FunctionType, undo: list[Undo]) -> list[Any]:
    """Of the variables that a function closes over."""
    held = []
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        held.append(value)
        undo.append(functools.partial(setattr, cell, "cell_contents", value))
    return held


def _keep_content(value: Tensor | np.ndarray[Any, Any], undo: list[Undo]) -> None:
    if isinstance(value, np.ndarray):
        undo.append(functools.partial(np.copyto, value, value.copy()) if value.flags.writeable else lambda: None)
        return
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.layout is not torch.strided or local.is_nested or local.device.type == "meta" or not local.numel():
        return
    content = local.detach().clone()

    def put_back() -> None:
        if not torch.equal(local, content):
            local.detach().copy_(content)

    undo.append(put_back)


def _is_of_the_user(value: Any) -> bool:
    """Whether an object is of a class of the user's own: those of libraries may hold files, threads, connections."""
    if isinstance(value, (pl.Trainer, ModuleType, type)) or not hasattr(value, "__dict__"):
        return False
    root = type(value).__module__.partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root not in sys.stdlib_module_names and "site-packages" not in file and "dist-packages" not in file
