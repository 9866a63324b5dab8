"""What all names of one checkpoint have in front of those of another, such as a LightningModule's "model."."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

_DEPTH = 3  # dotted segments of a prefix, at most


class Renaming(NamedTuple):
    """How to come to the names of another checkpoint: by leaving a prefix out, or by putting one in front."""

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        return self.added + name.removeprefix(self.removed)

    def __str__(self) -> str:
        return f"without {self.removed!r}" if self.removed else f"with {self.added!r} in front"


def find_renaming(base: Collection[str], names: Collection[str]) -> Renaming | None:
    """Returns how most of the names become those of the base; None if some are already, or there is no such prefix.

    Example:
        >>> print(find_renaming(["conv.weight", "conv.bias"], ["model.conv.weight", "model.conv.bias", "loss.weight"]))
        without 'model.'
    """
    if not base or not names or not set(base).isdisjoint(names):
        return None
    renamings = [Renaming(removed=prefix) for prefix in _prefixes(names)]
    renamings += [Renaming(added=prefix) for prefix in _prefixes(base)]
    for renaming in renamings:
        renamed = {renaming(name) for name in names}
        fitting = len(renamed & set(base))
        if len(renamed) == len(names) and 2 * fitting >= min(len(names), len(base)):
            return renaming
    return None


def _prefixes(names: Collection[str]) -> list[str]:
    """Returns what half of the names or more begin with, up to a dot."""
    numbers = Counter(
        ".".join(parts[:depth]) + "."
        for parts in (name.split(".") for name in names)
        for depth in range(1, min(len(parts), _DEPTH + 1))
    )
    return [prefix for prefix, number in numbers.items() if 2 * number >= len(names)]
