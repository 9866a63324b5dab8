"""Copies of what a step passes to a model: nothing in them is shared with the original."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class CopyError(ValueError):
    """Something that a model is called with can't be copied."""


def private_copy(value: Any) -> Any:
    """Return a deep copy in which no tensor, object or container is the original's.

    Tensors keep their `requires_grad`, but not what they were computed from.

    Raises:
        CopyError: if something can't be copied, such as an iterator; the message says what to do.
    """
    # Given first, since a tensor with a history can't be deep-copied.
    memo: dict[int, Any] = {id(tensor): _copied(tensor) for tensor in _tensors_within(value)}
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise CopyError(
            f"What the step passes to the model can't be copied for the reference ({type(error).__name__}: {error}), "
            "and the reference has to run beside it, since it is another architecture or the data differ at every "
            "pass. Pass fixed batches as `probe=`."
        ) from error


def batch_copy(batch: Any) -> Any:
    """Return a batch for one model alone: what that changes in place is as it was for the next.

    It is a `private_copy`, but for what can't be copied, which stays as it is.
    """
    try:
        return private_copy(batch)
    except CopyError:
        pass
    if isinstance(batch, dict):
        return {name: batch_copy(value) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(batch_copy, batch))
    if type(batch) in (list, tuple):
        return type(batch)(map(batch_copy, batch))
    return batch


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_(True) if tensor.requires_grad else copied


def _tensors_within(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers and in the attributes of objects."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, torch.nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
        if hasattr(item, "__dict__") and not callable(item) and not isinstance(item, Tensor):
            todo += vars(item).values()
