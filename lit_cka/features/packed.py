"""Sequences that a model is given as one: images as rows of patches, or texts without padding. Which rows are whose.

A vision tower that packs images returns a row for each patch of all images. What it is told beside tells where an image
begins (`grid_thw`, `image_sizes`), and the placeholders in the text tell which sample it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GRIDS = ("grid_thw", "grid_thws", "image_grid_thw", "video_grid_thw", "target_sizes", "grid_hw", "image_grid_hw")
_LIMITS = ("cu_seq_lens_q", "cu_seqlens")
_TEXT = ("input_ids", "inputs_embeds")


class Packed(NamedTuple):
    """What a module was called with as one sequence.

    Attributes:
        lengths: rows of each part, in their order.
        num_parts: of each sample, in their order; None where each part is a sample, or nothing tells.
        is_told: whether the module was told so; else it may be so, if the rows are as many.
    """

    lengths: list[int]
    num_parts: list[int] | None = None
    is_told: bool = True


class PackedCalls:
    """What a model, and the modules inside it that are running, were called with as one sequence."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._images: list[Packed] = []  # in the texts that the outermost call was given
        self.num_samples: int | None = None  # that the outermost call is known to be of
        self._by_name: dict[str, Packed | None] = {}

    def note(self, name: str, module: Any, arguments: Mapping[str, Any], *, outermost: bool) -> None:
        """Remember what a module is called with, by the names of its arguments."""
        config = getattr(module, "config", None)
        if outermost:
            self.clear()
        text = next((arguments[key] for key in _TEXT if isinstance(arguments.get(key), Tensor)), None)
        packed = _of_texts(arguments) if outermost else None
        if text is None:
            packed = packed or _of_images(config, arguments)
        elif outermost and packed is None:
            self._images, self.num_samples = _in_texts(config, arguments), len(text)
        if outermost and text is None and packed is not None and packed.is_told:
            self.num_samples = len(packed.lengths)
        same = (images for images in self._images if packed is not None and images.lengths == packed.lengths)
        self._by_name[name] = next(same, packed)

    def rows_of_samples(self, layer: str, shape: torch.Size, num_samples: int | None) -> list[int] | None:
        """Returns how many of the rows of a layer's output are of each sample, in their order; None where they are no
        rows of packed sequences.

        Args:
            layer: its name.
            shape: of its output.
            num_samples: of the batch, if known.

        Raises:
            ValueError: if the rows are packed, and nothing tells whose they are, or some samples have none.
        """
        around = [name for name in self._by_name if name == "" or layer.startswith(f"{name}.")]
        packed = next((self._by_name[name] for name in sorted(around, key=len)[::-1] if self._by_name[name]), None)
        num_samples = self.num_samples if num_samples is None else num_samples
        if len(shape) == 3 and shape[0] == 1:
            shape = torch.Size(shape[1:])
        if packed is None or len(shape) != 2:
            return None
        lengths = _merged(packed.lengths, shape[0])
        if lengths is not None and packed.num_parts is not None:
            parts = iter(lengths)
            lengths = [sum(next(parts) for _ in range(count)) for count in packed.num_parts]
        if lengths is not None and num_samples in (None, len(lengths)):
            if 0 in lengths:
                raise ValueError(
                    f"Layer {layer!r} returned rows for all but {lengths.count(0)} of {len(lengths)} samples (texts "
                    "without images, say), of which it has no features. Choose other `layers`."
                )
            return lengths
        if not packed.is_told or shape[0] == num_samples:
            return None
        raise ValueError(
            f"Layer {layer!r} returned {shape[0]} rows for {len(packed.lengths)} packed sequences, and nothing tells "
            f"which of {'the' if num_samples is None else num_samples} samples they are of. Choose other `layers`, or "
            "pass a callable `pooling` that returns (samples, features)."
        )


def _merged(lengths: list[int], num_rows: int) -> list[int] | None:
    """Returns the lengths of the parts where they have so many rows together: one for each patch, for each square of
    patches, or for each part.
    """
    if num_rows == len(lengths):
        return [1] * num_rows
    factor, rest = divmod(sum(lengths), max(num_rows, 1))
    if rest or isqrt(factor) ** 2 != factor or any(length % max(factor, 1) for length in lengths):
        return None
    return [length // factor for length in lengths]


def _of_texts(arguments: Mapping[str, Any]) -> Packed | None:
    """Returns texts, or other sequences, of which a call is told the limits."""
    limits = next((arguments[name] for name in _LIMITS if isinstance(arguments.get(name), Tensor)), None)
    return None if limits is None or limits.ndim != 1 else Packed(limits.diff().tolist())


def _of_images(config: Any, arguments: Mapping[str, Any]) -> Packed | None:
    """Returns the images of a call, by the grids of their patches or by their sizes in pixels."""
    for name in _GRIDS:
        grid = arguments.get(name)
        if isinstance(grid, Tensor) and grid.ndim == 2 and not grid.is_floating_point():
            return Packed(grid.prod(dim=1).tolist())
    images, patch = arguments.get("pixel_values"), getattr(config, "patch_size", None)
    if not (isinstance(images, Tensor) and images.ndim == 4 and len(images) > 1 and isinstance(patch, int)):
        return None
    sizes = arguments.get("image_sizes")
    sizes = torch.as_tensor([tuple(images.shape[2:])] * len(images) if sizes is None else sizes)
    return Packed((sizes // patch).prod(dim=1).tolist(), is_told=False) if sizes.shape == (len(images), 2) else None


def _in_texts(config: Any, arguments: Mapping[str, Any]) -> list[Packed]:
    """Returns the images in texts, and the videos, with how many each text has, by their placeholders."""
    images = {name: value for name, value in arguments.items() if name != "video_grid_thw"}
    videos = {name: value for name, value in arguments.items() if name == "video_grid_thw"}
    found = []
    for kind, tokens, given in (
        (1, ("image_token_id", "image_token_index"), images),
        (2, ("video_token_id", "video_token_index"), videos),
    ):
        packed = _of_images(getattr(config, "vision_config", None), given)
        if packed is not None:
            token = next((getattr(config, name) for name in tokens if hasattr(config, name)), None)
            counts = _num_placeholders(arguments, kind, token)
            found.append(packed._replace(num_parts=_parts_in(packed.lengths, counts)))
    return found


def _num_placeholders(arguments: Mapping[str, Any], kind: int, token: int | None) -> list[int]:
    """Returns how many placeholders each text has, or an empty list where they are not known."""
    kinds, ids = arguments.get("mm_token_type_ids"), arguments.get("input_ids")
    if isinstance(kinds, Tensor):
        return (kinds == kind).sum(dim=1).tolist()
    return [] if token is None or not isinstance(ids, Tensor) else (ids == token).sum(dim=1).tolist()


def _parts_in(lengths: list[int], counts: list[int]) -> list[int] | None:
    """Returns how many of the parts of these lengths, in their order, fill the placeholders of each text."""
    factor, rest = divmod(sum(lengths), max(sum(counts), 1))
    if rest or not factor or isqrt(factor) ** 2 != factor or any(length % factor for length in lengths):
        return None
    left, num_parts = [length // factor for length in lengths], []
    for count in counts:
        before = len(left)
        while count > 0 and left:
            count -= left.pop(0)
        if count:
            return None
        num_parts.append(before - len(left))
    return None if left else num_parts
