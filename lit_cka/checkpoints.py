"""Weights from files: safetensors, plain state dicts, Lightning and other training checkpoints; no unpickling."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = ("module.", "_orig_mod.")  # put before names by DataParallel / DDP and by torch.compile
_NESTED = ("state_dict", "model_state_dict", "model")  # where Lightning, open_clip, timm and others keep the weights


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
            return strip_wrappers(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "was not an allowed global" not in str(error):
            raise ValueError(f"{str(path)!r} is damaged or no checkpoint: {_first_line(error)}") from error
        raise ValueError(
            f"{str(path)!r} holds pickled objects besides weights, and unpickling runs code of the file's author. If "
            "you trust it, read it with `lit_cka.checkpoints.load_state_dict(path, weights_only=False)` and pass the "
            f"result instead of the path. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no checkpoint: {_first_line(error)}") from error
    return strip_wrappers(_weights_in(content, path))


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, Mapping):
        for key in _NESTED:
            if isinstance(content.get(key), (Mapping, nn.Module)):
                return _weights_in(content[key], path)
        weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if weights:
            return weights
    held = f"keys {list(content)[:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"Expected {str(path)!r} to hold a state dict of tensors, but it holds {held}.")


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names they have without DDP and `torch.compile` around the model."""
    names = list(weights)
    prefix = ""
    while stripped := next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None):
        prefix += stripped
    return {name[len(prefix) :].replace("_orig_mod.", ""): value for name, value in weights.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
