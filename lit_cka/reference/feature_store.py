"""Rows of features, added block by block and found again by their position: in memory, or in a mapped file."""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

_SEGMENT_BYTES = 2**23  # goes into a file at once: few mappings for many batches


class FeatureStore:
    """The features (n, d) of one layer, kept as offsets from a pivot, the mean of the first rows.

    Offsets of float32 are 2^-24 of the spread from the features, not of their mean, however far that is from 0.

    Args:
        dtype: of the offsets; the pivot is float64.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.is_finite = True
        self._pivot: Tensor | None = None
        self._blocks: list[Tensor] = []
        self._starts: list[int] = []
        self._num_rows = 0
        self._gaps: list[tuple[int, int]] = []
        self._num_waiting = 0  # blocks, the last ones, that are to go into a file

    def __len__(self) -> int:
        return self._num_rows

    @property
    def width(self) -> int:
        """The number of features of a row; 0 before the first."""
        return 0 if self._pivot is None else len(self._pivot)

    @property
    def nbytes(self) -> int:
        """What the offsets take, wherever they are."""
        return sum(block.nbytes for block in self._blocks)

    def add(self, features: Tensor, file: MappedFile | None = None) -> None:
        """Append rows (n, d); into the file, if there is one, else into memory.

        Raises:
            ValueError: if they are of another width than those before.
        """
        if self._pivot is None:
            pivot = features.mean(dim=0, dtype=torch.float64).cpu() if len(features) else torch.zeros(0)
            if not len(features):
                return
            self._pivot = pivot.nan_to_num(0.0, 0.0, 0.0)
        if features.shape[1] != self.width:
            raise ValueError(f"its features were {self.width} wide before, and now are {features.shape[1]}.")
        self.is_finite = self.is_finite and bool(features.isfinite().all())
        offsets = (features.to(torch.float64) - self._pivot.to(features.device)).to(self.dtype).cpu()
        self._starts.append(self._num_rows)
        self._blocks.append(offsets)
        self._num_rows += len(offsets)
        if file is not None:
            self._num_waiting += 1
            if sum(block.nbytes for block in self._blocks[-self._num_waiting :]) >= _SEGMENT_BYTES:
                self.move_to(file)

    def move_to(self, file: MappedFile) -> None:
        """Put into the file what is still in memory."""
        if self._num_waiting:
            kept = len(self._blocks) - self._num_waiting
            segment = file.place(torch.cat(self._blocks[kept:]))
            self._blocks[kept:], self._starts[kept + 1 :] = [segment], []
            self._num_waiting = 0

    def skip_to(self, num_rows: int) -> None:
        """Leave a gap, if there are fewer rows: the next one added is row `num_rows`."""
        if self._num_rows < num_rows:
            self._gaps.append((self._num_rows, num_rows))
            self._num_rows, self._num_waiting = num_rows, 0  # what waits stays where it is, before the gap

    def has_all(self, run: range) -> bool:
        """Whether all rows of a run of positions are there."""
        return run.stop <= self._num_rows and not self._gaps

    def mask_gaps(self, positions: Tensor, value: int) -> Tensor:
        """Return the positions, with this value for those in a gap or beyond the end."""
        positions = positions.masked_fill(positions >= self._num_rows, value)
        for start, end in self._gaps:
            positions = positions.masked_fill((positions >= start) & (positions < end), value)
        return positions

    def rows(self, positions: Tensor | range, device: torch.device) -> Tensor:
        """Return the rows (n, d), float64, at these positions; (n, 0) of a store without any."""
        if self._pivot is None:
            return torch.zeros(len(positions), 0, dtype=torch.float64, device=device)
        return self.offsets(positions).to(device, torch.float64) + self._pivot.to(device)

    def offsets(self, positions: Tensor | range) -> Tensor:
        """Return the rows (n, d) at these positions as they are held, measured from the pivot: not to be changed."""
        return self._run(positions) if isinstance(positions, range) else self._offsets(positions)

    def _run(self, run: range) -> Tensor:
        """Return the offsets at a run of positions that are all there."""
        parts: list[Tensor] = []
        start, number = run.start, bisect_right(self._starts, run.start) - 1
        while start < run.stop:
            block, first = self._blocks[number], self._starts[number]
            parts.append(block[start - first : run.stop - first])
            start, number = first + block.shape[0], number + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _offsets(self, positions: Tensor) -> Tensor:
        if not len(positions):
            return torch.empty(0, self.width, dtype=self.dtype)
        blocks = torch.searchsorted(torch.tensor(self._starts), positions, right=True) - 1
        first = int(blocks[0])
        if bool((blocks == first).all()):
            return self._blocks[first][positions - self._starts[first]]
        found = torch.empty(len(positions), self.width, dtype=self.dtype)
        for block in blocks.unique().tolist():
            here = blocks == block
            found[here] = self._blocks[block][positions[here] - self._starts[block]]
        return found

    def round_to(self, dtype: torch.dtype) -> None:
        """Keep the offsets in another type from now on."""
        self.dtype = dtype
        self._blocks = [block.to(dtype) for block in self._blocks]

    @property
    def blocks(self) -> list[Tensor]:
        """The offsets, as they are held."""
        return self._blocks

    @property
    def pivot(self) -> Tensor:
        """What the offsets are measured from, (d,) of float64; empty before the first row."""
        return torch.zeros(0, dtype=torch.float64) if self._pivot is None else self._pivot

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Which rows are missing: from the first of each pair up to the second."""
        return self._gaps

    def extend(self, blocks: Sequence[Tensor], pivot: Tensor, gaps: Sequence[Sequence[int]]) -> None:
        """Append what another store held."""
        start, position = self._num_rows, 0
        waiting = sorted((int(first), int(end)) for first, end in gaps)
        for block in blocks:
            while waiting and waiting[0][0] == position:
                position = waiting.pop(0)[1]
                self.skip_to(start + position)
            if self._pivot is None:
                self._pivot, self.dtype = pivot, block.dtype
            if torch.equal(self._pivot, pivot) and block.dtype == self.dtype:
                self._starts.append(self._num_rows)
                self._blocks.append(block)
                self._num_rows += len(block)
            else:
                self.add(block.to(torch.float64) + pivot)
            position += len(block)
        for _, end in waiting:
            self.skip_to(start + end)


class MappedFile:
    """A file that holds tensors outside of memory: the system reads them as they are needed, and forgets them again.

    It has no name, so that nothing of it is left, however the process ends.

    Args:
        folder: on whose disk it is.

    Raises:
        OSError: if nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by the line below
        finalize(self, self._file.close)
        self._nbytes = 0

    def place(self, value: Tensor) -> Tensor:
        """Return the same values, in the file."""
        if not value.numel():
            return value
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(content.data)
        self._file.flush()
        start, self._nbytes = self._nbytes, self._nbytes + content.nbytes
        # Copied on writing, since torch has no tensors that are read only; nobody writes.
        mapped = np.memmap(self._file, np.uint8, "c", offset=start, shape=content.shape)
        return torch.from_numpy(mapped).view(value.dtype).view(value.shape)
