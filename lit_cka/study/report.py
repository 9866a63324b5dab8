"""What a study leaves in its folder, and what it says: JSON, CSV, figures and a page: `save_study`."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_cka import plots
from lit_cka.files import versions, visible, write_json, written_whole
from lit_cka.plots.table_page import Column, write_table_page
from lit_cka.study.edits import BASELINES
from lit_cka.study.statistics import Effect
from lit_cka.study.storage import CheckpointResult
from lit_cka.study.study import StudyResults
from lit_cka.study.summary import ALPHA, Answers, Row, summarise
from lit_cka.study.table import POINTS, flat_record, record, study_cells, study_columns

_FORMATS = (".svg", ".png", ".pdf")  # the first goes into the page
_CAPTIONS = {
    "plane": "Gains over the fine-tuned model, which is at 0: right is better on {first}, up on the shifted sets. Bars "
    "are 95 % intervals for other models and samples; the line is WiSE-FT by its alpha; rings are on the Pareto front: "
    "nothing else is better on one side and as good on the other.",
    "gains": "Mean gains over all checkpoints, with 95 % intervals for other models and samples: blue is above 0, red "
    "below, grey may be chance. The last panel is what an edit gains beyond a shrinkage of its size.",
    "by_checkpoint": "What each checkpoint gains on the shifted sets: right of 0 it is better than before.",
}


def save_study(folder: str | os.PathLike[str], results: StudyResults, config: Mapping[str, Any]) -> list[Row]:
    """Write `study.json`, two CSV files, figures, and the pages `index.html` and `checkpoints.html`; returns the rows.

    Args:
        folder: where to; made where it is missing.
        results: of the study.
        config: what was run: goes into the JSON, with the versions of packages.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lit_cka.study.storage import SetResult
        >>> right = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], dtype=np.uint8)  # of each variant, sample by sample
        >>> sets = [SetResult(name, "top1", right) for name in ("clean", "noisy")]
        >>> checkpoints = [CheckpointResult(name, [], ["pretrained", "finetuned"], sets) for name in ("1.pt", "2.pt")]
        >>> with TemporaryDirectory() as folder:
        ...     rows = save_study(folder, StudyResults(checkpoints, {}), {"seed": 0})
        >>> [row.label for row in rows]
        ['pretrained', 'finetuned']
    """
    folder = Path(folder)
    rows = summarise(results.checkpoints)
    answers = Answers(results.checkpoints)
    accuracies = {label: answers.accuracy(label) for label in (row.label for row in rows)}
    first, *shifted = answers.names
    written = [
        write_json(folder / "study.json", _content(results, rows, accuracies, config)),
        _write_csv(folder / "study.csv", [flat_record(row) for row in rows]),
        _write_csv(folder / "checkpoints.csv", _by_checkpoint(results.checkpoints, answers.names, accuracies)),
    ]
    pictures = _save_figures(folder, rows, first, shifted, written)
    num = len(results.checkpoints)
    _write_checkpoint_page(folder, results.checkpoints, answers.names, accuracies)
    write_table_page(
        folder / "index.html",
        study_columns(first, shifted, num),
        [study_cells(row, num) for row in rows],
        title="What the edits are worth",
        about=describe_study(results, rows),
        sorted_by=6,
        pictures=pictures,
        files=["checkpoints.html", *sorted(path.name for path in written)],
    )
    return rows


def describe_study(results: StudyResults, rows: Sequence[Row]) -> list[str]:
    """Returns what was studied, what came out, and what an interval is, a paragraph each.

    Example:
        >>> from lit_cka.study.storage import SetResult
        >>> right = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], dtype=np.uint8)  # of each variant, sample by sample
        >>> sets = [SetResult(name, "top1", right) for name in ("clean", "noisy")]
        >>> checkpoints = [CheckpointResult(name, [], ["pretrained", "finetuned"], sets) for name in ("1.pt", "2.pt")]
        >>> describe_study(StudyResults(checkpoints, {}), summarise(checkpoints))[0][:46]
        '2 fine-tuned models of one pretrained model, 0'
    """
    done = results.checkpoints
    sets = done[0].sets
    units = len({unit for each in Answers(done).units for unit in each.tolist()})
    sizes = ", ".join(f"{each.name} ({each.right.shape[1]})" for each in sets)
    lines = [
        f"{len(done)} fine-tuned models of one pretrained model, {len(done[0].edits)} edits of each, on {sizes} "
        "samples, "
        f"made from {units} that are independent of each other. The first set is in-distribution, the others are "
        "shifted, "
        "and count alike in their mean."
    ]
    lines += [conclusion(rows), *(_sentence(row) for row in rows if row.verdict)]
    lines.append(
        "An interval of 95 % covers the true mean in about 95 of 100 such studies, here with other fine-tuned models "
        "and "
        "other samples (crossed random effects; Student's t). Where samples are made from one original, originals are "
        "drawn. The null of an edit is shrink for the edit's size: each weight's update scaled to the norm that the "
        "edit "
        "leaves it. An edit is called more than shrinkage if it beats its null on the shifted sets with a p-value "
        "below "
        f"{ALPHA:g} after Holm's correction for the number of edits, and is not worse in-distribution; that calls a "
        "shrinkage "
        "in disguise more than it is in at most 5 of 100 studies. Gains over the fine-tuned model are not corrected "
        "for the number of edits."
    )
    for each in sets:
        if each.absent:
            shown = ", ".join(map(str, each.absent[:10])) + (", ..." if len(each.absent) > 10 else "")
            lines.append(f"{each.name} has no sample of the classes {shown}: its numbers say nothing of these.")
    lines += [f"Left out: {name}. {why}" for name, why in results.failed.items()]
    if len(done) < 2:
        lines.append("Of one fine-tuned model, nothing can be said about others: add checkpoints for intervals.")
    return [visible(line) for line in lines]


def conclusion(rows: Sequence[Row]) -> str:
    """Returns in a sentence which edits are more than shrinkage, and which are less, a trade or not told."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.beyond_shifted is not None:
            found.setdefault(row.verdict, []).append(row.label)
    more = ", ".join(found.pop("more than shrinkage", [])) or "none"
    others = "; ".join(f"{verdict}: {', '.join(labels)}" for verdict, labels in found.items())
    return f"More than shrinkage: {more}. Of the other edits that are no shrinkage themselves, {others or 'none'}."


def _sentence(row: Row) -> str:
    gain, beyond = row.gain_shifted, row.beyond_shifted
    said = (
        f"{row.label}: {_points(row.gain_in_distribution)} points in-distribution and {_points(gain)} on the shifted "
        "sets, "
        f"over fine-tuned, which it beats there in {gain.wins} of {len(gain.by_model)} models"
    )
    if beyond is None:
        return f"{said}. It {row.verdict} itself."
    on_first = _points(row.beyond_in_distribution) if row.beyond_in_distribution else ""
    return f"{said}; {on_first} and {_points(beyond)} over the shrinkage of its size: {row.verdict}."


def _points(effect: Effect) -> str:
    low, high = (POINTS * end for end in effect.over_both)
    interval = f" [{low:.1f}, {high:.1f}]" if low == low else ""
    return f"{POINTS * effect.mean:+.1f}{interval}".replace("-", "\N{MINUS SIGN}")


def _content(
    results: StudyResults, rows: Sequence[Row], accuracies: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "config": dict(config),
        "versions": versions(),
        "checkpoints": [each.name for each in results.checkpoints],
        "failed": results.failed,
        "test_sets": {
            each.name: {"num_samples": each.right.shape[1], "metric": each.metric, "absent_classes": each.absent}
            for each in results.checkpoints[0].sets
        },
        "edits": [record(row) for row in rows],
        "accuracy": accuracies,  # by variant, of each checkpoint on each test set
    }


def _by_checkpoint(
    results: Sequence[CheckpointResult], names: Sequence[str], accuracies: Mapping[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for label, values in accuracies.items():
        for result, by_set in zip(results, values, strict=True):
            row = {"checkpoint": result.name, "edit": label}
            row |= dict(zip(names, by_set.tolist(), strict=True))
            rows.append({**row, "shifted_average": float(by_set[1:].mean()), **result.edits.get(label, {})})
    return rows


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_checkpoint_page(
    folder: Path, results: Sequence[CheckpointResult], names: Sequence[str], accuracies: Mapping[str, Any]
) -> None:
    columns = [
        Column("checkpoint", "The fine-tuned model."),
        Column("edit", "What was done to it.", choices=True),
        *(Column(name, f"Right answers on {name}, in percent; more is better.", numeric=True) for name in names),
        Column("shifted", "Mean over all sets but the first, in percent; more is better.", numeric=True),
        Column("gain shifted", "That above the fine-tuned model, in percentage points; more is better.", numeric=True),
    ]
    cells = []
    for label, values in accuracies.items():
        gains = values[:, 1:].mean(axis=1) - accuracies["finetuned"][:, 1:].mean(axis=1)
        for result, by_set, gain in zip(results, POINTS * values, POINTS * gains, strict=True):
            cells.append([result.name, label, *by_set.tolist(), float(by_set[1:].mean()), float(gain)])
    about = ["Each number rests on one model and the samples of one test set. What it means over models: index.html."]
    write_table_page(
        folder / "checkpoints.html", columns, cells, title="Checkpoint by checkpoint", about=about,
        sorted_by=len(columns) - 1, files=["index.html", "checkpoints.csv"],
    )  # fmt: skip


def _save_figures(
    folder: Path, rows: Sequence[Row], first: str, shifted: Sequence[str], written: list[Path]
) -> dict[str, str]:
    """Write the figures; returns captions by path."""
    others = ", ".join(shifted) if len(shifted) < 5 else f"{len(shifted)} shifted sets"
    edits = [row for row in rows if row.label == "pretrained" or row.kept is not None]
    names = [row.label for row in edits]
    panels = {
        f"on {first}, over fine-tuned": [_bar(row.gain_in_distribution) for row in edits],
        "on the shifted sets, over fine-tuned": [_bar(row.gain_shifted) for row in edits],
        "on the shifted sets, over shrinkage of the same size": [_bar(row.beyond_shifted) for row in edits],
    }
    gains, _ = plots.interval_panels(
        names, panels, xlabel="gain, percentage points", title="Gains, with 95 % intervals"
    )
    dots, _ = plots.by_checkpoint(
        names,
        [(POINTS * row.gain_shifted.by_model).tolist() for row in edits],
        xlabel=f"gain over fine-tuned, percentage points, mean over {others}",
        title="Each dot a fine-tuned model, the bar their mean",
    )
    pictures = {}
    figures = {"plane": gain_plane(rows, first, others), "gains": gains, "by_checkpoint": dots}
    for name, figure in figures.items():
        paths = plots.save_figure(figure, folder / name, _FORMATS)
        written += paths
        pictures[str(paths[0])] = _CAPTIONS[name].format(first=first)
    return pictures


def gain_plane(rows: Sequence[Row], first: str, others: str) -> Any:
    """Returns the figure of gains in distribution against gains on the shifted sets."""
    shown = [row for row in rows if row.label in BASELINES or row.kept is not None]
    places = {row.label: (POINTS * row.gain_in_distribution.mean, POINTS * row.gain_shifted.mean) for row in shown}
    alphas = [(float(name.removeprefix("wise_ft_")), name) for name in places if name.startswith("wise_ft_")]
    on_curve = sorted([(0.0, "pretrained"), (1.0, "finetuned"), *alphas])
    points = {label: place for label, place in places.items() if not label.startswith("wise_ft_")}
    figure, _ = plots.accuracy_plane(
        points,
        [(alpha, *places[name]) for alpha, name in on_curve] if alphas else [],
        errors={
            row.label: (_half(row.gain_in_distribution), _half(row.gain_shifted))
            for row in shown
            if row.label in points and row.label != "finetuned" and _half(row.gain_shifted) == _half(row.gain_shifted)
        },
        front=[places[row.label] for row in shown if row.on_front],
        xlabel=f"gain on {first}, percentage points",
        ylabel=f"mean gain on {others}, points",
        title="What each edit gains over fine-tuned (bars: 95 %)",
    )
    return figure


def _bar(effect: Effect | None) -> tuple[float, float, float] | None:
    if effect is None:
        return None
    mean, low, high = POINTS * np.array([effect.mean, *effect.over_both])
    return float(mean), float(low), float(high)


def _half(effect: Effect) -> float:
    return POINTS * (effect.over_both[1] - effect.over_both[0]) / 2
