"""Features of many samples as they came, in blocks of any precision, read in float64 a few at a time: `Rows`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_cka.functional.precision import float64_device

# At a time: what stays in a CPU's cache, or keeps a GPU busy. Not less, since every operation of several threads waits
# for the last of them, and on a machine that others use as well that one may have to wait for its turn.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**18, 2**22


class Rows:
    """Features (n, d) of `n` samples.

    Args:
        blocks: (n_i, d), any floating dtype and device. They are not copied.
        origins: for each block a point (d,) that it is measured from, or None: its features are `block + origin`.
        device: where to read them to, one that has float64; None for that of the first block.
        scale: to multiply all features by.

    Example:
        >>> import torch
        >>> rows = Rows([torch.zeros(4, 3), torch.ones(2, 3)])
        >>> len(rows)
        6
    """

    def __init__(
        self,
        blocks: Sequence[Tensor],
        origins: Sequence[Tensor | None] | None = None,
        *,
        device: torch.device | None = None,
        scale: float = 1.0,
    ) -> None:
        self.blocks = blocks
        self.origins = [None] * len(blocks) if origins is None else origins
        self.device = float64_device(blocks[0].device) if device is None else device
        self.scale = scale
        self._sizes = [block.shape[0] for block in blocks]
        self._num_rows = sum(self._sizes)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def width(self) -> int:
        return self.blocks[0].shape[1]

    def read(
        self, start: int, stop: int, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Returns the features from `first` to `last` of the samples from `start` to `stop`, in a new tensor.

        Computed in float64, and rounded to another `dtype` at the end.
        """
        columns = slice(first, self.width if last is None else min(last, self.width))
        stop = min(stop, self._num_rows)
        read = torch.empty(stop - start, columns.stop - columns.start, dtype=torch.float64, device=self.device)
        before = 0  # samples of earlier blocks
        measured: list[tuple[int, int, Tensor]] = []  # from where to where something is to be added
        for block, origin, size in zip(self.blocks, self.origins, self._sizes, strict=True):
            begin, end = max(start, before), min(stop, before + size)
            before += size
            if begin >= end:
                continue
            read[begin - start : end - start].copy_(block[begin - before + size : end - before + size, columns])
            if origin is None:
                continue
            is_next = bool(measured) and measured[-1][1] == begin and measured[-1][2] is origin
            measured.append((measured.pop()[0] if is_next else begin, end, origin))
        for begin, end, origin in measured:
            read[begin - start : end - start] += origin[columns]
        return (read if self.scale == 1 else read.mul_(self.scale)).to(dtype)

    def measured_from(self, point: Tensor, scale: float = 1.0) -> Rows:
        """Returns the same samples, measured from `point` (d,), then multiplied by `scale`."""
        assert self.scale == 1
        different = {id(origin): origin for origin in self.origins}
        moved = {
            key: -point if origin is None else origin.to(point.device) - point for key, origin in different.items()
        }
        return Rows(self.blocks, [moved[id(origin)] for origin in self.origins], device=self.device, scale=scale)

    def chunks(self) -> Iterator[Tensor]:
        """Yields all samples in turn, some at a time."""
        elements = _CPU_ELEMENTS if self.device.type == "cpu" else _GPU_ELEMENTS
        size = max(elements // max(self.width, 1), 1)
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def mean_and_size(self) -> tuple[Tensor, float]:
        """Returns the mean (d,) of the samples and how far one is from the first at most, by the feature that is
        farthest off; of constant features, how large they are. Zeros of no samples.

        Measured from the first sample, so that constants centre to exact 0.
        """
        if not len(self):
            return torch.zeros(self.width, dtype=torch.float64, device=self.device), 0.0
        first = self.read(0, 1)[0]
        total, largest = torch.zeros_like(first), torch.zeros_like(first[0])
        for part in self.measured_from(first).chunks():
            total += part.sum(dim=0)
            largest = torch.maximum(largest, torch.stack(part.aminmax()).abs().amax())
        return first + total / len(self), float(largest) or float(first.abs().amax())

    def squares(self) -> tuple[Tensor, Tensor]:
        """Returns the squared norms of the samples (n,) and of the features (d,)."""
        norms, of_features = [], torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for part in self.chunks():
            part.square_()
            norms.append(part.sum(dim=1))
            of_features += part.sum(dim=0)
        return torch.cat(norms) if norms else of_features.new_zeros(0), of_features
