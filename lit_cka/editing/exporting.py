"""How edited weights go back to the format that the fine-tuned model came in: `write_weights`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import first_segments, load_state_dict, read_content
from lit_cka.checkpoints.weight_sets import find_weights, mapping_at
from lit_cka.files import written_whole


def write_weights(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    module: nn.Module,
    which: str | None = None,
) -> None:
    """Write a variant's weights in the format, and under the names, of the source.

    A folder is written by `save_pretrained`, with the source's tokenizer; a Lightning or other checkpoint with
    everything else that it holds; weights of a module (a source of None) as a state dict. A file that is named so is
    safetensors, whatever the source. Of several sets of weights in the source, the one called `which` is written.

    Raises:
        ValueError: if `path` exists.
        FileExistsError: if it has come into being meanwhile.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"Expected a path to write to, but {str(path)!r} exists already.")
    with written_whole(path, new=True) as partial:
        if source is not None and Path(source).is_dir():
            _write_folder(weights, partial, Path(source), module)
        elif path.suffix == ".safetensors":
            _write_safetensors(weights, partial, source, which)
        else:
            torch.save(dict(weights) if source is None else _replaced(Path(source), weights, which), partial)


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


def _write_safetensors(
    weights: Mapping[str, Tensor], partial: Path, source: str | os.PathLike[str] | None, which: str | None
) -> None:
    metadata, named = {"format": "pt"}, dict(weights)
    if source is not None and Path(source).suffix == ".safetensors":
        named = _replaced(Path(source), weights, which)
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
    elif source is not None:
        held = load_state_dict(source, weights=which)
        named = _renamed(held, weights, dict(zip(held, held, strict=True)))
    # Copies, since safetensors holds no tied tensors; a source in that format has each once.
    save_file({name: value.clone().contiguous() for name, value in named.items()}, partial, metadata)


def _replaced(source: Path, weights: Mapping[str, Tensor], which: str | None) -> Any:
    """Returns what the source's file holds, with the weights in it replaced."""
    content = read_content(source, weights_only=True)
    found = find_weights(content, source, which, optional=True)
    replaced = _renamed(mapping_at(content, found.keys), weights, found.names)
    if not found.keys:
        return replaced
    mapping_at(content, found.keys[:-1])[found.keys[-1]] = replaced
    return content


def _renamed(held: Mapping[str, Any], weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns what `held` holds, with every tensor that has a counterpart in `weights` replaced by it.

    Names may start with a segment here that they don't have there: of all readings, the one with most counterparts.

    Args:
        held: from a file.
        weights: the new ones.
        names: those in `held` that may be replaced, by their plain names.
    """
    most: dict[str, Tensor] = {}
    for start_in_file in first_segments(names):
        for start in first_segments(weights):
            read = {name: start + name[len(start_in_file) :] for name in names if name.startswith(start_in_file)}
            counterparts = {
                names[name]: weights[counterpart]
                for name, counterpart in read.items()
                if counterpart in weights and weights[counterpart].shape == held[names[name]].shape
            }
            most = max(most, counterparts, key=len)
    return {**held, **{name: value.to(held[name].dtype) for name, value in most.items()}}
