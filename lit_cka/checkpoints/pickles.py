"""Weights in files that `torch.save` wrote, read one tensor at a time, and written anew with other values."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lit_cka.checkpoints.quantised import type_name
from lit_cka.checkpoints.shards import DTYPES, SafetensorsWeights, TensorInfo, bytes_of, write_all
from lit_cka.checkpoints.state_dicts import first_names, read_content, require_file, tensor_identity
from lit_cka.checkpoints.weight_sets import MOST_KEYS, FoundWeights, find_weights, mapping_at, plain_names
from lit_cka.files import sync


class StateDictWeights:
    """A file that `torch.save` wrote: a state dict, or a checkpoint that keeps one; see `load_state_dict`.

    Attributes:
        tensors: by name, without the prefixes of wrappers such as DDP.
        tied: for each name the first one of the same tensor.
        chosen: the names of the set of weights that is meant, by those that a model without the others has for them.
        was_named: whether that set is the one asked for by name.
        files: what is read.
    """

    def __init__(self, path: Path, *, trusted: bool, weights: str | None = None) -> None:
        self.path, self.files, self._trusted = path, [path], trusted
        self._lock, self._touched = Lock(), 0
        self._content = _with_state_dicts(self._read())
        self._found = find_weights(self._content, path, weights, by_names=True, optional=True)
        self._weights: dict[str, Any] = mapping_at(self._content, self._found.keys)
        self._names = plain_names(self._weights)
        self.chosen, self.was_named = _names_of(self._found, self._names), self._found.was_named
        self.tensors = {name: _info(self._weights[name_in_file]) for name, name_in_file in self._names.items()}
        self.tied = first_names({name: self._identity(name) for name in self.tensors})
        self._numbers = {name: number for number, name in enumerate(self.tensors)}
        self._limit = max(info.nbytes for info in self.tensors.values())

    def _read(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", mmap=True, weights_only=not self._trusted)
        except Exception:  # whatever bytes do to an unpickler; or an old format, which can't be mapped
            try:
                return read_content(self.path, weights_only=not self._trusted)
            except ValueError as error:
                reason, advice, _ = str(error).partition(" If you trust it,")
                raise ValueError(f"{reason}{advice and f'{advice} pass `trusted=True` (`--trusted true`).'}") from error

    def _load(self) -> None:
        """Map the file anew."""
        self._content = _with_state_dicts(self._read())
        self._weights = mapping_at(self._content, self._found.keys)

    def read(self, name: str) -> Tensor:
        with self._lock:
            # What was read of a memory map stays in memory for as long as the map.
            if self._touched > self._limit:
                self._touched = 0
                self._load()
            self._touched += self.tensors[name].nbytes
            value: Tensor = self._weights[self._names[name]]
            return value.detach().clone(memory_format=torch.contiguous_format)

    def read_bytes(self, name: str) -> Tensor:
        """Returns a copy of the bytes of a tensor of any dtype that is stored as a plain array."""
        return self.read(name).reshape(-1).view(torch.uint8)

    def create(self, target: Path) -> None:
        target.with_name("tensors").mkdir()

    def is_created(self, target: Path) -> bool:
        return target.with_name("tensors").is_dir()

    def needed_bytes(self, target: Path) -> int:
        """Returns the disk space that the output still takes: twice its size, since edited tensors wait in files until
        all are there.
        """
        waiting = target.with_name("tensors")
        taken = sum(file.stat().st_size for file in waiting.iterdir()) if waiting.is_dir() else 0
        return max(2 * self.path.stat().st_size - taken, 0)

    def write(self, target: Path, name: str, value: Tensor | None) -> None:
        if value is not None:
            with self._waiting(target, name).open("wb", buffering=0) as file:
                write_all(file, bytes_of(value))
                os.fsync(file.fileno())

    def finish(self, target: Path, edited: set[str]) -> None:
        """Write the whole, with everything else that the file holds. Tied weights stay tied."""
        self._load()
        values: dict[str, Tensor] = {}
        for name in edited:
            info, old = self.tensors[name], self._weights[self._names[name]]
            assert info.dtype is not None
            flat = torch.from_file(str(self._waiting(target, name)), size=old.numel(), dtype=info.dtype)
            value = flat.reshape(info.shape)
            values[name] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for name, first in self.tied.items():
            if first in values:
                self._weights[self._names[name]] = values[first]
        torch.save(self._content, target)
        sync(target)

    def _identity(self, name: str) -> Hashable:
        value = self._weights[self._names[name]]
        return id(value) if self.tensors[name].dtype is None else tensor_identity(value)

    def _waiting(self, target: Path, name: str) -> Path:
        return target.with_name("tensors") / str(self._numbers[name])


Weights = SafetensorsWeights | StateDictWeights


def open_weights(path: Path, *, trusted: bool, weights: str | None = None) -> Weights:
    """Returns the weights at a path, of several sets the one of the name `weights`, see `find_weights`.

    Raises a ValueError that names the file, or a FileNotFoundError, if there are no weights to be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint file or folder at {str(path)!r}, but there is none.")
    if not path.is_dir():
        require_file(path)
    if path.is_dir() or path.suffix == ".safetensors":
        found = SafetensorsWeights(path)
        chosen = find_weights(found.tensors, path, weights, by_names=True, optional=True)
        found.chosen, found.was_named = chosen.names, chosen.was_named
        return found
    return StateDictWeights(path, trusted=trusted, weights=weights)


def _with_state_dicts(content: Any, depth: int = 0) -> Any:
    """Returns what the file holds, with state dicts in place of modules where weights are looked for."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, dict) and depth < MOST_KEYS:
        content.update({key: _with_state_dicts(value, depth + 1) for key, value in content.items()})
    return content


def _names_of(found: FoundWeights, names: dict[str, str]) -> dict[str, str]:
    name_of = {in_file: name for name, in_file in names.items()}
    return {plain: name_of[in_file] for plain, in_file in found.names.items()}


def _info(value: Tensor) -> TensorInfo:
    plain = value.layout == torch.strided and not value.is_quantized
    kind = type_name(value) if value.layout == torch.strided else str(value.layout).removeprefix("torch.")
    dtype = value.dtype if plain and value.dtype in DTYPES.values() else None
    return TensorInfo(tuple(value.shape), kind, dtype, value.numel() * value.element_size())
