"""Tensors in files that tell whether they are sound, found by name beside a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor


class TensorFile(NamedTuple):
    """What is in a file: tensors by name, and what is said about them."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def write_tensors(
    folder: str | os.PathLike[str], name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write a file, whole or not at all, unless there is a sound one of this name with the same notes.

    Args:
        folder: local, or on any file system of fsspec ("s3://...").
        name: of the file.
        tensors: by name; they may share memory.
        notes: JSON.

    Raises:
        OSError: if it can't be written.
    """
    filesystem, root = url_to_fs(os.fspath(folder))
    path = f"{root}/{name}"
    there = read_tensors(filesystem, path) if filesystem.isfile(path) else None
    if there is not None and there.notes == json.loads(json.dumps({**notes})):
        return
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"notes": json.dumps({**notes}), "sha256": _digest(held, notes)}
    filesystem.makedirs(root, exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        if isinstance(filesystem, LocalFileSystem):  # one tensor after the other
            save_file(_unshared(held), partial, metadata)
        else:
            with filesystem.open(partial, "wb") as file:
                file.write(save(_unshared(held), metadata))
        filesystem.mv(partial, path)
    except BaseException:
        if filesystem.exists(partial):
            filesystem.rm(partial)
        raise


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    unshared = {}
    for name, value in tensors.items():
        where = value.untyped_storage().data_ptr()
        unshared[name] = value.clone() if where in seen else value
        seen.add(where)
    return unshared


def read_tensors(filesystem: Any, path: str) -> TensorFile | None:
    """Return what `write_tensors` has written; None if there is no such file, or it was damaged or changed."""
    try:
        if isinstance(filesystem, LocalFileSystem):
            with safe_open(path, "pt") as file:  # nothing in it is code
                about, names = file.metadata() or {}, file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        else:
            with filesystem.open(path, "rb") as file:
                content = file.read()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about, tensors = header.get("__metadata__") or {}, load(content)
        notes = json.loads(about.get("notes", "null"))
        sound = isinstance(notes, dict) and about.get("sha256") == _digest(tensors, notes)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError, TypeError):
        return None
    return TensorFile(tensors, notes) if sound else None


def find_tensors(
    name: str, notes: Mapping[str, Any], checkpoint: str | os.PathLike[str], folders: Iterable[str]
) -> TensorFile | None:
    """Return the first sound file of this name beside a checkpoint, above it, or in one of the folders.

    Only the name comes from the checkpoint: whatever address it holds is never opened.

    Args:
        name: of the file.
        notes: what has to be said in it, among other things.
        checkpoint: local, or on any file system of fsspec.
        folders: where else to look.
    """
    if not name or "/" in name or "\\" in name or name.startswith("."):
        return None
    filesystem, path = url_to_fs(os.fspath(checkpoint))
    near = path.rpartition("/")[0]
    places = [(filesystem, near), (filesystem, near.rpartition("/")[0]), *map(url_to_fs, folders)]
    for each, root in places:
        found = read_tensors(each, f"{root}/{name}") if each.isfile(f"{root}/{name}") else None
        if found is not None and all(found.notes.get(key) == value for key, value in notes.items()):
            return found
    return None


def _digest(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> str:
    """Return a fingerprint that does not depend on how tensors are stored."""
    digest = hashlib.sha256(json.dumps({**notes}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
