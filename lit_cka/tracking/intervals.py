"""Confidence intervals of a tracked evaluation's scores, and of what has changed since the one before: `Intervals`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from lit_cka.functional.intervals import change_interval, cka_interval
from lit_cka.functional.jackknife import Jackknife
from lit_cka.tracking.tracker import LayerScore


class Bounds(TypedDict):
    """By layer, 95 % intervals for the population's CKA, and for its difference to the evaluation before; those layers
    are not among them for which there is none.
    """

    low: dict[str, float]
    high: dict[str, float]
    change_low: dict[str, float]
    change_high: dict[str, float]


class _Before(NamedTuple):
    """What an evaluation of one layer leaves for the next one to be compared with."""

    n: int
    cka: float  # debiased
    hashes: Tensor  # (m,) which samples were drawn
    without: Tensor  # (m,) as in `Jackknife`

    def is_whole(self) -> bool:
        """Whether it is what it should be, though it comes from a file."""
        is_drawn = isinstance(self.hashes, Tensor) and self.hashes.dtype == torch.int64 and self.hashes.ndim == 1
        is_known = isinstance(self.without, Tensor) and self.without.dtype == torch.float64
        are_numbers = isinstance(self.n, int) and isinstance(self.cka, float)
        return is_drawn and is_known and are_numbers and self.hashes.shape == self.without.shape


class Intervals:
    """Takes the evaluations of a training in turn.

    Args:
        with_changes: tell what has changed since the evaluation before: not where that had another reference.
    """

    def __init__(self, *, with_changes: bool = True) -> None:
        self._with_changes = with_changes
        self._before: dict[str, dict[str, _Before]] = {}  # by stage and dataloader, by layer

    def of(self, where: str, layers: Mapping[str, LayerScore]) -> Bounds:
        """Returns the bounds of an evaluation's scores, and keeps what the next one needs.

        Args:
            where: its stage and dataloader.
            layers: its scores, of the exact estimator.
        """
        before = self._before.get(where, {}) if self._with_changes else {}
        bounds = Bounds(low={}, high={}, change_low={}, change_high={})
        sampled = {name: layer.sampled for name, layer in layers.items() if layer.sampled is not None}
        now = {
            name: _Before(layers[name].n, layers[name].debiased, each.hashes, each.samples.without)
            for name, each in sampled.items()
        }
        for some in _alike(now):
            n, cka = _numbers(some)
            samples = Jackknife(*map(torch.stack, zip(*(sampled[name].samples for name in some), strict=True)))
            _put(bounds, ("low", "high"), some, cka_interval(cka, n, samples))
        again = {name: each for name, each in now.items() if name in before and _are_the_same(each, before[name])}
        for some in _alike(again):
            then = {name: before[name] for name in some}
            (n, cka), (_, cka_then) = _numbers(some), _numbers(then)
            without = [torch.stack([each.without for each in layers.values()]) for layers in (some, then)]
            _put(
                bounds, ("change_low", "change_high"), some, change_interval(cka, cka_then, n, (without[0], without[1]))
            )
        self._before[where] = now if self._with_changes else {}
        return bounds

    def state(self) -> dict[str, Any]:
        """Returns what `load` takes: numbers and tensors alone."""
        return {
            where: {name: each._asdict() for name, each in layers.items()} for where, layers in self._before.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if that is no such state.
        """
        try:
            before = {
                where: {name: _Before(**each) for name, each in layers.items()} for where, layers in state.items()
            }
        except (AttributeError, TypeError):
            before = {"": {"": _Before(0, 0.0, torch.empty(0), torch.empty(0, 0))}}
        if not all(each.is_whole() for layers in before.values() for each in layers.values()):
            raise ValueError(f"Expected the checkpoint to hold intervals of CKACallback, but it holds {state!r:.80}.")
        self._before = before

    def forget(self) -> None:
        """Begin anew: another training."""
        self._before = {}


def _are_the_same(now: _Before, before: _Before) -> bool:
    return now.n == before.n and torch.equal(now.hashes, before.hashes)


def _alike(layers: dict[str, _Before]) -> list[dict[str, _Before]]:
    """Returns the layers in groups with as many drawn samples, to be computed at once: mostly all of them."""
    groups: dict[int, dict[str, _Before]] = {}
    for name, each in layers.items():
        groups.setdefault(len(each.hashes), {})[name] = each
    return list(groups.values())


def _numbers(layers: dict[str, _Before]) -> tuple[Tensor, Tensor]:
    n, cka = zip(*((each.n, each.cka) for each in layers.values()), strict=True)
    return torch.tensor(n), torch.tensor(cka, dtype=torch.float64)


def _put(bounds: Bounds, keys: tuple[str, str], layers: dict[str, _Before], ends: tuple[Tensor, Tensor]) -> None:
    for key, values in zip(keys, ends, strict=True):
        defined = {name: value for name, value in zip(layers, values.tolist(), strict=True) if not math.isnan(value)}
        bounds[key].update(defined)  # type: ignore[literal-required]
