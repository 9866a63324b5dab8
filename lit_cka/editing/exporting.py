"""How edited weights go back to the format that the fine-tuned model came in: `write_weights`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import WEIGHT_KEYS, first_segments, load_state_dict, strip_wrappers
from lit_cka.files import written_whole


def write_weights(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    module: nn.Module,
) -> None:
    """Write a variant's weights in the format, and under the names, of the source.

    A folder is written by `save_pretrained`, with the source's tokenizer; a Lightning or other checkpoint with
    everything else that it holds; weights of a module (a source of None) as a state dict. A file that is named so is
    safetensors, whatever the source.

    Raises:
        ValueError: if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"Expected a path to write to, but {str(path)!r} exists already.")
    with written_whole(path) as partial:
        if source is not None and Path(source).is_dir():
            _write_folder(weights, partial, Path(source), module)
        elif path.suffix == ".safetensors":
            _write_safetensors(weights, partial, source)
        else:
            torch.save(dict(weights) if source is None else _replaced(source, weights), partial)


def _write_folder(weights: Mapping[str, Tensor], partial: Path, source: Path, module: nn.Module) -> None:
    from transformers import PreTrainedModel

    prefix, network = next(
        (name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)
    )
    prefix += "." if prefix else ""
    below = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    network.save_pretrained(partial, state_dict=below)
    for file in source.iterdir():
        if (
            file.is_file()
            and not (partial / file.name).exists()
            and file.suffix in (".json", ".txt", ".model", ".jinja")
            and not file.name.endswith(".index.json")
        ):
            shutil.copy2(file, partial / file.name)


def _write_safetensors(weights: Mapping[str, Tensor], partial: Path, source: str | os.PathLike[str] | None) -> None:
    metadata, named = {"format": "pt"}, dict(weights)
    if source is not None and Path(source).suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            named = _renamed({name: file.get_tensor(name) for name in file.keys()}, weights)  # noqa: SIM118
    elif source is not None:
        named = _renamed(load_state_dict(source), weights)
    # Copies, since safetensors holds no tied tensors; a source in that format has each once.
    save_file({name: value.clone().contiguous() for name, value in named.items()}, partial, metadata)


def _replaced(source: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> Any:
    """Returns what the source's file holds, with the weights in it replaced."""
    if Path(source).suffix == ".safetensors":
        return _renamed(load_file(source), weights)
    content = torch.load(source, map_location="cpu", weights_only=True)
    held, key, around = content, None, None  # type: Any, Any, Any
    while isinstance(held, Mapping) and (
        found := next((k for k in WEIGHT_KEYS if isinstance(held.get(k), Mapping)), None)
    ):
        around, key, held = held, found, held[found]
    replaced = _renamed(held, weights)
    if around is None:
        return replaced
    around[key] = replaced
    return content


def _renamed(held: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what `held` holds, with every tensor that has a counterpart in `weights` replaced by it.

    Names may start with a segment here that they don't have there: of all readings, the one with most counterparts.
    """
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    plain = strip_wrappers(tensors)
    name_in_file = dict(zip(plain, tensors, strict=True))
    most: dict[str, Tensor] = {}
    for start_in_file in first_segments(plain):
        for start in first_segments(weights):
            names = {name: start + name[len(start_in_file) :] for name in plain if name.startswith(start_in_file)}
            counterparts = {
                name: weights[counterpart]
                for name, counterpart in names.items()
                if counterpart in weights and weights[counterpart].shape == plain[name].shape
            }
            most = max(most, counterparts, key=len)
    return {**held, **{name_in_file[name]: value.to(plain[name].dtype) for name, value in most.items()}}
