"""The reference's weights in a file, once per training, so that a resumed one is compared with the same reference."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from torch import Tensor, nn
from typing_extensions import TypedDict

from lit_cka.reference.isolation import tensors_of
from lit_cka.reference.snapshot import snapshot


class StoredReference(TypedDict):
    """What a checkpoint has of the reference: where its weights are, and what they have to be."""

    path: str
    sha256: str  # of all tensors, their names, types and shapes


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """A fingerprint of tensors that does not depend on how they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def store_reference(module: nn.Module, folder: str | os.PathLike[str], *, write: bool) -> StoredReference:
    """Write the module's parameters and buffers to `folder`, all or nothing, unless they are there.

    Args:
        module: the reference.
        folder: local, or on any file system of fsspec ("s3://...").
        write: False for all ranks but the first, which only say what the first one writes.
    """
    tensors = tensors_of(module)
    sha256 = sha256_of(tensors)
    filesystem, root = url_to_fs(os.fspath(folder))
    path = f"{root}/cka_reference_{sha256[:16]}.pt"
    if write and not _is_sound(filesystem, path, sha256):
        _write(filesystem, path, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    return StoredReference(
        path=filesystem.unstrip_protocol(path) if "://" in os.fspath(folder) else path, sha256=sha256
    )


def load_reference(
    live: pl.LightningModule, stored: StoredReference, folders: Sequence[str | os.PathLike[str]]
) -> nn.Module:
    """A copy of `live` with the stored weights.

    Args:
        live: the model in training, with whatever weights.
        stored: from the checkpoint.
        folders: where else to look for the file, for a training that was moved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not what was stored, or is of another architecture.
    """
    name = stored["path"].rpartition("/")[2]
    candidates = [stored["path"], *(f"{os.fspath(folder)}/{name}" for folder in folders)]
    for path in candidates:
        filesystem, local = url_to_fs(path)
        if filesystem.exists(local):
            break
    else:
        raise FileNotFoundError(
            "The training that wrote this checkpoint was compared with its initial weights, stored in "
            f"{stored['path']!r}, but there is no such file, nor one next to the checkpoint. {_ADVICE}"
        )
    tensors = _read(filesystem, local)
    if tensors is None or sha256_of(tensors) != stored["sha256"]:
        raise ValueError(
            f"The file {path!r} does not hold the initial weights that the checkpoint's training was compared with: it "
            f"was changed or damaged. {_ADVICE}"
        )
    module = snapshot(live)
    targets = tensors_of(module)
    wrong = [name for name in {**targets, **tensors} if not _fits(targets.get(name), tensors.get(name))]
    if wrong:
        raise ValueError(
            f"The initial weights in {path!r} are of another architecture than {type(live).__name__}: they differ in "
            f"{wrong[:3]}{' ...' if len(wrong) > 3 else ''}. {_ADVICE}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return module


_ADVICE = (
    "Put the original file there, or pass the original weights as `reference=`, a module or the path of a checkpoint, "
    "or start the training anew, without a checkpoint."
)


def _fits(target: Tensor | None, tensor: Tensor | None) -> bool:
    return target is not None and tensor is not None and target.shape == tensor.shape and target.dtype == tensor.dtype


def _write(filesystem: Any, path: str, tensors: dict[str, Tensor]) -> None:
    """All or nothing."""
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with filesystem.open(partial, "wb") as file:
            torch.save(tensors, file)
        filesystem.mv(partial, path)
    except BaseException:
        if filesystem.exists(partial):
            filesystem.rm(partial)
        raise


def _read(filesystem: Any, path: str) -> dict[str, Tensor] | None:
    """The tensors in the file; None if it can't be read as such."""
    try:
        with filesystem.open(path, "rb") as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        return None
    sound = isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())
    return tensors if sound else None


def _is_sound(filesystem: Any, path: str, sha256: str) -> bool:
    if not filesystem.exists(path):
        return False
    tensors = _read(filesystem, path)
    return tensors is not None and sha256_of(tensors) == sha256
