"""What a study's results say of each edit: gains over fine-tuned, and over shrinkage of the same size: `summarise`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lit_cka.study.edits import BASELINES
from lit_cka.study.evaluation import null_of
from lit_cka.study.statistics import Effect, holm, paired_effect, pareto_front
from lit_cka.study.storage import CheckpointResult

ALPHA = 0.05
Verdict: TypeAlias = Literal[
    "more than shrinkage", "less than shrinkage", "trades otherwise", "not told from shrinkage", "is a shrinkage",
    "enlarges the update", "two checkpoints needed", "",
]  # fmt: skip
_LARGER = 1.001  # times the fine-tuned update's norm: what is beside such an edit is no shrinkage


@dataclass(frozen=True)
class Row:
    """One variant, over all checkpoints.

    Attributes:
        label: of the edit, "pretrained" or "finetuned", or of the shrinkage beside an edit.
        in_distribution: mean share of right answers on the first test set, in [0, 1].
        shifted: mean over all other test sets, likewise.
        gain_in_distribution: over the fine-tuned model.
        gain_shifted: likewise.
        beyond_in_distribution: over the shrinkage of the same size; None of what has none beside it.
        beyond_shifted: likewise.
        p_adjusted: of `beyond_shifted`, by Holm over all edits that leave an update no larger than it was; NaN of
            others.
        verdict: "more than shrinkage" where `beyond_shifted` is above 0 by that, and `beyond_in_distribution` not
            below 0 by its own p-value; "less" the other way round; "trades otherwise" where both are different from 0
            and point apart, as those of a stronger or a weaker shrinkage would.
        on_front: whether no other variant is better on one side and as good on the other.
        kept: median share of the update's norm that is left; None of what is no edit.
        seconds: median that the edit took.
        mebibytes: median of the memory that it took at its peak.
    """

    label: str
    in_distribution: float
    shifted: float
    gain_in_distribution: Effect
    gain_shifted: Effect
    beyond_in_distribution: Effect | None
    beyond_shifted: Effect | None
    p_adjusted: float
    verdict: Verdict
    on_front: bool
    kept: float | None = None
    seconds: float | None = None
    mebibytes: float | None = None


class Answers:
    """Who gets which sample right, of checkpoints that have met the same ones.

    Args:
        results: of the checkpoints, with the same variants and test sets.
    """

    def __init__(self, results: Sequence[CheckpointResult]) -> None:
        self.results = results
        self.variants = results[0].variants
        self.names = [each.name for each in results[0].sets]
        self.units: list[NDArray[np.int64]] = []
        grouped = [each.groups for each in results[0].sets if each.groups is not None]
        last = min([0, *(int(groups.min()) for groups in grouped)])
        for each in results[0].sets:
            if each.groups is not None:
                self.units.append(each.groups)
                continue
            n = each.right.shape[1]
            self.units.append(last - 1 - np.arange(n))  # each a unit of its own, by a number that no group has
            last -= n

    def right(self, label: str, number: int) -> NDArray[np.int8]:
        """Returns which samples of a test set a variant of each checkpoint gets right (checkpoints, samples)."""
        place = self.variants.index(label)
        return np.stack([each.sets[number].right[place] for each in self.results]).astype(np.int8)

    def accuracy(self, label: str) -> NDArray[np.float64]:
        """Returns the share of right answers (checkpoints, test sets)."""
        return np.stack([self.right(label, number).mean(axis=1) for number in range(len(self.names))], axis=1)

    def effect(self, after: str, before: str, sets: Sequence[int]) -> Effect:
        """Returns the mean difference of two variants over some test sets."""
        differences = [self.right(after, number) - self.right(before, number) for number in sets]
        return paired_effect(differences, [self.units[number] for number in sets])


def summarise(results: Sequence[CheckpointResult]) -> list[Row]:
    """Returns what there is to say of each variant: the pretrained and the fine-tuned models, the edits, and behind
    them the shrinkages that are no edit themselves.

    Raises:
        ValueError: if there is no result.

    Example:
        >>> import numpy as np
        >>> from lit_cka.study.storage import CheckpointResult, SetResult
        >>> right = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], dtype=np.uint8)  # of each variant, sample by sample
        >>> sets = [SetResult(name, "top1", right) for name in ("clean", "noisy")]
        >>> checkpoints = [CheckpointResult(name, [], ["pretrained", "finetuned"], sets) for name in ("1.pt", "2.pt")]
        >>> [(row.label, row.shifted) for row in summarise(checkpoints)]
        [('pretrained', 0.75), ('finetuned', 0.75)]
    """
    if not results:
        raise ValueError("Expected results of at least one checkpoint, but got none.")
    answers = Answers(results)
    edits = list(results[0].edits)
    is_scaling = {label: all(each.edits[label]["is_scaling"] for each in results) for label in edits}
    shifted = range(1, len(answers.names))
    beyond = {
        label: (answers.effect(label, null_of(label), [0]), answers.effect(label, null_of(label), shifted))
        for label in edits
        if not is_scaling[label]
    }
    costs = {label: _costs(label, results) for label in edits}
    judged = [label for label in beyond if (costs[label][0] or 0.0) <= _LARGER]
    adjusted = dict(zip(judged, holm([beyond[label][1].p for label in judged]), strict=True))
    labels = [*BASELINES, *edits, *map(null_of, beyond)]
    means = {label: answers.accuracy(label).mean(axis=0) for label in labels}
    points = {label: (float(mean[0]), float(mean[1:].mean())) for label, mean in means.items()}
    front = dict(zip(labels, pareto_front(list(points.values())), strict=True))
    return [
        Row(
            label,
            *points[label],
            gain_in_distribution=answers.effect(label, "finetuned", [0]),
            gain_shifted=answers.effect(label, "finetuned", shifted),
            beyond_in_distribution=beyond[label][0] if label in beyond else None,
            beyond_shifted=beyond[label][1] if label in beyond else None,
            p_adjusted=adjusted.get(label, math.nan),
            verdict="is a shrinkage" if is_scaling.get(label) else _verdict(beyond.get(label), adjusted.get(label)),
            on_front=front[label],
            kept=costs[label][0] if label in costs else None,
            seconds=costs[label][1] if label in costs else None,
            mebibytes=costs[label][2] if label in costs else None,
        )
        for label in labels
    ]


def _verdict(effects: tuple[Effect, Effect] | None, p_adjusted: float | None) -> Verdict:
    if effects is None:
        return ""
    if p_adjusted is None:
        return "enlarges the update"
    if p_adjusted != p_adjusted:
        return "two checkpoints needed"
    if p_adjusted >= ALPHA:
        return "not told from shrinkage"
    in_distribution, shifted = effects
    if in_distribution.p < ALPHA and in_distribution.mean * shifted.mean < 0:
        return "trades otherwise"
    return "more than shrinkage" if shifted.mean > 0 else "less than shrinkage"


def _costs(label: str, results: Sequence[CheckpointResult]) -> tuple[float | None, float | None, float | None]:
    found = []
    for key in ("kept", "seconds", "mebibytes"):
        values = [each.edits[label][key] for each in results if label in each.edits]
        known = [value for value in values if value is not None and value == value]
        found.append(median(known) if known else None)
    return found[0], found[1], found[2]
