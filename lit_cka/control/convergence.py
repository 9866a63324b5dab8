"""How many of the first blocks have stopped changing: `num_converged`, and whether a loss has turned: `LossWatch`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_ROUNDING = 1e-9  # of a score, in float64


def num_converged(
    records: Sequence[Mapping[str, Any]], blocks: Sequence[str], share: float = 1.0, num_evaluations: int = 1
) -> int:
    """Returns how many of the first blocks change little beside the last one, in each of the last evaluations.

    The distance d_i = sqrt(1 - CKA_i), up to a factor that between the centred Gram matrices of unit norm, is how far
    the output of block i has moved since the evaluation before. Distances add up at most, so that i of L blocks would
    have an equal share of d_L if d_i were i / L of it. With the lower end low_i of the interval of CKA_i, so with the
    upper end of d_i, block i has converged if

        sqrt(1 - low_i) <= share * i / L * sqrt(1 - CKA_L),

    and counted are the blocks before the first that has not. Both sides grow with the learning rate and with the time
    between evaluations, so that no limit has to fit them. Where the first blocks are those that learn, as from a shift
    of the inputs (Lee et al. 2022, arXiv 2210.11466), they move by more than their share.

    That says something while all blocks are trained. Once the first are frozen, those behind them move far less at
    once, and the last of them most: they would all be taken for converged in turn.

    Where a score is undefined, or has no interval, it is not known that a block has converged, unless the score is 1:
    the block gives what it gave before.

    Args:
        records: entries of the history of a `CKACallback(reference="previous", intervals=True)`, oldest first, all
            measured while no block was frozen.
        blocks: names of the blocks, in the order in which they run.
        share: 1 for an equal share.
        num_evaluations: how many evaluations in a row.

    Raises:
        ValueError: if a record has no intervals, or lacks a block.

    Example:
        >>> record = {"scores": {"0": 0.999, "1": 0.98, "2": 0.96}, "low": {"0": 0.998, "1": 0.97, "2": 0.95}}
        >>> num_converged([record], ["0", "1", "2"])  # 0.045 <= 0.2 / 3, but 0.173 > 0.2 * 2 / 3
        1
    """
    if len(records) < num_evaluations:
        return 0
    for number, block in enumerate(blocks, 1):
        part = share * number / len(blocks)
        for record in records[-num_evaluations:]:
            if not _distance(_low(record, block)) <= part * _distance(_score(record, blocks[-1])):
                return number - 1
    return len(blocks)


def _distance(cka: float) -> float:
    return math.sqrt(max(1 - cka, 0))  # a debiased score may be above 1; NaN stays NaN


def _low(record: Mapping[str, Any], block: str) -> float:
    if "low" not in record:
        raise ValueError(
            "Expected the history of CKACallback to have intervals, to know how much a block has changed at most, but "
            "its records have none: pass CKACallback(reference='previous', intervals=True)."
        )
    is_same = abs(1 - _score(record, block)) <= _ROUNDING
    return 1.0 if is_same else float(record["low"].get(block, math.nan))


def _score(record: Mapping[str, Any], block: str) -> float:
    scores = record["scores"]
    if block not in scores:
        raise ValueError(
            f"Expected CKACallback to track block {block!r}, but it tracks {', '.join(list(scores)[:6])}: pass the "
            "same layers to both."
        )
    return float(scores[block])


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
