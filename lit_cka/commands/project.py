"""`analyze.py project`: all layers of several models on several datasets in one interactive map."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from rich.console import Console

from lit_cka import plots
from lit_cka.analysis.comparison import Settings, compare_features
from lit_cka.analysis.features import Features
from lit_cka.analysis.page import Section, write_page
from lit_cka.analysis.projection import Projection, project
from lit_cka.commands.results import FORMATS, Data, Model, all_features, print_table
from lit_cka.commands.running import run
from lit_cka.output import versions, write_json
from lit_cka.plots.map_page import MapPoint, write_map


def parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="analyze.py project", description="A map of all layers of several models on several parallel datasets."
    )
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_argument("--models", type=list[Model], default=[], help="The models.")
    parser.add_argument("--data", type=list[Data], default=[], help="The datasets: the same samples said differently.")
    parser.add_argument("--features", type=list[str], default=[], help="In place of both: files that were stored.")
    parser.add_argument("--standardize", type=bool, default=False, help="Give every feature unit variance first.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the results.")
    parser.add_argument("--title", type=str, default="A map of layers", help="Of the report.")
    parser.add_argument("--num_threads", type=int | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> Projection:
    """Run the command."""
    return run(parser(), args, _project)


def _project(options: Any, config: dict[str, Any]) -> Projection:
    folder = Path(options.output)
    if bool(options.features) == bool(options.models):
        raise ValueError("Expected either `models` and `data`, or `features`.")
    features = [Features.load(path) for path in options.features]
    for data in options.data if options.models else ():
        features += all_features(options.models, data, folder)
    projection = project(features, standardize=options.standardize)
    write_json(folder / "projection.json", {"config": config, "versions": versions(), **asdict(projection)})
    pairs = _pair_table(projection)
    matrices, pictures = {}, {}
    for model in dict.fromkeys(each.model for each in features):
        other = [found for found in features if found.model == model]
        comparison = compare_features(other[0], other[-1], Settings(debiased=False))
        names = (f"{other[0].data}: ", f"{other[-1].data}: ") if len(other) > 1 else ("", "")
        matrices[model] = (
            comparison.values,
            [f"{names[0]}{layer}" for layer in comparison.layers_a],
            [f"{names[1]}{layer}" for layer in comparison.layers_b],
        )
    figure, _ = plots.side_by_side(
        {name: (values, _bare(rows), _bare(columns)) for name, (values, rows, columns) in matrices.items()},
        title=" and ".join(dict.fromkeys(each.data for each in features)), annotate=False,
    )  # fmt: skip
    plots.save_figure(figure, folder / "matrices", FORMATS)
    pictures["matrices.png"] = "CKA of every layer on one dataset with every layer on the other, by model"
    notes = _notes(projection)
    write_map(
        folder / "map.html",
        [MapPoint(point.model, point.dataset, point.layer, point.depth, point.position) for point in projection.points],
        title=options.title, explained=projection.explained, cka=np.asarray(projection.cka), matrices=matrices,
        notes=notes, tables={"Pairs of datasets": pairs} if pairs else {},
    )  # fmt: skip
    text = [f"{name}: {value}" for name, value in notes.items()]
    sections = [
        Section("The map", text, links={"map.html": "Open the interactive map"}),
        Section("The same samples said differently", table=pairs, images=pictures),
    ]
    page = write_page(folder, options.title, sections, about=f"n = {features[0].num_samples} samples.")
    console = Console(soft_wrap=True, highlight=False)
    if pairs:
        print_table("Pairs of datasets", pairs, console)
    for line in text:
        console.print(line)
    console.print(f"Map: {folder / 'map.html'}\nReport: {page}")
    return projection


def _bare(names: list[str]) -> list[str]:
    return [name.partition(": ")[2] or name for name in names]


def _pair_table(projection: Projection) -> list[dict[str, str | float]]:
    return [
        {
            "model": pairing.model, "datasets": " and ".join(pairing.datasets), "mean CKA": fmean(pairing.cka),
            "mean distance": fmean(pairing.distances),
            "spread of distances": stdev(pairing.distances) if len(pairing.distances) > 1 else 0.0,
            "Procrustes residual": pairing.residual, "relative residual": pairing.relative_residual,
        }
        for pairing in projection.pairings
    ]  # fmt: skip


def _notes(projection: Projection) -> dict[str, str]:
    def listed(values: list[float]) -> str:
        return ", ".join(f"PC{number} {value:.3f}" for number, value in enumerate(values, start=1))

    notes = {"explained variance": listed(projection.explained)}
    for name, values in projection.correlation.items():
        if len({getattr(point, name) for point in projection.points}) > 1:
            notes[f"correlation with the {name}"] = listed(values)
    if len({point.dataset for point in projection.points}) > 1:
        for model, values in projection.correlation_by_model.items():
            notes[f"correlation with the dataset, {model}"] = listed(values)
    return notes
