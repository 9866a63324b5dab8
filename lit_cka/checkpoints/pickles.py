"""Weights in files that `torch.save` wrote, read one tensor at a time, and written anew with other values."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lit_cka.checkpoints.quantised import type_name
from lit_cka.checkpoints.shards import DTYPES, SafetensorsWeights, TensorInfo, bytes_of, write_all
from lit_cka.checkpoints.state_dicts import WEIGHT_KEYS, first_names, load_state_dict, strip_wrappers, tensor_identity
from lit_cka.files import sync


class StateDictWeights:
    """A file that `torch.save` wrote: a state dict, or a checkpoint that keeps one; see `load_state_dict`.

    Attributes:
        tensors: by name, without the prefixes of wrappers such as DDP.
        tied: for each name the first one of the same tensor.
        files: what is read.
    """

    def __init__(self, path: Path, *, trusted: bool) -> None:
        self.path, self.files, self._trusted = path, [path], trusted
        self._lock, self._touched = Lock(), 0
        self._load()
        if not any(isinstance(value, Tensor) for value in self._weights.values()):
            load_state_dict(path, weights_only=not trusted)  # says what is there instead
        found = {name: value for name, value in self._weights.items() if isinstance(value, Tensor)}
        stripped = strip_wrappers(found)
        self._names = dict(zip(stripped if len(stripped) == len(found) else found, found, strict=True))
        self.tensors = {name: _info(found[name_in_file]) for name, name_in_file in self._names.items()}
        self.tied = first_names({name: self._identity(name) for name in self.tensors})
        self._numbers = {name: number for number, name in enumerate(self.tensors)}
        self._limit = max(info.nbytes for info in self.tensors.values())

    def _load(self) -> None:
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=not self._trusted)
        except Exception:  # whatever bytes do to an unpickler; or an old format, which can't be mapped
            try:
                load_state_dict(self.path, weights_only=not self._trusted)
            except ValueError as error:
                reason, advice, _ = str(error).partition(" If you trust it,")
                raise ValueError(f"{reason}{advice and f'{advice} pass `trusted=True` (`--trusted true`).'}") from error
            content = torch.load(self.path, map_location="cpu", weights_only=not self._trusted)
        self._content, self._weights = _with_weights(content)

    def read(self, name: str) -> Tensor:
        with self._lock:
            # What was read of a memory map stays in memory for as long as the map.
            if self._touched > self._limit:
                self._touched = 0
                self._load()
            self._touched += self.tensors[name].nbytes
            value: Tensor = self._weights[self._names[name]]
            return value.detach().clone(memory_format=torch.contiguous_format)

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


def open_weights(path: Path, *, trusted: bool) -> Weights:
    """Raises a ValueError that names the file, or a FileNotFoundError, if there are no weights to be read."""
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint file or folder at {str(path)!r}, but there is none.")
    if path.is_dir() or path.suffix == ".safetensors":
        return SafetensorsWeights(path)
    return StateDictWeights(path, trusted=trusted)


def _with_weights(content: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what the file holds, with modules as state dicts, and the mapping in it that holds the weights."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        return content, {}
    for key in WEIGHT_KEYS:
        if isinstance(content.get(key), (Mapping, nn.Module)):
            content[key], weights = _with_weights(content[key])
            return content, weights
    return content, content


def _info(value: Tensor) -> TensorInfo:
    plain = value.layout == torch.strided and not value.is_quantized
    kind = type_name(value) if value.layout == torch.strided else str(value.layout).removeprefix("torch.")
    dtype = value.dtype if plain and value.dtype in DTYPES.values() else None
    return TensorInfo(tuple(value.shape), kind, dtype, value.numel() * value.element_size())
