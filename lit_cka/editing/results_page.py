"""An evaluation of variants as one page: a table with intervals, figures, and a sentence on each number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_cka.editing.evaluation import SHARES
from lit_cka.plots.table_page import Cell, Column, write_table_page
from lit_cka.tracking.history import mean_score

if TYPE_CHECKING:
    from lit_cka.editing.results import EvaluationResults

_Z = 1.959964  # of a normal distribution, for 95 %
_MEANINGS = {
    "top1": "Samples whose class the model puts first, in percent; more is better.",
    "choice_accuracy": "Questions of which the model finds the right answer likeliest, in percent; more is better.",
    "exact_match": "Questions that the model answers word for word, in percent; more is better.",
    "perplexity": "exp of the mean negative log-likelihood of a token; less is better.",
}
_WORTH = {
    "pretrained": "the weights before the fine-tuning",
    "finetuned": "the weights after it",
    "monosoup": "each update's two parts weighted anew",
    "highonly": "the first directions of each update alone",
    "lowonly": "all directions but the first",
    "shrink": "each weight's update scaled to the norm that MonoSoup leaves it: the control",
    "shrink_global": "likewise, by one factor for all weights",
}


def write_results_page(
    path: Path,
    results: EvaluationResults,
    about: Sequence[str],
    pictures: Mapping[str, str],
    files: Sequence[str],
) -> Path:
    """Write the page, whole or not at all; returns its path.

    Args:
        path: of the file.
        results: of the evaluation.
        about: paragraphs above the table.
        pictures: captions by the path of an SVG or PNG file.
        files: names of files beside the page.
    """
    return write_table_page(
        path,
        results_columns(results),
        results_rows(results),
        title="What the variants are worth",
        about=[*about, *_how_to_read(results)],
        sorted_by=1,
        pictures=pictures,
        files=files,
    )


def results_columns(results: EvaluationResults) -> list[Column]:
    """Returns the columns: of each test set a metric and its interval, their mean, and the CKA."""
    variants = [name for name in _variants(results) if name in _WORTH]
    columns = [Column("variant", f"{'; '.join(f'{name}: {_WORTH[name]}' for name in variants)}.")]
    for name, metric in _metrics(results).items():
        rests = f"On the {results.num_samples[name]} samples of {name}."
        columns.append(Column(f"{name}, {metric}", f"{_MEANINGS[metric]} {rests}", numeric=True))
        if metric in SHARES:
            columns.append(
                Column(f"{name}, 95 %", f"Interval of that for other samples like these (Wilson 1927). {rests}")
            )
    shown = _common_metric(results)
    if shown is not None:
        columns.append(Column("shifted", f"Mean over all test sets but the first. {_MEANINGS[shown]}", numeric=True))
        if shown in SHARES:
            columns.append(
                Column(
                    "shifted, 95 %",
                    "Interval of the mean for other samples, each drawn by itself: too narrow where the test sets are "
                    "versions of the same samples.",
                )
            )
    columns += [
        Column(
            f"CKA, {name}",
            f"Similarity of the blocks' features with the pretrained model's, mean over blocks, on "
            f"{results.num_cka_samples[name]} samples of {name}: 1 the same geometry, 0 unrelated. Read it with the "
            "accuracy: similarity alone is no merit.",
            numeric=True,
        )
        for name in _with_cka(results)
    ]
    return columns


def results_rows(results: EvaluationResults) -> list[list[Cell]]:
    """Returns a cell for each of `results_columns`, for each variant."""
    metrics, shown = _metrics(results), _common_metric(results)
    rows = []
    for variant in _variants(results):
        by_set = results.metrics.get(variant, {})
        row: list[Cell] = [variant]
        for name, metric in metrics.items():
            value = by_set[name][metric]
            row.append(100 * value if metric in SHARES else value)
            if metric in SHARES:
                row.append(_percent(wilson_interval(value, results.num_samples[name])))
        if shown is not None:
            value = results.shifted_average[variant][shown]
            row.append(100 * value if shown in SHARES else value)
            if shown in SHARES:
                half = shifted_half_width(results, variant, shown)
                is_share = 0 <= value <= 1
                row.append(_percent((max(value - half, 0.0), min(value + half, 1.0))) if is_share else None)
        for name in _with_cka(results):
            scores = results.cka[name].get(variant)
            row.append(1.0 if variant == "pretrained" else mean_score(scores) if scores else None)
        rows.append(row)
    return rows


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of `n` samples (Wilson 1927, "Probable inference"), within [0, 1]; NaN of
    what is no share.

    Example:
        >>> low, high = wilson_interval(1.0, 100)
        >>> round(low, 3), high
        (0.963, 1.0)
    """
    if not 0 <= share <= 1:
        return math.nan, math.nan
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def shifted_half_width(results: EvaluationResults, variant: str, metric: str) -> float:
    """Returns half of the 95 % interval of the mean share over all test sets but the first, by the normal
    approximation, each sample drawn by itself.
    """
    shifted = results.test_names[1:]
    shares = {name: results.metrics[variant][name][metric] for name in shifted}
    variance = sum(max(share * (1 - share), 0.0) / results.num_samples[name] for name, share in shares.items())
    return _Z * math.sqrt(variance) / len(shifted)


def _variants(results: EvaluationResults) -> list[str]:
    """Returns those that have been evaluated, or of which CKA alone was taken."""
    return list(results.metrics) or list(next(iter(results.cka.values())))


def _with_cka(results: EvaluationResults) -> list[str]:
    """Returns the first test set that CKA was taken on, or all where there is nothing else."""
    taken = [name for name, scores in results.cka.items() if scores]
    return taken[:1] if results.metrics else taken


def _metrics(results: EvaluationResults) -> dict[str, str]:
    found = {name: results.main_metric(name) for name in results.test_names}
    return {name: metric for name, metric in found.items() if metric is not None}


def _common_metric(results: EvaluationResults) -> str | None:
    """Returns the metric that all test sets are judged by, where there are several."""
    common = set(_metrics(results).values())
    shown = common.pop() if len(common) == 1 and len(results.test_names) > 1 else None
    return shown if shown is not None and all(shown in each for each in results.shifted_average.values()) else None


def _how_to_read(results: EvaluationResults) -> list[str]:
    if not results.metrics:
        return ["CKA alone was taken: how far each variant has moved, not whether that is for the better."]
    lines = [
        f"The first test set, {results.test_names[0]}, is in-distribution, all others are shifted. An edit is worth "
        "something where it wins back more on these than it costs on the first."
    ]
    if "shrink" in results.metrics:
        lines.append(
            "shrink makes each weight's update as small as MonoSoup does, and chooses no directions: what monosoup is "
            "worth beyond it comes from the directions."
        )
    lines.append(
        "Intervals are of each variant by itself, for other samples and this one fine-tuned model. Two variants "
        "answer the "
        "same samples, so that their difference is known better than by two intervals that overlap: lit-cka study "
        "compares them in pairs, over many fine-tuned models."
    )
    return lines


def _percent(interval: tuple[float, float]) -> str | None:
    if interval[0] != interval[0]:
        return None
    return " to ".join(f"{100 * end:.1f}" for end in interval)
