"""Weights in safetensors files, whole or in shards, read and written one tensor at a time.

A safetensors file is the length of its header (8 bytes), the header (JSON: where each tensor's bytes are), and the
bytes. An edit changes the bytes alone, so that the output has the very header of the input, and its tensors can be
written in any order and by several processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_cka.files import sync

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LETTERS = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex"}
_EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
_CHUNK = 2**24  # bytes copied at a time
# Other weights that a model's folder may hold besides its safetensors; an output with them would hold two models.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"}


class TensorInfo(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    kind: str  # dtype, as the file format calls it
    dtype: torch.dtype | None  # None unless it is one of those that are edited
    nbytes: int

    @property
    def type_name(self) -> str:
        """The dtype as torch calls it, such as "bfloat16", whatever the file format does."""
        short = re.fullmatch(r"(BF|[FIUC])(\d+)", self.kind)
        return f"{_LETTERS[short[1]]}{short[2]}" if short else _EIGHT_BITS.get(self.kind, self.kind.lower())


class SafetensorsWeights:
    """A safetensors file, or a folder of them as `save_pretrained` writes it, and how to write one like it.

    Attributes:
        tensors: what the headers say, by name.
        tied: for each name the first one of the same tensor: here always itself.
        chosen: the names of the set of weights that is meant, by those that a model without the others has for them.
        was_named: whether that set is the one asked for by name.
        files: what is read.

    Raises:
        ValueError: if a file is damaged, truncated or of another format, or shards don't fit their index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index, shards = _index_and_shards(path)
        self._index = index
        self.files = [*([index] if index else []), *shards]
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._headers: dict[Path, bytes] = {}
        for shard in shards:
            self._headers[shard], entries = _read_header(shard)
            for name, (info, start) in entries.items():
                if name in self.tensors:
                    raise ValueError(f"Expected {name!r} in one shard of {str(path)!r}, but several hold it.")
                self.tensors[name], self._places[name] = info, (shard, start)
        if index:
            lacking = [name for name in shards_in_index(index) if name not in self.tensors]
            if lacking:
                raise ValueError(
                    f"The shards of {str(index)!r} lack {len(lacking)} of its tensors, such as {lacking[0]!r}."
                )
        self.tied = {name: name for name in sorted(self.tensors, key=_counting)}
        self.chosen, self.was_named = dict(self.tied), False

    def read(self, name: str) -> Tensor:
        """Returns a copy; what a memory map reads would stay in memory."""
        info = self.tensors[name]
        assert info.dtype is not None
        return self.read_bytes(name).view(info.dtype).reshape(info.shape)

    def read_bytes(self, name: str) -> Tensor:
        """Returns a copy of the bytes of a tensor of any dtype."""
        (shard, start), info = self._places[name], self.tensors[name]
        content = torch.empty(info.nbytes, dtype=torch.uint8)
        with shard.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = bytes_of(content), 0
            while done < info.nbytes:
                count = file.readinto(view[done:])  # 2 GB at most
                if not count:
                    raise ValueError(f"{str(shard)!r} was truncated while it was read.")
                done += count
        return content

    def create(self, target: Path) -> None:
        """Write the headers and make room for the tensors."""
        for shard, header in self._headers.items():
            twin = self._twin(shard, target)
            twin.parent.mkdir(exist_ok=True)
            with twin.open("wb") as file:
                file.write(header)
                file.truncate(shard.stat().st_size)
                os.fsync(file.fileno())

    def is_created(self, target: Path) -> bool:
        twins = {shard: self._twin(shard, target) for shard in self._headers}
        return all(twin.is_file() and twin.stat().st_size == shard.stat().st_size for shard, twin in twins.items())

    def needed_bytes(self, target: Path) -> int:
        """Returns the disk space that the output takes, less what it already has.

        Raises:
            ValueError: if something in the folder can't be copied.
        """
        twins = [self._twin(shard, target) for shard in self._headers]
        taken = sum(twin.stat().st_blocks * 512 for twin in twins if twin.is_file())
        files = [*self._headers, *(file for file, _ in self._others(target))]
        return max(sum(file.stat().st_size for file in files) - taken, 0)

    def write(self, target: Path, name: str, value: Tensor | None) -> None:
        """Put a tensor in its place, for good; None for the one that is here."""
        (shard, start), nbytes = self._places[name], self.tensors[name].nbytes
        with self._twin(shard, target).open("r+b", buffering=0) as file, shard.open("rb") as source:
            file.seek(start)
            source.seek(start)
            for chunk in _chunks_of(source, nbytes) if value is None else [bytes_of(value)]:
                write_all(file, chunk)
            os.fsync(file.fileno())

    def finish(self, target: Path, edited: set[str]) -> None:
        """Add what else a model's folder holds: index, configuration, tokenizer."""
        for file, twin in self._others(target):
            twin.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, twin)
            sync(twin)

    def _twin(self, shard: Path, target: Path) -> Path:
        return target / shard.name if self.path.is_dir() else target

    def _others(self, target: Path) -> Iterator[tuple[Path, Path]]:
        if not self.path.is_dir():
            return
        for root, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
            for file in (Path(root) / name for name in sorted(names) if not name.startswith(".")):
                what = file.name.removesuffix(".index.json")  # an index tells of weights, and goes with them
                if file == self._index or Path(what).suffix not in _WEIGHTS:
                    if not file.is_file() or not os.access(file, os.R_OK):
                        raise ValueError(f"Expected a file that can be read at {str(file)!r}, but it is none.")
                    yield file, target / file.relative_to(self.path)


def _index_and_shards(path: Path) -> tuple[Path | None, list[Path]]:
    if path.is_file():
        return None, [path]
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return None, [whole]
    if not index.is_file():
        found = sorted(file for file in path.glob("*.safetensors") if file.is_file())
        if len(found) == 1:
            return None, found
        raise ValueError(f"Expected {str(path)!r} to hold model.safetensors or {index.name}, but it holds neither.")
    names = sorted(set(shards_in_index(index).values()))
    lacking = [name for name in names if not (path / name).is_file()]
    if lacking:
        raise ValueError(f"{str(index)!r} names shards that are not beside it: {', '.join(map(repr, lacking[:5]))}.")
    return index, [path / name for name in names]


def shards_in_index(index: Path) -> dict[str, str]:
    """Returns the names of shards by tensor, as an index has them; none leads out of its folder.

    Raises:
        ValueError: if the file is no index of shards, or names something else than files beside it.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names: dict[str, str] = dict(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} is damaged or no index of shards ({type(error).__name__}).") from error
    strange = [name for name in names.values() if not isinstance(name, str) or not _is_plain(name)]
    if strange:
        raise ValueError(
            f"{str(index)!r} names shards that are not beside it: {', '.join(map(ascii, strange[:5]))}. Expected "
            "names of files alone."
        )
    return names


def _is_plain(name: str) -> bool:
    """Returns whether it can't be but the name of a file in the very folder: no path, no address."""
    if not name.isprintable() or len(name.encode()) > 255:
        return False
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:")


def _counting(name: str) -> list[str | int]:
    """Sorts "layers.10" after "layers.2"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _read_header(path: Path) -> tuple[bytes, dict[str, tuple[TensorInfo, int]]]:
    """Returns the bytes before the tensors, and for each tensor what it is and where it starts."""
    try:
        with safe_open(path, framework="pt"):  # checks it, the length of the file included
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated, damaged or no safetensors file: {error}.") from error
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return length + header, {
        name: (
            TensorInfo(tuple(entry["shape"]), entry["dtype"], DTYPES.get(entry["dtype"]), stop - start),
            8 + len(header) + start,
        )
        for name, entry in entries.items()
        for start, stop in [entry["data_offsets"]]
    }


def bytes_of(value: Tensor) -> memoryview:
    content: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _chunks_of(file: Any, nbytes: int) -> Iterator[memoryview]:
    for start in range(0, nbytes, _CHUNK):
        yield memoryview(file.read(min(_CHUNK, nbytes - start)))


def write_all(file: Any, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]  # 2 GB at most
