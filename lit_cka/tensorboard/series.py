"""The scalars of a run that are CKA: which tags belong together, and their values as one table: `find_series`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_DATALOADER = re.compile(r"(.*)/dataloader_idx_(\d+)", re.DOTALL)
_MEAN, _NUM_SAMPLES = "mean", "num_samples"
_TOLERANCE = 1e-3  # of the mean that was logged, from that of the layers


class Series(NamedTuple):
    """The tags of one callback and dataloader in a run."""

    prefix: str
    dataloader: int | None  # where the callback has tracked several
    layers: dict[str, str]  # tag by layer, in order
    low: dict[str, str]  # tags of the lower ends of intervals, as far as they are logged
    high: dict[str, str]
    num_samples: str | None  # tag

    @property
    def name(self) -> str:
        """What the series is called on the page and in addresses."""
        return self.prefix if self.dataloader is None else f"{self.prefix}, dataloader {self.dataloader}"

    @property
    def tags(self) -> list[str]:
        """All tags that the series is made of."""
        counts = [] if self.num_samples is None else [self.num_samples]
        return [*self.layers.values(), *self.low.values(), *self.high.values(), *counts]


def find_series(
    tags: Collection[str], order: Sequence[str] = (), last: Mapping[str, float] | None = None
) -> list[Series]:
    """Returns the series that a run's scalars hold.

    A callback logs `<prefix>/<layer>` for every layer, `<prefix>/mean` and `<prefix>/num_samples`; with several
    dataloaders each ends in `/dataloader_idx_<i>`. Scalars with a mean but no number of samples count if that is the
    mean of the others.

    Args:
        tags: of a run's scalars.
        order: tags in the order of depth, as far as it is known; other layers are put in the order of their numbers.
        last: the last value of scalars, to see whether a mean is one.
    """
    parted = {tag: _parted(tag) for tag in tags}
    known = set(parted.values())
    found = []
    for prefix, dataloader in sorted(
        {
            (base.removesuffix(f"/{_MEAN}"), dataloader)
            for base, dataloader in known
            if base.endswith(f"/{_MEAN}") and base != f"/{_MEAN}"
        },
        key=lambda key: (key[0], -1 if key[1] is None else key[1]),
    ):
        named = {
            base[len(prefix) + 1 :]: tag
            for tag, (base, number) in parted.items()
            if base.startswith(f"{prefix}/") and number == dataloader
        }
        mean = named.pop(_MEAN)
        num_samples = named.pop(_NUM_SAMPLES, None)
        if not named or (num_samples is None and not _is_mean(mean, named.values(), last)):
            continue
        places = {tag: index for index, tag in enumerate(order)}
        layers = sorted(named, key=lambda layer: (places.get(named[layer], len(places)), natural_key(layer)))
        low, high = (
            {layer: tag for layer in layers if (tag := _tag(f"{prefix}_{end}", layer, dataloader)) in parted}
            for end in ("low", "high")
        )
        found.append(Series(prefix, dataloader, {layer: named[layer] for layer in layers}, low, high, num_samples))
    ends_of = {f"{series.prefix}_{end}" for series in found for end in ("low", "high")}
    return [series for series in found if series.prefix not in ends_of]


def _tag(prefix: str, layer: str, dataloader: int | None) -> str:
    return f"{prefix}/{layer}" if dataloader is None else f"{prefix}/{layer}/dataloader_idx_{dataloader}"


def _parted(tag: str) -> tuple[str, int | None]:
    match = _DATALOADER.fullmatch(tag)
    return (tag, None) if match is None else (match[1], int(match[2]))


def _is_mean(mean: str, others: Iterable[str], last: Mapping[str, float] | None) -> bool:
    values = [(last or {}).get(tag, math.nan) for tag in others]
    finite = [value for value in values if math.isfinite(value)]
    if not finite or not all(-1 <= value <= 1 + _TOLERANCE for value in finite):
        return False
    return abs((last or {}).get(mean, math.nan) - math.fsum(finite) / len(finite)) <= _TOLERANCE


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names by, with the numbers in them by their size: "blocks.2" before "blocks.10"."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def table(series: Series, values: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Returns a series as JSON: lists of layers and steps, and by layer a list of values, None where there is none.

    Args:
        series: the tags.
        values: by tag, by step.
    """
    steps = sorted({step for tag in series.layers.values() for step in values.get(tag, {})})

    def rows(tags: Mapping[str, str]) -> list[list[float | None]]:
        return [_row(values.get(tags.get(layer, ""), {}), steps) for layer in series.layers]

    return {
        "name": series.name,
        "layers": list(series.layers),
        "steps": steps,
        "values": rows(series.layers),
        "low": rows(series.low) if series.low else None,
        "high": rows(series.high) if series.high else None,
        "num_samples": _row(values.get(series.num_samples or "", {}), steps),
    }


def _row(by_step: Mapping[int, float], steps: Sequence[int]) -> list[float | None]:
    found = (by_step.get(step, math.nan) for step in steps)
    return [round(value, 7) if math.isfinite(value) else None for value in found]
