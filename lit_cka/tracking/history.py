"""The history of a tracked training: its records, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from typing_extensions import TypedDict

Stage = Literal["validate", "test", "probe"]
# From the first on a layer counts as untouched, from the second on as refined, below as rewritten.
THRESHOLDS = (0.99, 0.9)


class Record(TypedDict):
    """What one tracked validation or test gave: an entry of `CKACallback.history`."""

    step: int  # optimizer steps taken
    epoch: int
    stage: str  # "validate", "test", or "probe" for a measurement on the probe in training
    dataloader: int  # its index
    n: int  # samples; the fewest of any layer where some layers skipped batches
    scores: dict[str, float]  # layer -> CKA, NaN where undefined


def checked_history(value: Any) -> list[Record]:
    """Returns copies of the records that a checkpoint holds.

    Raises:
        ValueError: if they are no records.
    """
    kinds = {"step": int, "epoch": int, "stage": str, "dataloader": int, "n": int, "scores": Mapping}
    for record in value if isinstance(value, list) else [value]:
        is_whole = isinstance(record, Mapping) and all(isinstance(record.get(key), kinds[key]) for key in kinds)
        if not is_whole or not all(isinstance(score, (int, float)) for score in record["scores"].values()):
            raise ValueError(f"Expected the checkpoint to hold a history of CKACallback, but it holds {record!r:.80}.")
    return [cast(Record, {**record, "scores": dict(record["scores"])}) for record in value]


def latest_scores(history: Sequence[Record]) -> dict[str, float]:
    """The last evaluation's CKA of every layer, of its first tracked dataloader; empty for an empty history."""
    if not history:
        return {}
    last = history[-1]
    same = [record for record in history if (record["step"], record["stage"]) == (last["step"], last["stage"])]
    first = min(record["dataloader"] for record in same)
    return dict([record for record in same if record["dataloader"] == first][-1]["scores"])


def mean_score(scores: dict[str, float]) -> float:
    """Mean over the layers where CKA is defined; NaN if it is for none."""
    defined = [score for score in scores.values() if score == score]
    return sum(defined) / len(defined) if defined else float("nan")


def first_series(history: Sequence[Record]) -> list[Record]:
    """The records to draw: those of the first tracked dataloader, of training where there was one, else of test."""
    stages = {record["stage"] for record in history}
    stage = next((stage for stage in ("validate", "probe") if stage in stages), "test")
    records = [record for record in history if record["stage"] == stage]
    first = min((record["dataloader"] for record in records), default=0)
    return [record for record in records if record["dataloader"] == first]


def verdict(cka: float, thresholds: tuple[float, float] = THRESHOLDS) -> str:
    """One word for a layer: "untouched", "refined" or "rewritten" by the thresholds, "undefined" for NaN.

    Example:
        >>> [verdict(cka) for cka in (0.999, 0.965, 0.267)]
        ['untouched', 'refined', 'rewritten']
    """
    if cka != cka:
        return "undefined"
    untouched, refined = thresholds
    return "untouched" if cka >= untouched else "refined" if cka >= refined else "rewritten"
