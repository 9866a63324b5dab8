"""Tensors in nested tuples, lists and mappings, such as the arguments of a call: all of them, or their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

_MOST_CHANNELS = 4  # of an image


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields all tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in _parts(value):
            yield from tensors_in(item)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (tuple, list)) else ()


def sizes_in(value: Any) -> tuple[set[int], set[int]]:
    """Returns the sizes of the first axes of all tensors, and those of the others; of a list of images its length."""
    if isinstance(value, Tensor):
        return {*value.shape[:1]}, {*value.shape[1:]}
    parts = [sizes_in(part) for part in _parts(value)]
    if isinstance(value, list) and value and all(map(_is_image, value)):
        return {len(value)}, set().union(*(first | others for first, others in parts))
    return set().union(*(first for first, _ in parts)), set().union(*(others for _, others in parts))


def has_images_of_several_sizes(value: Any) -> bool:
    """Returns whether there is a list of images that can't be one tensor."""
    if isinstance(value, list) and value and all(map(_is_image, value)):
        return len({image.shape for image in value}) > 1
    return any(has_images_of_several_sizes(part) for part in _parts(value))


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] <= _MOST_CHANNELS
