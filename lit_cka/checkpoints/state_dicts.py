"""Weights from files: safetensors, plain state dicts, Lightning and other training checkpoints; no unpickling."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_cka.checkpoints.weight_sets import find_weights, mapping_at, strip_wrappers

# How torch names what it did not unpickle, in a text of many lines.
_PICKLED = re.compile(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+)")


class HasShape(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...


def load_state_dict(
    path: str | os.PathLike[str], *, weights_only: bool = True, weights: str | None = None
) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file, on the CPU, by parameter name.

    Reads safetensors, plain state dicts, and checkpoints that keep one under "state_dict" (Lightning, open_clip, timm)
    or "model". The prefix that DDP (`module.`) or `torch.compile` (`_orig_mod.`) put before all names is removed.

    Args:
        path: the file.
        weights_only: False unpickles arbitrary objects and thus runs code that the file's author chose; do that only
            with files you trust. Safetensors never hold code.
        weights: which of several sets of weights: the keys to it ("state_dict_ema"), or what its names begin with
            ("teacher"); see `lit_cka.checkpoints.weight_sets`. None for the only one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no weights or several sets of them, or holds pickled objects and
            `weights_only` is true.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, f"{folder}/last.ckpt")
        ...     list(load_state_dict(f"{folder}/last.ckpt"))
        ['fc.weight']
    """
    path = Path(path)
    require_file(path)
    content = read_content(path, weights_only=weights_only)
    found = find_weights(content, path, weights)
    held = mapping_at(content, found.keys)
    return {name: held[name_in_file] for name, name_in_file in found.names.items()}


def require_file(path: Path) -> None:
    """Raise a FileNotFoundError if there is no checkpoint file, a ValueError if something else is there."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"Expected a checkpoint file at {str(path)!r}, but it is a pipe, a socket or a device.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint file at {str(path)!r}, but there is none.")


def read_content(path: Path, *, weights_only: bool, mmap: bool = False) -> Any:
    """Returns what a file holds.

    Raises:
        ValueError: if it is damaged, or holds pickled objects and `weights_only` is true.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
    except Exception as error:  # whatever bytes do to an unpickler
        pickled = _PICKLED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if pickled is None:
            raise ValueError(f"{str(path)!r} is damaged or no checkpoint ({type(error).__name__}).") from error
        raise ValueError(
            f"{str(path)!r} holds pickled objects besides weights ({pickled[1]}), and unpickling runs code of the "
            "file's author. If you trust it, read it with `lit_cka.checkpoints.load_state_dict(path, "
            "weights_only=False)` and pass the result instead of the path."
        ) from error


def fitting_weights(expected: Mapping[str, HasShape], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of `weights` that are expected, by name and shape, under the names expected.

    The names in the file may start with a segment that the model doesn't have ("net.blocks.0.weight" for
    "blocks.0.weight"): of all readings, the one that fits the most is taken.
    """
    return max(_readings(expected, weights).values(), key=len)


def require_one_reading(expected: Mapping[str, HasShape], weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if the weights can be read in two ways that fit as well, and differ.

    So they can where a file holds a model and its average, or a student and its teacher.
    """
    readings = _readings(expected, weights)
    best = max(readings, key=lambda start: len(readings[start]))
    fitting = readings[best]
    if not best or not fitting:  # the very names
        return
    rivals = [start for start, other in readings.items() if start and other.keys() == fitting.keys()]
    if any(not _are_equal(value, readings[start][name]) for start in rivals for name, value in fitting.items()):
        raise ValueError(
            f"Expected one set of weights that fits the model, but those that begin with "
            f"{' and with '.join(map(repr, rivals))} do, and differ. Name one by `weights={rivals[0][:-1]!r}`; where "
            "there is no such argument, pass `lit_cka.checkpoints.load_state_dict(path, weights=...)`."
        )


def _readings(expected: Mapping[str, HasShape], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns what fits, by what the names in the file are taken to start with."""
    readings = {}
    for start in first_segments(weights):
        read = {name[len(start) :]: value for name, value in weights.items() if name.startswith(start)}
        fitting = [name for name in expected if name in read and read[name].shape == expected[name].shape]
        readings[start] = {name: read[name] for name in fitting}
    return readings


def with_tied(fitting: Mapping[str, Tensor], first: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the weights, and for names of the same tensor that are missing the value of those that are there.

    Files of safetensors hold a tied weight under one of its names.

    Args:
        fitting: by the model's names.
        first: for each name of the model the first one of the same tensor, see `first_names`.

    Raises:
        ValueError: if there are different values for what is one tensor in the model.
    """
    values: dict[str, tuple[str, Tensor]] = {}
    for name, value in fitting.items():
        known, held = values.setdefault(first[name], (name, value))
        if held.shape == value.shape and not _are_equal(held, value):
            raise ValueError(
                f"Expected one value for {known!r} and {name!r}, which are the same tensor in the model, but the "
                "weights have two."
            )
    return {name: values[start][1] for name, start in first.items() if start in values}


def _are_equal(one: Tensor, two: Tensor) -> bool:
    return tensor_identity(one) == tensor_identity(two) or torch.equal(one, two.to(one.dtype))


def first_segments(names: Iterable[str]) -> list[str]:
    """Returns what some names may start with that others leave out, such as "model." of a LightningModule around a
    network: "", and the first segment of each name with its dot.
    """
    return list(dict.fromkeys(["", *(f"{name.split('.')[0]}." for name in names if "." in name)]))


def require_weights(needed: Sequence[str], expected: Mapping[str, HasShape], weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that lists which of the `needed` names aren't in `weights`, unless all are."""
    needed = [name for name in needed if not name.endswith("num_batches_tracked")]
    lacking = [name for name in needed if name not in weights]
    if lacking:
        shown = ", ".join(f"{name} {tuple(expected[name].shape)}" for name in lacking[:5])
        raise ValueError(
            f"The weights are of another architecture: {len(lacking)} of the {len(needed)} tensors needed are missing "
            f"or have another shape. Expected {shown}{', ...' if len(lacking) > 5 else ''}."
        )


def load_into(module: nn.Module, weights: Mapping[str, Tensor], *, optional: tuple[str, ...] = ()) -> list[str]:
    """Copy weights into a module, by name, whatever wrapper they were saved in.

    Args:
        module: the module, whose tensors are written to, in their dtype.
        weights: from `load_state_dict`. What the module has no place for (a text tower, say) is left out.
        optional: beginnings of the names that may be missing or have another shape, such as a head's.

    Returns:
        The optional names that were not loaded.

    Raises:
        ValueError: if other weights are missing or have another shape; the module is unchanged then.
    """
    targets = strip_wrappers(module.state_dict(keep_vars=True))
    require_one_reading(targets, weights)
    first = first_names({name: tensor_identity(value) for name, value in targets.items()})
    fitting = with_tied(fitting_weights(targets, weights), first)
    require_weights([name for name in targets if not name.startswith(optional)], targets, fitting)
    with torch.no_grad():
        for name, value in fitting.items():
            targets[name].copy_(value)
    return [name for name in targets if name not in fitting]


def tensor_identity(value: Tensor) -> Hashable:
    """Returns what is the same for tensors that are one in memory (tied), and different for all others."""
    return value.data_ptr() or id(value), value.shape, value.stride(), value.dtype, value.device


def first_names(identities: Mapping[str, Hashable]) -> dict[str, str]:
    """Returns for each name the first of the names that have the same identity; see `tensor_identity`."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(identity, name) for name, identity in identities.items()}
