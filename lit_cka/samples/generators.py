"""Random generators, and other state, that datasets, samplers, transforms and modules hold themselves."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, Union

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Generator = Union[torch.Generator, np.random.Generator, np.random.RandomState, random.Random]
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEVELS = 3  # a dataset's transform's list of transforms
_MOST_ITEMS = 16  # of a list; the paths of a million images hold no generators
# Neither holds state that a pass over the data changes.
_OTHERS = (pl.Trainer, Tensor, np.ndarray, ModuleType, type, Iterator)


@contextmanager
def preserved_generators(objects: Iterable[Any]) -> Iterator[None]:
    """Leave the random generators as they were that some objects hold: modules, dataloaders, samplers, datasets.

    They are found as attributes, in lists and dictionaries of attributes, and in what functions close over, three
    levels deep; of modules in all submodules.
    """
    states = [(generator, state_of(generator)) for generator in generators_in(objects)]
    try:
        yield
    finally:
        for generator, state in states:
            set_state(generator, state)


@contextmanager
def preserved_attributes(objects: Iterable[Any]) -> Iterator[None]:
    """Leave the attributes of some objects, and of the datasets and transforms that they hold, as they were.

    What is added to lists and dictionaries is taken out again, and a file that is opened at first use is closed, so
    that worker processes do not inherit it.
    """
    objects = list(objects)
    roots = {id(value) for value in objects}
    holders = [
        holder
        for holder, _ in _holders(objects)
        if hasattr(holder, "__dict__")
        and not isinstance(holder, type)  # a class that batches are made by
        and (id(holder) in roots or isinstance(holder, Dataset) or callable(holder))
    ]
    before = [(vars(holder), dict(vars(holder))) for holder in holders]
    contents = [(value, value.copy()) for _, kept in before for value in kept.values() if _grows(value)]
    try:
        yield
    finally:
        for attributes, kept in before:
            _restore(attributes, kept)
        for value, content in contents:
            if not _same(value, content):
                value.clear()
                value.extend(content) if isinstance(value, (list, deque)) else value.update(content)


def _grows(value: Any) -> bool:
    return type(value) in (list, dict, set, deque)


def _same(value: Any, content: Any) -> bool:
    if isinstance(value, dict):
        return _same(list(value.items()), list(content.items())) if len(value) == len(content) else False
    pairs = zip(value, content, strict=False)
    return len(value) == len(content) and all(a is b or (type(a) is tuple and _same(a, b)) for a, b in pairs)


def _restore(attributes: dict[str, Any], kept: dict[str, Any]) -> None:
    """Touch nothing but what has changed: other threads may be using the object."""
    for name in attributes.keys() - kept.keys():
        del attributes[name]
    for name, value in kept.items():
        if name not in attributes or attributes[name] is not value:
            attributes[name] = value


def generators_in(objects: Iterable[Any]) -> list[Generator]:
    """The random generators that some objects hold, each once."""
    found: dict[int, Generator] = {}
    for _, values in _holders(objects):
        found.update({id(value): value for value in values if isinstance(value, _GENERATORS)})
    return list(found.values())


def _holders(objects: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Objects of Python classes, reached through attributes, with the values that each of them holds."""
    seen: set[int] = set()
    level: list[Any] = list(objects)
    for _ in range(_LEVELS + 1):
        following: list[Any] = []
        for holder in level:
            if id(holder) not in seen:
                seen.add(id(holder))
                values = list(_values(holder))
                yield holder, values
                following += [value for value in values if _may_hold(value)]
        level = following


def _values(holder: Any) -> Iterator[Any]:
    """What an object holds directly, in its lists and dictionaries, or what a function closes over."""
    if isinstance(holder, nn.Module):
        parts = list(holder.modules())
        values = [value for part in parts for name, value in vars(part).items() if name not in _TENSORS]
    elif isinstance(holder, MethodType | BuiltinMethodType):
        values = [holder.__self__, getattr(holder, "__func__", None)]
    elif isinstance(holder, functools.partial):
        values = [holder.func, holder.args, holder.keywords]
    elif isinstance(holder, FunctionType):
        values = list(_values_of_function(holder))
    elif isinstance(holder, Mapping | list | tuple):
        values = [holder]
    else:
        values = [*vars(holder).values(), *_methods(type(holder))] if hasattr(holder, "__dict__") else []
    for value in values:
        yield value
        if isinstance(value, Mapping):
            yield from islice(value.values(), _MOST_ITEMS)
        elif isinstance(value, list | tuple):
            yield from islice(value, _MOST_ITEMS)


_TENSORS = {"_parameters", "_buffers", "_modules"}


def _values_of_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in function.__code__.co_names:  # a generator of the function's module
        if isinstance(value := function.__globals__.get(name), _GENERATORS):
            yield value


def _methods(holder: type) -> Iterator[FunctionType]:
    """What a dataset or transform does when it is read, for the generators of its module."""
    for name in ("__getitem__", "__getitems__", "__iter__", "__call__"):
        if isinstance(method := getattr(holder, name, None), FunctionType):
            yield method


def _may_hold(value: Any) -> bool:
    if isinstance(value, (*_OTHERS, *_GENERATORS)):
        return False
    if isinstance(value, FunctionType | MethodType | BuiltinMethodType | functools.partial):
        return True
    module = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and module not in sys.stdlib_module_names and not isinstance(value, pl.Callback)


def state_of(generator: Generator) -> Any:
    """The state of a random generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    try:
        return generator.getstate()
    except NotImplementedError:  # of the operating system
        return None


def set_state(generator: Generator, state: Any) -> None:
    """Set a random generator to a state that it had."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif state is not None:
        generator.setstate(state)


def advance(generator: Generator, number: int) -> None:
    """Draw so many numbers from a random generator, as what comes between two passes over the data may do."""
    if isinstance(generator, torch.Generator):
        torch.rand(number, generator=generator, device=generator.device)
    else:
        for _ in range(number):
            generator.random()
