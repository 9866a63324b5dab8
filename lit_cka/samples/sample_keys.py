"""Keys of samples: 128 bits as two int64, by the index in the dataset or by what the sample holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from lit_cka.samples.batch_rows import BatchRows, RowOrder
from lit_cka.samples.hashing import content_hash

Indices = npt.NDArray[np.int64] | list[object]
# The last two bits of a key's second word, so that keys of different kinds are never the same.
_HASH, _INDEX, _DERIVED = 0, 1, 2
_KIND = 3
Kind = Literal["index", "hash", "unknown"]


@dataclass
class BatchSamples:
    """The samples of a batch.

    Attributes:
        kind: what they are known by: "index" in their dataset, "hash" of all that the batch holds of them, or
            "unknown" where neither can be told.
        keys: (n, 2) int64 on the CPU, one row for each sample; (0, 2) if unknown.
        counted: (n,) bool, whether this rank counts the sample in this pass; None until `EvaluationSamples.resolve`
            where the ranks have to tell each other.
        rows: what the shapes in the batch say of the rows that a layer may have for it.
        content: (n, 2) int64, keys by what the batch holds of the samples, where they are needed; else None.
    """

    kind: Kind
    keys: Tensor
    counted: Tensor | None
    rows: BatchRows
    content: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def batch_key(self) -> str:
        """A key of the whole batch: of these samples in this order."""
        return _digest(self.keys)

    def content_key(self) -> str:
        """A key of all that the batch holds, where that is known."""
        assert self.content is not None
        return _digest(self.content)

    def row_keys(self, num_rows: int) -> Tensor | None:
        """Keys (num_rows, 2) of the rows of a layer; None if unknown. See the function `row_keys`."""
        if self.kind == "unknown" or (num_rows and not len(self.keys)):
            return None
        return row_keys(self.keys, num_rows, self.rows.order(len(self.keys), num_rows))

    def row_counted(self, num_rows: int) -> Tensor | None:
        """Whether this rank counts each row (num_rows,); None before that is known.

        Where it can't be told which sample a row is of, the batch's rows count together, if any of its samples does.
        """
        if self.counted is None or num_rows == len(self.counted):
            return self.counted
        order = self.rows.order(len(self.keys), num_rows)
        if order is None:
            return self.counted.any().expand(num_rows)
        m = num_rows // len(self.keys)
        return self.counted.repeat_interleave(m) if order == "by sample" else self.counted.repeat(m)


def _digest(keys: Tensor) -> str:
    return sha256(keys.contiguous().numpy().data).hexdigest()[:32]


def keys_of_hashes(hashes: Sequence[bytes]) -> Tensor:
    """Keys (n, 2) of samples known by hashes of 16 bytes."""
    return _keys(hashes, _HASH)


def keys_of_indices(indices: Indices, dataset: int) -> Tensor | None:
    """Keys (n, 2) of samples known by their indices in a dataset.

    Args:
        indices: integers, or whatever else the dataset takes.
        dataset: a fingerprint of the dataset, of 64 bits.

    Returns:
        None if the content of some index, of those that are no integers, can't be told.
    """
    if isinstance(indices, np.ndarray):
        fingerprints = np.full_like(indices, (dataset & ~_KIND) | _INDEX)
        return torch.from_numpy(np.stack([indices, fingerprints], axis=1))
    hashes = [content_hash((index, dataset)) for index in indices]
    return None if None in hashes else _keys([each for each in hashes if each is not None], _INDEX)


def joined_keys(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Keys (n, 2) of rows that are made of a sample from each of several dataloaders.

    Args:
        parts: the number of a dataloader, and the keys (n, 2) of its samples.
    """
    columns = [torch.cat([keys.new_full((len(keys), 1), number), keys], dim=1) for number, keys in parts]
    return _derived(torch.cat(columns, dim=1))


def row_keys(keys: Tensor, num_rows: int, order: RowOrder | None) -> Tensor:
    """Keys (num_rows, 2) of a layer's rows for a batch whose samples have the keys (n, 2).

    With m rows for each of n samples, a row is known by its sample and its number among the m, if it is known how
    they lie. Otherwise, it is known by all samples of the batch in their order, and its place: it is found again when
    the same batch comes again. One sample's rows can only be its own.

    Raises:
        ValueError: if there are rows but no samples.
    """
    if num_rows and not len(keys):
        raise ValueError(f"Expected a batch without samples to give no rows, but got {num_rows}.")
    if num_rows == len(keys) or num_rows == 0:
        return keys[:num_rows]
    rows = torch.arange(num_rows, device=keys.device)
    if len(keys) == 1 or (order is not None and len(keys)):
        m = num_rows // len(keys)
        samples, part = (rows // m, rows % m) if order != "by part" else (rows % len(keys), rows // len(keys))
        return _derived(torch.cat([keys[samples], torch.stack([part, torch.full_like(part, m)], dim=1)], dim=1))
    words = np.frombuffer(xxh3_128_digest(keys.contiguous().numpy().data), np.int64).copy()
    batch = torch.from_numpy(words).expand(num_rows, 2)
    return _derived(torch.cat([batch, torch.stack([rows, torch.full_like(rows, num_rows)], dim=1)], dim=1))


def _derived(words: Tensor) -> Tensor:
    """Keys (n, 2) from rows (n, c) of other words."""
    rows: Any = words.contiguous().numpy()
    return _keys([xxh3_128_digest(row) for row in rows], _DERIVED)


def _keys(hashes: Sequence[bytes], kind: int) -> Tensor:
    words = np.frombuffer(b"".join(hashes), np.int64).reshape(-1, 2).copy()
    words[:, 1] = (words[:, 1] & ~_KIND) | kind
    return torch.from_numpy(words)
