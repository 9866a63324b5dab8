"""What the commands that compare models share: their models and data, tables, and files of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from lit_cka import plots
from lit_cka.analysis.comparison import Comparison
from lit_cka.analysis.features import Features
from lit_cka.analysis.image_model import Digits, ImageFiles, ImageModel
from lit_cka.analysis.text_file import TextFile
from lit_cka.analysis.text_model import TextModel
from lit_cka.commands.messages import is_first_rank, num_ranks
from lit_cka.files import file_name, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Model = Union[TextModel, ImageModel]
Data = Union[TextFile, ImageFiles, Digits]
FORMATS = (".png", ".pdf", ".svg")


def all_features(models: Sequence[Model], data: Sequence[Data], folder: Path) -> list[list[Features]]:
    """By dataset, every model's features, each also in a file of the folder; under torchrun, ranks share the batches.

    Raises:
        ValueError: if two models or two datasets have the same name.
    """
    names = [model.name for model in models]
    if len({file_name(name) for name in names}) < len(names):  # they would overwrite each other's files
        raise ValueError(f"Expected models of different names, but got {', '.join(names)}. Set `name`.")
    sets = [each.read() for each in data]
    names = [samples.name for samples in sets]
    if len({file_name(name) for name in names}) < len(names):
        raise ValueError(f"Expected datasets of different names, but got {', '.join(names)}. Set `name`.")
    return [[_features(model, samples, folder) for model in models] for samples in sets]


def feature_pairs(options: Any, folder: Path) -> list[list[Features]]:
    """Returns the features to compare by dataset, of one model or two, from stored files or from models and data.

    Raises:
        ValueError: unless there are one or two of either kind.
    """
    if options.features:
        if options.models or len(options.features) > 2:
            raise ValueError("Expected `features` to name one or two files, and no `models` besides.")
        return [[Features.load(path) for path in options.features]]
    if not 1 <= len(options.models) <= 2:
        raise ValueError(f"Expected one or two `models`, but got {len(options.models)}.")
    sets = options.data if isinstance(options.data, list) else [options.data]
    if not sets:
        raise ValueError("Expected `data` to compare the models on, but got none.")
    return all_features(options.models, sets, folder)


def _features(model: Model, samples: Any, folder: Path) -> Features:
    features = model.features(samples, distributed=num_ranks() > 1)
    if is_first_rank():
        features.save(folder / f"features_{file_name(model.name)}_{file_name(samples.name)}.safetensors")
    return features


def save_comparison(comparison: Comparison, heatmaps: Mapping[str, Figure], folder: Path, name: str) -> dict[str, str]:
    """Write the matrices as safetensors, and the heatmap; returns descriptions of pictures by file name."""
    held = {key: np.ascontiguousarray(value) for key, value in comparison.arrays().items()}
    with written_whole(folder / f"{name}.safetensors") as partial:
        save_file(held, partial)
    plots.save_figure(heatmaps["values"], folder / name, FORMATS)
    models = f"{comparison.model_a} (rows) and {comparison.model_b} (columns)"
    pictures = {f"{name}.svg": f"{label(comparison)}: every layer of {models}"}
    if "excess" in heatmaps:
        plots.save_figure(heatmaps["excess"], folder / f"{name}_excess", FORMATS)
        pictures[f"{name}_excess.svg"] = (
            f"{label(comparison)}: the excess over chance, 0 up to what unrelated samples reach, 1 for equal features"
        )
    if comparison.has_counterparts and not comparison.is_with_itself:
        rows = comparison.diagonal()
        bands = None
        if comparison.low is not None and comparison.high is not None:
            bands = {"value": (np.diagonal(comparison.low), np.diagonal(comparison.high))}
        figure, _ = plots.layer_trend(
            {"value": [row["value"] for row in rows]}, comparison.layers_a, bands=bands, ylabel=label(comparison),
            title=f"{comparison.model_a} and {comparison.model_b}: each layer with its counterpart",
            limits=limits(comparison),
        )  # fmt: skip
        plots.save_figure(figure, folder / f"{name}_diagonal", FORMATS)
        about = "" if comparison.settings.debiased else " about the debiased CKA"
        band = f"; the band is the {100 * comparison.settings.level:g} % interval{about}" if bands else ""
        pictures[f"{name}_diagonal.svg"] = f"The diagonal: each layer with its counterpart{band}"
    return pictures


def best_by_chance(comparison: Comparison) -> list[str]:
    """Returns a sentence on the best pair of layers, where scores are calibrated."""
    calibration, settings = comparison.calibration, comparison.settings
    if calibration is None or calibration.best is None:
        return []
    best = calibration.best
    where = f"{comparison.layers_a[best.row]} with {comparison.layers_b[best.column]}"
    by_moments = settings.null == "moments"
    null = "the moments of all permutations" if by_moments else f"{settings.num_permutations} permutations"
    value = comparison.values[best.row, best.column]
    return [
        f"Best of all pairs: {where}, {value:.4f}; p = {best.p_value:.4g} and excess {best.excess:.4f} against the "
        f"best of all pairs by chance ({null}, quantile {settings.level:g})."
    ]


def label(comparison: Comparison) -> str:
    """What the numbers are."""
    settings = comparison.settings
    return {
        "cka": "CKA, debiased" if settings.debiased else "CKA",
        "minibatch_cka": f"minibatch CKA, batches of {settings.batch_size}",
        "rbf_cka": "RBF CKA, debiased" if settings.debiased else "RBF CKA",
        "rsa": f"RSA ({settings.distance}, {settings.comparison})",
        "sampled_features_cka": "CKA, sampled features",
        "procrustes": "Procrustes distance",
        "svcca": f"SVCCA, {settings.variance:g} of the variance",
        "pwcca": "PWCCA",
        "mutual_knn": f"mutual {settings.num_neighbours}-nearest neighbours",
        "cknna": f"CKNNA, {settings.num_neighbours} neighbours",
    }[settings.measure]


def limits(comparison: Comparison) -> tuple[float, float]:
    """Of the colours: [0, 1] for similarities, [0, 2] for the Procrustes distance."""
    return (0.0, 2.0) if comparison.settings.measure == "procrustes" else (0.0, 1.0)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers by name."""
    return {
        "model_a": comparison.model_a, "model_b": comparison.model_b, "data": comparison.data,
        "num_samples": comparison.num_samples, "num_repeated": comparison.num_repeated,
        "settings": vars(comparison.settings),
        "layers_a": comparison.layers_a, "layers_b": comparison.layers_b,
        "low": None, "high": None, "p": None, **comparison.arrays(),
        "best": None if comparison.calibration is None else _best_as_json(comparison),
        "ranks_a": comparison.ranks_a, "ranks_b": comparison.ranks_b,
    }  # fmt: skip


def _best_as_json(comparison: Comparison) -> dict[str, Any] | None:
    best = comparison.calibration.best if comparison.calibration is not None else None
    if best is None:
        return None
    layers = {"layer_a": comparison.layers_a[best.row], "layer_b": comparison.layers_b[best.column]}
    return {
        **layers,
        "value": float(comparison.values[best.row, best.column]),
        "p": best.p_value,
        "excess": best.excess,
    }


def print_table(title: str, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table of rows with the same keys."""
    if "layer" in rows[0]:
        names = plots.short_names([str(row["layer"]) for row in rows])
        rows = [{**row, "layer": name} for row, name in zip(rows, names, strict=True)]
    table = Table(title=title)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
