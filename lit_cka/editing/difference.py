"""Two checkpoints, or three, tensor by tensor, without the model's code: `diff_files`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.checkpoints.pickles import Weights, open_weights
from lit_cka.editing.pairs import Pairs
from lit_cka.editing.prefixes import find_renaming
from lit_cka.editing.tensor_diff import Diff, TensorDiff, tensor_diff
from lit_cka.functional.update_gram import gram_of_update
from lit_cka.functional.update_size import num_not_finite, update_products
from lit_cka.functional.update_spectrum import effective_rank, rows_are_fewer, singular_values_from_gram, stable_rank
from lit_cka.parallel.devices import usable_device
from lit_cka.progress import progress_bar

_EQUALITY = "compared for equality alone"


def diff_files(
    base: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    device: torch.device | str | None = None,
    spectra: bool = True,
    trusted: bool = False,
    weights: str | None = None,
    progress: bool = True,
) -> Diff:
    """Compare one or two checkpoints with a base, tensor by tensor.

    Takes the memory of the largest tensor once for each checkpoint and, for a spectrum, `16 m^2` bytes with `m` the
    smaller side of the matrix, part of which is what the weights leave. Tensors of two or more dimensions are read as
    matrices (out, rest). Those of integers, of 8 bits, or that belong to quantised weights are compared for equality.

    Args:
        base: A: a safetensors file, a folder with one or with shards of one and their index (`save_pretrained`), or a
            state dict of torch. The names of the tensors count, not which file they are in; a prefix that all names of
            another checkpoint have more, or less, is none of them.
        others: B, or B and C, likewise.
        device: where to compute, such as "cuda"; None for the CPU.
        spectra: compute singular values and ranks of the updates, which takes the most time.
        trusted: unpickle whatever objects the files hold, which runs code that their authors chose.
        weights: which of several sets of weights in a file, such as "state_dict_ema" or "teacher", see
            `lit_cka.checkpoints.weight_sets.find_weights`. None where there is one set.
        progress: show a progress bar.

    Returns:
        What is said of each tensor, see `Diff`.

    Raises:
        ValueError: if a file is damaged, needs `trusted`, or holds several sets of weights, or an argument is wrong.
        FileNotFoundError: if a checkpoint is missing.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     for name, scale in (("base", 1.0), ("tuned", 1.5)):
        ...         save_file({"fc.weight": scale * torch.eye(4)}, f"{folder}/{name}.safetensors")
        ...     found = diff_files(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors", progress=False)
        >>> (tensor,) = found.tensors[0]
        >>> tensor["name"], tensor["relative_change"], round(tensor["effective_rank"], 3)
        ('fc.weight', 0.5, 4.0)
    """
    if len(others) not in (1, 2):
        raise ValueError(f"Expected two checkpoints to compare, or a base and two others, but got {1 + len(others)}.")
    chosen = usable_device("cpu" if device is None else device, torch.float64)
    W0, *after = (open_weights(Path(path), trusted=trusted, weights=weights) for path in (base, *others))
    if weights is not None and not any(each.was_named for each in (W0, *after)):
        raise ValueError(f"Expected a file with a set of weights called {weights!r}, but none has one.")
    renamings = tuple(_renamed(W0, W1) for W1 in after)
    sides = [_Side(W0, W1) for W1 in after]
    walk = _Walk(W0, sides, chosen, spectra)
    names = list(dict.fromkeys(name for each in (W0, *after) for name in _names(each)))
    with progress_bar("Comparing", len(names), enabled=progress) as advance:
        for name in names:
            walk.compare(name)
            advance(1)
    found = tuple(side.tensors for side in sides), tuple(side.spectra for side in sides)
    return Diff(str(base), tuple(map(str, others)), *found, walk.cosines, renamings)


def _renamed(W0: Weights, W1: Weights) -> str | None:
    """Give weights the base's names where a prefix tells them apart; returns how they are called now."""
    renaming = find_renaming(W0.chosen, W1.chosen)
    if renaming is None:
        return None
    W1.chosen = {renaming(plain): name for plain, name in W1.chosen.items()}
    return str(renaming)


def _names(weights: Weights) -> list[str]:
    """Returns the names of the weights that are meant, in the order in which they count."""
    plain_of = {name: plain for plain, name in weights.chosen.items()}
    return [plain_of[name] for name in weights.tied if name in plain_of]


class _Both(NamedTuple):
    """A tensor that is in the base and in another checkpoint, by its names there."""

    base_name: str
    name: str
    record: TensorDiff
    side: _Side


class _Side:
    """One checkpoint beside the base, and what was found out so far."""

    def __init__(self, W0: Weights, W1: Weights) -> None:
        self.W0, self.W1 = W0, W1
        self.tensors: list[TensorDiff] = []
        self.spectra: dict[str, Tensor] = {}
        self._pairs = Pairs(W0, W1)
        self._quantised = self._pairs.quantised()
        self._missing = set(self._pairs.without_counterpart())
        self._first: dict[str, str] = {}  # the first of the names of a tensor
        for plain, name in W1.chosen.items():
            self._first.setdefault(W1.tied[name], plain)

    def look_up(self, plain: str) -> _Both | None:
        """Note what can be said of a tensor by its headers; returns it if it has floats to measure in both."""
        name = self.W1.chosen.get(plain)
        if name is None:
            self._note_absent(plain)
            return None
        base_name = self._pairs.before(name)
        before, after = None if base_name is None else self.W0.tensors[base_name], self.W1.tensors[name]
        record = tensor_diff(plain, "changed", before, after)
        self.tensors.append(record)
        first = self._first[self.W1.tied[name]]
        if first != plain and self._is_one_in_base(base_name, first):
            record.update({"kind": "tied", "tied_to": first})
        elif before is None or base_name is None:
            record["kind"] = "added"
        elif before.shape != after.shape:
            record["kind"] = "other shape"
        elif unread := [info.kind for info in (before, after) if info.kind.startswith(("sparse", "q"))]:
            record.update({"kind": "not compared", "note": f"stored as {unread[0]}"})
        elif before.dtype is None or after.dtype is None or name in self._quantised:
            self._compare_bytes(record, base_name, name)
        else:
            return _Both(base_name, name, record, self)
        return None

    def _note_absent(self, plain: str) -> None:
        base_name = self.W0.chosen.get(plain)
        if base_name is None:  # in the other of two checkpoints alone
            return
        record = tensor_diff(plain, "missing", self.W0.tensors[base_name], None)
        if plain not in self._missing:
            same = [other for other, name in self.W0.chosen.items() if self.W0.tied[name] == self.W0.tied[base_name]]
            tied_to = next(other for other in same if other in self.W1.chosen)
            record.update({"kind": "tied", "tied_to": tied_to, "note": f"stored as {tied_to} alone"})
        self.tensors.append(record)

    def _is_one_in_base(self, base_name: str | None, first: str) -> bool:
        """Returns whether what is tied here is one tensor in the base as well, or absent from it."""
        of_first = self._pairs.before(self.W1.chosen[first])
        if base_name is None or of_first is None:
            return base_name is None and of_first is None
        return self.W0.tied[base_name] == self.W0.tied[of_first]

    def _compare_bytes(self, record: TensorDiff, base_name: str, name: str) -> None:
        before, after = self.W0.tensors[base_name], self.W1.tensors[name]
        if before.type_name != after.type_name:
            record["kind"] = "other type"
            return
        is_same = torch.equal(self.W0.read_bytes(base_name), self.W1.read_bytes(name))
        why = "part of quantised weights" if name in self._quantised else after.type_name
        record.update({"kind": "unchanged" if is_same else "changed", "note": f"{why}: {_EQUALITY}"})


class _Walk:
    """Through the tensors, one at a time."""

    def __init__(self, W0: Weights, sides: Sequence[_Side], device: torch.device, spectra: bool) -> None:
        self.cosines: dict[str, float] = {}
        self._W0, self._sides, self._device, self._with_spectra = W0, sides, device, spectra

    def compare(self, plain: str) -> None:
        """Note what there is to say of a tensor in each checkpoint."""
        found = [both for side in self._sides if (both := side.look_up(plain)) is not None]
        if len({both.base_name for both in found}) > 1:  # tied in one checkpoint and not in the other
            for both in found:
                self._measure([both])
        elif found:
            self._measure(found)

    def _measure(self, found: Sequence[_Both]) -> None:
        weights = [self._read(self._W0, found[0].base_name), *(self._read(both.side.W1, both.name) for both in found)]
        sizes = update_products(weights[0], weights[1:])
        is_finite = math.isfinite(sizes.base + sizes.products.sum().item())
        not_finite = [0 if is_finite else num_not_finite(W) for W in weights]
        for index, both in enumerate(found):
            record, change = both.record, sizes.products[index, index].item()
            record.update({"base_num_not_finite": not_finite[0], "num_not_finite": not_finite[1 + index]})
            if not_finite[0] or not_finite[1 + index]:
                record["kind"] = "unchanged" if _are_same_bits(weights[0], weights[1 + index]) else "not finite"
            elif not math.isfinite(change + sizes.base) or (
                not change and not _are_equal(weights[0], weights[1 + index])
            ):
                record["note"] = "its squares are beyond float64"
            else:
                record["kind"] = "changed" if change else "unchanged"
                record["base_norm"], record["change_norm"] = math.sqrt(sizes.base), math.sqrt(change)
                record["relative_change"] = sizes.relative_change(index)
        if len(found) == 2 and (cosine := sizes.cosine()) == cosine:
            self.cosines[found[0].record["name"]] = cosine
        if self._with_spectra:
            _note_spectra(weights, found)

    def _read(self, weights: Weights, name: str) -> Tensor:
        return weights.read(name).to(self._device)


def _note_spectra(weights: list[Tensor], found: Sequence[_Both]) -> None:
    """Note the spectra of the updates. `weights`, the base first, is emptied: eigenvalues need the memory."""
    for position, both in enumerate(found, start=1):
        W1, record = weights.pop(1), both.record
        if not record["change_norm"] or W1.ndim < 2:
            continue
        gram, _ = gram_of_update(weights[0], W1, rows_are_fewer(W1))
        del W1
        if position == len(found):
            weights.clear()
        s = singular_values_from_gram(gram).cpu()
        both.side.spectra[record["name"]] = s
        record.update({"effective_rank": effective_rank(s), "stable_rank": stable_rank(s), "full_rank": len(s)})


def _are_equal(W0: Tensor, W1: Tensor) -> bool:
    return bool((W0 == W1).all())


def _are_same_bits(W0: Tensor, W1: Tensor) -> bool:
    return W0.dtype == W1.dtype and torch.equal(W0.reshape(-1).view(torch.uint8), W1.reshape(-1).view(torch.uint8))
