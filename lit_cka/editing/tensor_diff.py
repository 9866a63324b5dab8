"""What is said of one tensor in two checkpoints, and of all of them together: `TensorDiff` and `Diff`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

from torch import Tensor

from lit_cka.checkpoints.shards import TensorInfo

Kind: TypeAlias = Literal[
    "changed", "unchanged", "added", "missing", "other shape", "other type", "not finite", "not compared", "tied"
]
KINDS: dict[Kind, str] = {
    "changed": "other values than in A",
    "unchanged": "the values of A",
    "added": "not in A",
    "missing": "in A alone",
    "other shape": "of another shape than in A",
    "other type": "stored as another type than in A, between which nothing is computed, such as floats and integers",
    "not finite": "NaN or infinity in either, so that there are no numbers",
    "not compared": "stored in a form that is not read: sparse, or quantised by torch itself",
    "tied": "the same tensor as another name, which has the numbers",
}


class TensorDiff(TypedDict):
    """One tensor in a checkpoint and in the base, A. Numbers are None where `kind` or `note` says why.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> from lit_cka.editing import diff_files
        >>> with TemporaryDirectory() as folder:
        ...     for name, scale in (("base", 1.0), ("tuned", 1.5)):
        ...         save_file({"fc.weight": scale * torch.eye(4)}, f"{folder}/{name}.safetensors")
        ...     found = diff_files(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors", progress=False)
        >>> (tensor,) = found.tensors[0]
        >>> tensor["kind"], tensor["shape"]
        ('changed', [4, 4])
    """

    name: str
    kind: Kind
    base_shape: list[int] | None
    shape: list[int] | None
    base_dtype: str | None
    dtype: str | None
    tied_to: str | None
    base_norm: float | None  # ||W0||_F
    change_norm: float | None  # ||W1 - W0||_F
    relative_change: float | None  # ||W1 - W0||_F / ||W0||_F; infinite where W0 is 0, for which JSON has null
    effective_rank: float | None  # of the update, see `lit_cka.functional.effective_rank`
    stable_rank: float | None
    full_rank: int | None  # min(out, rest)
    base_num_not_finite: int | None  # elements that are NaN or infinite
    num_not_finite: int | None
    note: str | None


def tensor_diff(name: str, kind: Kind, before: TensorInfo | None, after: TensorInfo | None) -> TensorDiff:
    """Returns a record without numbers."""
    return TensorDiff(
        name=name, kind=kind, tied_to=None, base_norm=None, change_norm=None, relative_change=None,
        base_shape=None if before is None else list(before.shape), shape=None if after is None else list(after.shape),
        base_dtype=None if before is None else before.type_name, dtype=None if after is None else after.type_name,
        effective_rank=None, stable_rank=None, full_rank=None, base_num_not_finite=None, num_not_finite=None, note=None,
    )  # fmt: skip


@dataclass(frozen=True)
class Diff:
    """One or two checkpoints against their base.

    Attributes:
        base: path of the base, A.
        others: paths of the others, B and C.
        tensors: for each of the others what is said of each tensor, in the order of the base, then what is new.
        spectra: for each of the others the singular values of its updates, (m,) float64, by name.
        cosines: by name, between the updates of B and of C.
        renamings: for each of the others in which words its names became those of the base; None where they are.

    Example:
        >>> Diff("base.pt", ("tuned.pt",), ([],), ({},), {}, (None,)).labels
        ('B',)
    """

    base: str
    others: tuple[str, ...]
    tensors: tuple[list[TensorDiff], ...]
    spectra: tuple[dict[str, Tensor], ...]
    cosines: dict[str, float]
    renamings: tuple[str | None, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """ "B", and "C" where there are two others."""
        return ("B", "C")[: len(self.others)]

    def num_by_kind(self, index: int = 0) -> dict[Kind, int]:
        """Returns how many tensors there are of each kind, in the order of `KINDS`."""
        numbers = Counter(tensor["kind"] for tensor in self.tensors[index])
        return {kind: numbers[kind] for kind in KINDS if numbers[kind]}

    def is_identical(self, index: int = 0) -> bool:
        """Returns whether a checkpoint has the base's tensors, with the same names, types and values."""
        same_types = all(tensor["dtype"] in (None, tensor["base_dtype"]) for tensor in self.tensors[index])
        return (
            same_types and self.renamings[index] is None and not self.num_by_kind(index).keys() - {"unchanged", "tied"}
        )

    def relative_change(self, index: int = 0) -> float:
        """Returns `||Delta||_F / ||W0||_F` over all tensors that were measured; NaN where there are none."""
        measured = _measured(self.tensors[index])
        change = math.hypot(*(each["change_norm"] or 0.0 for each in measured))
        base = math.hypot(*(each["base_norm"] or 0.0 for each in measured))
        if not base:
            return math.inf if change else 0.0 if measured else math.nan
        return change / base

    def cosine(self) -> float:
        """Returns the cosine of the whole updates of B and C, over what was measured in both; NaN without C."""
        if len(self.tensors) < 2:
            return math.nan
        norms = [{each["name"]: each["change_norm"] or 0.0 for each in _measured(side)} for side in self.tensors]
        both = [name for name in norms[0] if name in norms[1]]
        product = math.fsum(self.cosines.get(name, 0.0) * norms[0][name] * norms[1][name] for name in both)
        lengths = [math.hypot(*(norm[name] for name in both)) for norm in norms]
        return min(max(product / lengths[0] / lengths[1], -1.0), 1.0) if all(lengths) else math.nan


def _measured(tensors: Sequence[TensorDiff]) -> list[TensorDiff]:
    return [tensor for tensor in tensors if tensor["change_norm"] is not None]
