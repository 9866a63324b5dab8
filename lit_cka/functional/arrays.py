"""NumPy arrays where tensors are asked for: `takes_arrays`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function take NumPy arrays, and sequences and mappings of them, in place of tensors.

    Its result stays what it is, float64 tensors in this package. An array given twice is one tensor given twice.

    Raises:
        ValueError: when called, on arrays of no numbers that torch has, such as strings or objects.
    """

    @functools.wraps(function)
    def with_arrays(*args: P.args, **kwargs: P.kwargs) -> R:
        seen: dict[int, Any] = {}
        taken = [as_tensors(value, seen) for value in args]
        return function(*taken, **{name: as_tensors(value, seen) for name, value in kwargs.items()})

    return with_arrays


def as_tensors(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """Returns a value with tensors in place of NumPy arrays; the same object where there are none.

    Args:
        value: an array, a list, tuple or dict of arrays, or anything else.
        seen: what has been converted before, by identity.
    """
    if isinstance(value, (Tensor, int, float, str)) or value is None:
        return value
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = _converted(value, seen)
    return seen[id(value)]


def _converted(value: Any, seen: dict[int, Any]) -> Any:
    if type(value) in (list, tuple):
        items = [as_tensors(item, seen) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        mapping = {key: as_tensors(item, seen) for key, item in value.items()}
        return value if all(mapping[key] is value[key] for key in value) else mapping
    return _as_tensor(value) if hasattr(value, "__array_interface__") else value


def _as_tensor(array: Any) -> Tensor:
    # Torch can't see backwards, byte-swapped or longer ones, and warns of those that are not to be written to.
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype("float64")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.as_tensor(array)
    except TypeError as error:
        raise ValueError(f"Expected an array of numbers, but got one of dtype {array.dtype}.") from error
