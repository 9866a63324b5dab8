"""How many samples a batch holds, and where the rows of a layer lie when they are more than the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

_MOST_CHANNELS = 4  # of an image
_LIKELY, _POSSIBLE = 2, 1  # votes
RowOrder = Literal["by sample", "by part"]


class BatchRows(NamedTuple):
    """What the shapes in a batch say.

    Attributes:
        votes: for each possible number of samples, how much speaks for it; of equal ones the first is the likelier.
        second_axes: sizes (n, m) of tensors with m parts of each of n samples, such as the crops of an image.
        lists: sizes (n, m) of lists of m tensors with n samples each.
    """

    votes: Counter[int]
    second_axes: set[tuple[int, int]]
    lists: set[tuple[int, int]]

    @property
    def num_samples(self) -> int | None:
        """The likeliest number of samples; None where nothing has a leading axis."""
        return max(self.votes, key=self.votes.__getitem__) if self.votes else None

    def order(self, num_samples: int, num_rows: int) -> RowOrder | None:
        """How the m rows of each sample lie: one sample after the other, or one part after the other.

        None where the shapes don't tell, or tell both.
        """
        parts = (num_samples, num_rows // max(num_samples, 1))
        if num_samples * parts[1] != num_rows or (parts in self.second_axes) == (parts in self.lists):
            return None
        return "by sample" if parts in self.second_axes else "by part"


def rows_of(batch: Any) -> BatchRows:
    """Look at the shapes of all tensors, arrays and lists in nested tuples, lists, mappings and dataclasses."""
    rows = BatchRows(Counter(), set(), set())
    if isinstance(batch, (Tensor, np.ndarray)):
        shape = _shape(batch)
        rows.votes.update(dict.fromkeys(shape[:1], _LIKELY))
        if len(shape) > 1:
            rows.second_axes.add((shape[0], shape[1]))
    elif (parts := _named_parts(batch)) is not None:
        _add_all(rows, map(rows_of, parts))
    elif isinstance(batch, (list, tuple)) and batch:
        _look_at_list(batch, rows)
    return rows


def _named_parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return value if isinstance(value, tuple) and hasattr(value, "_fields") else None


def _add_all(rows: BatchRows, parts: Iterable[BatchRows]) -> None:
    for part in parts:
        rows.votes.update(part.votes)
        rows.second_axes.update(part.second_axes)
        rows.lists.update(part.lists)


def _look_at_list(values: list[Any] | tuple[Any, ...], rows: BatchRows) -> None:
    """A list may hold the parts of a batch, one thing for each sample, or tensors of all samples."""
    parts = [rows_of(value) for value in values]
    are_tensors = [isinstance(value, (Tensor, np.ndarray)) for value in values]
    if any(are_tensors) and not all(are_tensors):  # different things side by side
        _add_all(rows, parts)
        return
    candidates = [set(part.votes) for part in parts if part.votes]
    common = set.intersection(*candidates) if candidates else set()
    is_for_each = not common or (all(are_tensors) and _are_images([_shape(value) for value in values]))
    are_alike = all(are_tensors) and len({value.ndim for value in values}) == 1 < values[0].ndim
    for n in common:
        rows.votes[n] += _POSSIBLE if is_for_each else min(part.votes[n] for part in parts if part.votes)
        if are_alike:
            rows.lists.add((n, len(values)))
    rows.votes[len(values)] += _LIKELY if is_for_each else _POSSIBLE
    for part in parts:
        rows.second_axes.update(axes for axes in part.second_axes if axes[0] in common)


def _are_images(shapes: list[tuple[int, ...]]) -> bool:
    """Whether they look like images of several sizes, one for each sample, rather than tensors of all samples."""
    return len(set(shapes)) > 1 and all(len(shape) == 3 and shape[0] <= _MOST_CHANNELS for shape in shapes)


def _shape(value: Any) -> tuple[int, ...]:
    """The shape, with the number of samples alone where there is none, as of nested tensors."""
    if isinstance(value, Tensor) and value.is_nested:
        return (value.size(0),)
    return tuple(value.shape)
