"""The features of one side of a pass, as they came, in as little memory as leaves CKA its digits: `KeptRows`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_cka.functional.precision import float64_device
from lit_cka.functional.rows import Rows

# Rows stay in float64 as long as they are few. Rounding to float32 costs CKA 6e-8 of a single value over the root of
# their number: it costs least where it saves most.
MIN_BYTES = 2**21
_FLOAT32_ROOM = 2.0**100  # so that neither the largest nor what is a millionth of them leaves float32


class KeptRows:
    """Features (n, d), block by block.

    They are kept as they came, but float64 ones, once there are more than a few, in float32 if that has all their
    digits, or else as offsets in float32 from the first sample. Since that is one of the n samples, it is at most the
    root of n times their spread away from their mean, and the offsets leave CKA eight digits.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._origins: list[Tensor | None] = []
        self._num_new = 0  # blocks, the last ones, that are as they came
        self._new_bytes = self._bytes = 0
        self._origin: Tensor | None = None  # that offsets of this object's own making are measured from
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def add(self, features: Tensor, origin: Tensor | None = None) -> None:
        """Append features (m, d), with m > 0.

        Args:
            features: they are not copied at once, and must not be changed in place afterwards.
            origin: (d,), if the features are `features + origin`. They are somebody else's then, and kept as they are.
        """
        self._num_rows += features.shape[0]
        device = float64_device(features.device)
        if origin is not None:
            self._blocks.append(features.to(device))
            self._origins.append(origin.to(device))
            self._num_new = self._new_bytes = 0  # what came before stays as it is
            return
        self._blocks.append(_without_more(features.detach()).to(device))
        self._origins.append(None)
        self._num_new += 1
        self._new_bytes += features.nbytes
        if self._new_bytes >= max(MIN_BYTES, self._bytes // 8):
            self._join()

    def _join(self) -> None:
        """Join what is as it came to one block, in float32 where that has room for it."""
        kept = len(self._blocks) - self._num_new
        block, origin = _in_float32(torch.cat(self._blocks[kept:]), self._origin)
        self._origin = origin if self._origin is None else self._origin
        self._blocks[kept:], self._origins[kept:] = [block], [origin]
        self._bytes += block.nbytes
        self._num_new = self._new_bytes = 0

    def read(self, device: torch.device | None = None) -> Rows:
        """Returns all rows, to be read to `device`. There must be some."""
        return Rows(list(self._blocks), list(self._origins), device=device)


def _in_float32(features: Tensor, origin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the same features in float32 and what they are measured from; in float64 if they have no room there."""
    if features.dtype != torch.float64:
        return features, None
    if _has_float32_digits(features[:1]) and _has_float32_digits(features):  # the first sample tells most of the time
        return features.to(torch.float32), None
    origin = features[0].clone() if origin is None else origin
    offsets = features - origin
    size = float(torch.stack(offsets.aminmax()).abs().amax())
    if math.isfinite(size) and not 1 / _FLOAT32_ROOM < size < _FLOAT32_ROOM:
        return features, None
    return offsets.to(torch.float32), origin


def _has_float32_digits(features: Tensor) -> bool:
    return torch.equal(features.to(torch.float32).to(torch.float64), features)


def _without_more(features: Tensor) -> Tensor:
    """Returns the features, not as a part of something larger that would be kept with them."""
    return features.clone() if features.untyped_storage().nbytes() > 2 * features.nbytes else features
