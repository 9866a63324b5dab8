"""How many of the first blocks have stopped changing: `num_converged`, and whether a loss has turned: `LossWatch`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_ROUNDING = 1e-9  # of a score, in float64


def num_converged(
    records: Sequence[Mapping[str, Any]], blocks: Sequence[str], limit: float, num_evaluations: int
) -> int:
    """Returns how many of the first blocks have not changed by more than a limit in each of the last evaluations.

    With CKA_i,t between what block i gives at evaluation t and at the one before it, and the lower end low_i,t of its
    interval, block i has converged if

        1 - low_i,t <= limit    for the last `num_evaluations` evaluations t,

    and counted are the blocks before the first that has not. Where a score is undefined, or has no interval, it is not
    known that a block has converged, unless the score is 1: the block gives what it gave before.

    Args:
        records: entries of the history of a `CKACallback(reference="previous", intervals=True)`, oldest first.
        blocks: names of the blocks, in the order in which they run.
        limit: of the change 1 - CKA.
        num_evaluations: how many evaluations in a row.

    Raises:
        ValueError: if a record has no intervals, or lacks a block.

    Example:
        >>> still = {"scores": {"0": 0.999, "1": 0.98}, "low": {"0": 0.998, "1": 0.97}}
        >>> num_converged([still, still], ["0", "1"], limit=0.01, num_evaluations=2)
        1
    """
    if len(records) < num_evaluations:
        return 0
    count = 0
    for block in blocks:
        if not all(1 - _low(record, block) <= limit for record in records[-num_evaluations:]):
            break
        count += 1
    return count


def _low(record: Mapping[str, Any], block: str) -> float:
    if "low" not in record:
        raise ValueError(
            "Expected the history of CKACallback to have intervals, to know how much a block has changed at most, but "
            "its records have none: pass CKACallback(reference='previous', intervals=True)."
        )
    scores, low = record["scores"], record["low"]
    if block not in scores:
        raise ValueError(
            f"Expected CKACallback to track block {block!r}, but it tracks {', '.join(list(scores)[:6])}: pass the "
            "same layers to both."
        )
    is_same = abs(1 - scores[block]) <= _ROUNDING
    return 1.0 if is_same else float(low.get(block, math.nan))


class LossWatch:
    """Tells when a monitored value has turned: it was worse than its best by more than `min_delta` so often in a row.

    Args:
        patience: how often.
        min_delta: by how much.
        mode: "min" if lower is better, "max" if higher is.

    Attributes:
        best: the best value so far; NaN before the first.
        num_worse: how often in a row the value has been worse.
    """

    def __init__(self, patience: int, min_delta: float, mode: str) -> None:
        self._patience, self._min_delta, self._sign = patience, min_delta, 1 if mode == "min" else -1
        self.best, self.num_worse = math.nan, 0

    def update(self, value: float) -> bool:
        """Take the next value; whether it has turned by now. A value that is NaN is worse than any."""
        if self._sign * value < self._sign * self.best or self.best != self.best:
            self.best, self.num_worse = value, 0
        elif self._sign * (value - self.best) <= self._min_delta:
            self.num_worse = 0
        else:
            self.num_worse += 1
        return self.num_worse >= self._patience

    def state(self) -> dict[str, float]:
        """Returns what it knows, for a checkpoint."""
        return {"best": self.best, "num_worse": self.num_worse}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.best, self.num_worse = float(state["best"]), int(state["num_worse"])
