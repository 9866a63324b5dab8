"""What an evaluation leaves in a folder: JSON for programs, pictures and tables for people."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_cka import plots
from lit_cka.editing.evaluation import SHARES
from lit_cka.editing.parameter import AS_PRETRAINED, EDITED, ParameterRecord
from lit_cka.editing.results_page import shifted_half_width, write_results_page
from lit_cka.files import file_name, versions, write_json
from lit_cka.tracking.history import mean_score

if TYPE_CHECKING:
    from lit_cka.editing.results import EvaluationResults

_FORMATS = (".svg", ".png", ".pdf")  # the first goes into the page
_PLANE = (
    "Bars are 95 % intervals, each variant by itself; the line is WiSE-FT by its alpha, from the pretrained model (0) "
    "to the "
    "fine-tuned one (1)."
)
_HEATMAP = (
    "Rows are variants, columns blocks: how similar the features are to the pretrained model's. 1 is the same "
    "geometry, 0 "
    "unrelated; neither is better by itself."
)
_LAMBDAS = (
    "What MonoSoup leaves of each weight's update: of its first directions (high) and of all others (low). 1 leaves a "
    "part "
    "as it is, 0 takes it out."
)


def save_results(
    folder: str | os.PathLike[str],
    results: EvaluationResults,
    records: Sequence[ParameterRecord],
    config: Mapping[str, Any],
    *,
    is_finished: bool = True,
    seconds: Mapping[str, float] | None = None,
    pictures: bool = True,
) -> list[Path]:
    """Write `monosoup.json`, `summary.json`, the pictures and `index.html`; returns the paths.

    Args:
        folder: where to.
        results: of the evaluation.
        records: of the edit.
        config: what was run: goes into both JSON files, with the versions of packages.
        is_finished: False if the evaluation was interrupted, which both JSON files then say.
        seconds: what each part took, by name.
        pictures: draw them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame = {
        "config": dict(config),
        "versions": versions(),
        "written_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": dict(seconds or {}),
        **({} if is_finished else {"finished": False}),
    }
    full = {
        **frame,
        "metrics": results.metrics,
        "shifted_average": results.shifted_average,
        "cka": results.cka,
        "num_samples": results.num_samples,
        "num_cka_samples": results.num_cka_samples,
        "parameters": list(records),
    }
    written = [write_json(folder / "monosoup.json", full)]
    written.append(write_json(folder / "summary.json", {**frame, **_summary(results, records)}))
    captions: dict[str, str] = {}
    if pictures:
        written += _save_pictures(folder, results, records, captions)
    about = [describe_edit(records)]
    if not is_finished:
        about.append("The evaluation was stopped: it rests on the samples up to then.")
    files = sorted(path.name for path in written)
    return [*written, write_results_page(folder / "index.html", results, about, captions, files)]


def _save_pictures(
    folder: Path, results: EvaluationResults, records: Sequence[ParameterRecord], captions: dict[str, str]
) -> list[Path]:
    """Write the figures, and note captions by the paths of their SVG files; returns all paths."""
    written: list[Path] = []

    def save(figure: Any, name: str, caption: str) -> None:
        paths = plots.save_figure(figure, folder / name, _FORMATS)
        written.extend(paths)
        captions[str(paths[0])] = caption

    plane = accuracy_figure(results)
    if plane is not None:
        names = ", ".join(results.test_names[1:])
        save(plane, "accuracy_plane", f"Right is better on {results.test_names[0]}, up on {names}. {_PLANE}")
    for number, (name, scores) in enumerate(results.cka.items()):
        if scores:
            figure, _ = cka_heatmap(results, name)
            save(figure, f"cka_{number}_{file_name(name)}", f"{_HEATMAP} On {results.num_cka_samples[name]} samples.")
    edited = [record for record in records if record["reason"] is None]
    if edited:
        high, low = ([record[key] or 0.0 for record in edited] for key in ("lambda_high", "lambda_low"))
        figure, _ = plots.lambda_figure(plots.short_names([record["name"] for record in edited], 40), high, low)
        save(figure, "lambdas", _LAMBDAS)
    return written


def cka_heatmap(results: EvaluationResults, test_set: str) -> tuple[Any, Any]:
    """Draws the CKA with the pretrained model on one test set: rows are variants, columns blocks."""
    scores = {"pretrained": dict.fromkeys(next(iter(results.cka[test_set].values())), 1.0), **results.cka[test_set]}
    layer_names = list(scores["pretrained"])
    values = np.array([[row[name] for name in layer_names] for row in scores.values()])
    return plots.heatmap(
        values, list(scores), layer_names, title=f"CKA with the pretrained model, {_caption(test_set)}", xlabel="block",
    )  # fmt: skip


def accuracy_figure(results: EvaluationResults) -> Any | None:
    """Returns the accuracy plane; None where there is no shifted set, or no metric that all sets have."""
    metric = results.main_metric(results.test_names[0])
    if metric is None or any(metric not in averages for averages in results.shifted_average.values()):
        return None
    places = {
        variant: (metrics[results.test_names[0]][metric], results.shifted_average[variant][metric])
        for variant, metrics in results.metrics.items()
    }
    points = {variant: place for variant, place in places.items() if not variant.startswith("wise_ft_")}
    alphas = sorted(
        [(alpha, name) for alpha, name in ((0.0, "pretrained"), (1.0, "finetuned")) if name in places]
        + [(float(name.removeprefix("wise_ft_")), name) for name in places if name not in points]
    )
    curve = [(alpha, *places[name]) for alpha, name in alphas] if len(alphas) > 2 else []
    names = [_caption(name) for name in results.test_names]
    figure, _ = plots.accuracy_plane(
        points,
        curve,
        errors={name: half_widths(results, name, metric) for name in points} if metric in SHARES else None,
        xlabel=f"{metric} on {names[0]}",
        ylabel=f"mean {metric} on {', '.join(names[1:]) if len(names) < 5 else 'the shifts'}",
        title="What each variant is worth" + (" (bars: 95 %)" if metric in SHARES else ""),
    )
    return figure


def half_widths(results: EvaluationResults, variant: str, metric: str) -> tuple[float, float]:
    """Returns half of the 95 % intervals of a share of right answers: on the first test set, and of the mean of all
    others; by the normal approximation, each sample drawn by itself.
    """
    first = results.test_names[0]
    share = results.metrics[variant][first][metric]
    variance = max(share * (1 - share), 0.0) / results.num_samples[first]
    return 1.96 * math.sqrt(variance), shifted_half_width(results, variant, metric)


def print_results(results: EvaluationResults, records: Sequence[ParameterRecord], console: Console) -> None:
    """Print a table of variants by test set, and what was edited."""
    table = Table(title="Variants by test set" if results.metrics else "Mean CKA with the pretrained model")
    table.add_column("variant")
    for heading in _headings(results):
        table.add_column(escape(heading), justify="right", style="bold" if heading == _AVERAGE else "")
    for variant, cells in _rows(results).items():
        table.add_row(escape(variant), *cells)
    console.print(table)
    console.print(escape(describe_edit(records)))


_AVERAGE = "shifted\naverage"


def _headings(results: EvaluationResults) -> list[str]:
    if not results.metrics:
        return list(results.cka)
    headings = [f"{name}\n{results.main_metric(name) or ''}" for name in results.test_names]
    headings += [_AVERAGE] if _common_metric(results) is not None else []
    return headings + [f"mean CKA\n{name}" for name in _first_with_cka(results)]


def _rows(results: EvaluationResults) -> dict[str, list[str]]:
    """Returns a variant's cells below the headings."""
    if not results.metrics:
        variants = list(next(iter(results.cka.values())))
        return {name: [_number(mean_score(scores[name])) for scores in results.cka.values()] for name in variants}
    common, rows = _common_metric(results), {}
    for variant, by_set in results.metrics.items():
        rows[variant] = [_number(by_set[name].get(results.main_metric(name) or "")) for name in results.test_names]
        if common is not None:
            rows[variant].append(_number(results.shifted_average[variant].get(common)))
        for name in _first_with_cka(results):
            scores = results.cka[name].get(variant)
            rows[variant].append(
                "1.0000" if variant == "pretrained" else _number(mean_score(scores) if scores else None)
            )
    return rows


def _common_metric(results: EvaluationResults) -> str | None:
    """Returns the metric that variants are judged by on all of several test sets; None if there is none."""
    metrics = {results.main_metric(name) for name in results.test_names}
    return metrics.pop() if len(metrics) == 1 and len(results.test_names) > 1 else None


def _first_with_cka(results: EvaluationResults) -> list[str]:
    return [name for name, scores in results.cka.items() if scores][:1]


def describe_edit(records: Sequence[ParameterRecord], variant: str = "monosoup") -> str:
    """Returns one sentence on how many weights were edited, and one on why others were left alone.

    The two parts of an update are weighted in "monosoup" alone; of other variants, the number k of leading singular
    values in the high part is told.
    """
    edited = [record for record in records if record["reason"] is None]
    numbers: dict[str, int] = {}
    num_pretrained = sum(record["reason"] == AS_PRETRAINED for record in records)
    for record in records:
        if record["reason"] not in (None, AS_PRETRAINED):
            numbers[record["reason"]] = numbers.get(record["reason"], 0) + 1
    text = f"{len(edited)} of {len(records)} tensors edited"
    if edited and variant not in EDITED:
        kept = sorted(record["kept"] or 0.0 for record in edited)
        text += f"; of the update's norm are left {kept[0]:.0%} to {kept[-1]:.0%}, median {kept[len(kept) // 2]:.0%}"
    elif edited and variant != "monosoup":
        shares = sorted((record["k"] or 0) / (record["rank"] or 1) for record in edited)
        text += f"; k from {shares[0]:.0%} to {shares[-1]:.0%} of the singular values, "
        text += f"median {shares[len(shares) // 2]:.0%}"
    elif edited:
        lows = sorted(record["lambda_low"] or 0.0 for record in edited)
        text += f"; lambda_low from {lows[0]:.3f} to {lows[-1]:.3f}, median {lows[len(lows) // 2]:.3f}"
    if num_pretrained:
        text += f". Taken from the pretrained model: {num_pretrained}"
    if numbers:
        text += ". Left as fine-tuned: " + ", ".join(f"{number} ({reason})" for reason, number in numbers.items())
    return text + "."


def _summary(results: EvaluationResults, records: Sequence[ParameterRecord]) -> dict[str, Any]:
    first = results.test_names[0]
    return {
        "test_sets": results.num_samples,
        "variants": {
            variant: {
                "in_distribution": metrics[first],
                "shifted_average": results.shifted_average[variant],
                "cka_mean": {
                    name: mean_score(scores[variant]) for name, scores in results.cka.items() if variant in scores
                },
            }
            for variant, metrics in results.metrics.items()
        }
        or {
            variant: {"cka_mean": {name: mean_score(scores[variant]) for name, scores in results.cka.items()}}
            for variant in next(iter(results.cka.values()))
        },
        "edit": describe_edit(records),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _caption(name: str) -> str:
    """Returns a name for a picture, cut where it is too long."""
    return name if len(name) <= 40 else f"{name[:39]}…"
