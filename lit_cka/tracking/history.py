"""The history of a tracked training: its records, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, cast

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
    # With `intervals`, 95 % intervals for the population's CKA, and for its difference to the last evaluation of the
    # same samples, of those layers that have one.
    low: NotRequired[dict[str, float]]
    high: NotRequired[dict[str, float]]
    change_low: NotRequired[dict[str, float]]
    change_high: NotRequired[dict[str, float]]
    rank: NotRequired[dict[str, float]]  # with `effective_ranks`


BOUNDS = ("low", "high", "change_low", "change_high")
LOGGED_BESIDE = ("low", "high", "rank")  # as `<prefix>_low/<layer>` and so on


def checked_history(value: Any) -> list[Record]:
    """Returns copies of the records that a checkpoint holds.

    Raises:
        ValueError: if they are no records.
    """
    kinds = {"step": int, "epoch": int, "stage": str, "dataloader": int, "n": int, "scores": Mapping}
    for record in value if isinstance(value, list) else [value]:
        is_whole = isinstance(record, Mapping) and all(isinstance(record.get(key), kinds[key]) for key in kinds)
        by_layer = [record[key] for key in _by_layer(record)] if is_whole else []
        if not is_whole or not all(isinstance(each, Mapping) and _holds_numbers(each) for each in by_layer):
            raise ValueError(f"Expected the checkpoint to hold a history of CKACallback, but it holds {record!r:.80}.")
    return [cast(Record, {**record, **{key: dict(record[key]) for key in _by_layer(record)}}) for record in value]


def _by_layer(record: Mapping[str, Any]) -> list[str]:
    return [key for key in ("scores", *BOUNDS, "rank") if key in record]


def _holds_numbers(layers: Mapping[str, Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in layers.values())


def change_mark(record: Record, layer: str) -> str:
    """Returns an arrow for a layer whose CKA differs from that of the last evaluation by more than chance, and "=" for
    one of which that can't be said; "" where there was none.
    """
    low, high = (record.get(key, {}).get(layer, float("nan")) for key in ("change_low", "change_high"))  # type: ignore[attr-defined]
    if low != low:
        return ""
    return "\u2193" if high < 0 else "\u2191" if low > 0 else "="


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


def is_doubtful(record: Record, layer: str, thresholds: tuple[float, float] = THRESHOLDS) -> bool:
    """Returns whether the interval of a layer's CKA has ends of different verdicts: n is too small to tell which."""
    ends = (record.get(end, {}).get(layer, float("nan")) for end in ("low", "high"))  # type: ignore[attr-defined]
    return len({verdict(end, thresholds) for end in ends}) > 1
