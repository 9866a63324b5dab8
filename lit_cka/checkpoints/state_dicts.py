"""Weights from files: safetensors, plain state dicts, Lightning and other training checkpoints; no unpickling."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# How torch names what it did not unpickle, in a text of many lines.
_PICKLED = re.compile(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+)")
_WRAPPERS = ("module.", "_orig_mod.")  # put before names by DataParallel / DDP and by torch.compile
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")  # where Lightning, open_clip, timm and others keep weights

Value = TypeVar("Value")


class HasShape(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...


def load_state_dict(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file, on the CPU, by parameter name.

    Reads safetensors, plain state dicts, and checkpoints that keep one under "state_dict" (Lightning, open_clip, timm)
    or "model". The prefix that DDP (`module.`) or `torch.compile` (`_orig_mod.`) put before all names is removed.

    Args:
        path: the file.
        weights_only: False unpickles arbitrary objects and thus runs code that the file's author chose; do that only
            with files you trust. Safetensors never hold code.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no weights, or holds pickled objects and `weights_only` is true.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint file at {str(path)!r}, but there is none.")
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error
        return strip_wrappers(_weights_in(content, path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # whatever bytes do to an unpickler
        pickled = _PICKLED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if pickled is None:
            raise ValueError(f"{str(path)!r} is damaged or no checkpoint ({type(error).__name__}).") from error
        raise ValueError(
            f"{str(path)!r} holds pickled objects besides weights ({pickled[1]}), and unpickling runs code of the "
            "file's author. If you trust it, read it with `lit_cka.checkpoints.load_state_dict(path, "
            "weights_only=False)` and pass the result instead of the path."
        ) from error
    return strip_wrappers(_weights_in(content, path))


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, Mapping):
        for key in WEIGHT_KEYS:
            if isinstance(content.get(key), (Mapping, nn.Module)):
                return _weights_in(content[key], path)
        weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        weights = {name: value for name, value in weights.items() if isinstance(name, str)}
        if weights:
            return weights
    held = f"keys {list(content)[:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"Expected {str(path)!r} to hold a state dict of tensors, but it holds {held}.")


def strip_wrappers(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the weights under the names that they have without DDP and `torch.compile` around the model."""
    names = list(weights)
    prefix = ""
    while names and (
        stripped := next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
    ):
        prefix += stripped
    return {name[len(prefix) :].replace("_orig_mod.", ""): value for name, value in weights.items()}


def fitting_weights(expected: Mapping[str, HasShape], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of `weights` that are expected, by name and shape, under the names expected.

    The names in the file may start with a segment that the model doesn't have ("net.blocks.0.weight" for
    "blocks.0.weight"): of all readings, the one that fits the most is taken.
    """
    readings = []
    for start in first_segments(weights):
        read = {name[len(start) :]: value for name, value in weights.items() if name.startswith(start)}
        fitting = [name for name in expected if name in read and read[name].shape == expected[name].shape]
        readings.append({name: read[name] for name in fitting})
    return max(readings, key=len)


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
    fitting = fitting_weights(targets, weights)
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
