"""`lit-cka project`: all layers of several models on several datasets in one interactive map."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jsonargparse.typing import PositiveInt
from numpy.typing import NDArray
from rich.console import Console

from lit_cka import plots
from lit_cka.analysis.explanations import COMPONENT_ROWS, PROCRUSTES_COLUMNS, pair_columns
from lit_cka.analysis.features import Features
from lit_cka.analysis.layer_ranges import whole_short_names
from lit_cka.analysis.page import Section, write_page
from lit_cka.analysis.projection import Projection, project
from lit_cka.commands.messages import is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.commands.results import FORMATS, Data, Model, all_features, print_table
from lit_cka.commands.running import run
from lit_cka.files import file_name, versions, write_json
from lit_cka.plots.map_page import MapPoint, write_map

_MAP = "The axes are the first three principal components of the layers' similarities (kernel PCA)."
_TABLES = {
    "Components": "What the map's axes show",
    "Procrustes": "Procrustes: one dataset's layers rotated onto the other's",
}
Matrix: TypeAlias = tuple[NDArray[np.float64], list[str], list[str]]  # values, names of the rows and of the columns


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka project",
        description="One interactive map of all layers of several models, on several datasets of the same samples.",
        example="lit-cka project --config project_digits",
    )
    parser.add_command_options()
    parser.add_argument(
        "--models", type=list[Model], default=[], help="The models: TextModel or ImageModel of lit_cka.analysis."
    )
    parser.add_argument(
        "--data", type=list[Data], default=[], help="The datasets: the same samples in another form, in the same order."
    )
    parser.add_argument("--features", type=str, nargs="+", default=[], help="In place of both: files that were stored.")
    parser.add_argument("--standardize", type=bool, default=False, help="Give every feature unit variance first.")
    parser.add_argument("--debiased", type=bool, default=True, help="Use the unbiased HSIC in CKA.")
    parser.add_argument(
        "--centre",
        type=bool,
        default=True,
        help="Measure signatures from their mean in the map. False for maps as published, whose first component is "
        "the "
        "mean.",
    )
    parser.add_argument("--output", type=str, required=True, help="Folder for the results.")
    parser.add_argument("--title", type=str, default="A map of layers", help="Of the report.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> Projection | None:
    """Run the command."""
    return run(parser(), args, _project)


def _project(options: Any, config: dict[str, Any]) -> Projection | None:
    folder = Path(options.output)
    if bool(options.features) == bool(options.models):
        raise ValueError("Expected either `models` and `data`, or `features`.")
    features = [Features.load(path) for path in options.features]
    if options.models:
        features = [each for of_set in all_features(options.models, options.data, folder) for each in of_set]
    if not is_first_rank():
        return None
    projection = project(features, standardize=options.standardize, debiased=options.debiased, centre=options.centre)
    write_json(folder / "projection.json", {"config": config, "versions": versions(), **asdict(projection)})
    pairs = _pair_table(projection)
    rotations = _procrustes_table(projection)
    matrices = _matrices(projection)
    label = "CKA, debiased" if options.debiased else "CKA"
    pictures = _draw(matrices, folder, label)
    estimator = label + " of standardised features" * options.standardize
    components = _component_table(projection)
    tables = {"Components": components, **({"Pairs of datasets": pairs, "Procrustes": rotations} if pairs else {})}
    write_map(
        folder / "map.html",
        _map_points(projection),
        title=options.title, explained=projection.explained, cka=np.asarray(projection.cka), matrices=_tabs(matrices),
        notes={"estimator": estimator}, tables=tables,
        explanations={
            **_component_rows(components),
            **pair_columns(features[0].num_samples, options.debiased),
            **PROCRUSTES_COLUMNS,
        },
    )  # fmt: skip
    num_samples = features[0].num_samples
    sections = [
        Section(
            "The map",
            [f"Each point is a layer of a model on a dataset; points that are close have similar representations. "
            f"{_MAP}"],
            components, explanations=_component_rows(components), frames={"map.html": "The interactive map"},
            links={"map.html": "The map alone, in the whole window"},
        ),
        Section(
            "One dataset against another", [f"estimator: {estimator}."] if pairs else [], pairs, pictures,
            explanations=pair_columns(num_samples, options.debiased),
        ),
    ]  # fmt: skip
    if rotations:
        said = (
            "What is left when a model's layers on one dataset, A, are rotated onto those on the other, B, as a whole."
        )
        title = "Does a rotation take one dataset's layers onto the other's?"
        sections.append(Section(title, [said], rotations, explanations=PROCRUSTES_COLUMNS))
    page = write_page(
        folder, options.title, sections, about=f"n = {num_samples} samples, the same in every dataset. {estimator}."
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for title, table in tables.items():
        print_table(_TABLES.get(title, title), table, console)
    console.print(f"estimator: {estimator}")
    console.print(f"Map: {folder / 'map.html'}\nReport: {page}")
    return projection


def _map_points(projection: Projection) -> list[MapPoint]:
    """Points whose layers are named as in the figures, without what all of a model's names begin with."""
    layers: dict[str, list[str]] = {}
    for point in projection.points:
        if point.layer not in layers.setdefault(point.model, []):
            layers[point.model].append(point.layer)
    short = {model: dict(zip(names, whole_short_names(names), strict=True)) for model, names in layers.items()}
    return [
        MapPoint(point.model, point.dataset, short[point.model][point.layer], point.depth, point.position)
        for point in projection.points
    ]


def _matrices(projection: Projection) -> dict[str, dict[tuple[str, str], Matrix]]:
    """By model and pair of datasets, CKA of all layers on the one with all on the other; of one, with itself."""
    rows: dict[str, dict[str, list[int]]] = {}
    for index, point in enumerate(projection.points):
        rows.setdefault(point.model, {}).setdefault(point.dataset, []).append(index)
    return {
        model: {
            (a, b): (
                projection.cka[np.ix_(of_data[a], of_data[b])],
                [projection.points[index].layer for index in of_data[a]],
                [projection.points[index].layer for index in of_data[b]],
            )
            for a, b in (combinations(of_data, 2) if len(of_data) > 1 else [(next(iter(of_data)),) * 2])
        }
        for model, of_data in rows.items()
    }


def _draw(matrices: dict[str, dict[tuple[str, str], Matrix]], folder: Path, label: str) -> dict[str, str]:
    """One figure of all models; for three datasets or more, one a model. Returns descriptions by file name."""
    if all(len(by_pair) == 1 for by_pair in matrices.values()):
        pairs = dict.fromkeys(pair for by_pair in matrices.values() for pair in by_pair)
        title = " and ".join(dict.fromkeys(name for pair in pairs for name in pair))
        figures = {"matrices": (title, {model: next(iter(by_pair.values())) for model, by_pair in matrices.items()})}
    else:
        figures = {
            f"matrices_{number}_{file_name(model)}": (
                model,
                {" and ".join(pair): matrix for pair, matrix in by_pair.items()},
            )
            for number, (model, by_pair) in enumerate(matrices.items())
        }
    pictures = {}
    for name, (title, shown) in figures.items():
        figure, _ = plots.side_by_side(shown, title=title, label=label, annotate=False)
        plots.save_figure(figure, folder / name, FORMATS)
        pictures[f"{name}.svg"] = f"{label}: every layer on one dataset (rows) with every layer on the other, {title}"
    return pictures


def _tabs(matrices: dict[str, dict[tuple[str, str], Matrix]]) -> dict[str, Matrix]:
    """The same by one name each, with layers that say which dataset they are on."""
    tabs = {}
    for model, by_pair in matrices.items():
        for (a, b), (values, rows, columns) in by_pair.items():
            starts = ("", "") if a == b else (f"{a}: ", f"{b}: ")
            named = (
                [f"{starts[0]}{layer}" for layer in whole_short_names(rows)],
                [f"{starts[1]}{layer}" for layer in whole_short_names(columns)],
            )
            tabs[model if len(by_pair) == 1 else f"{model}: {a} and {b}"] = (values, *named)
    return tabs


def _pair_table(projection: Projection) -> list[dict[str, str | float]]:
    models = list(dict.fromkeys(pairing.model for pairing in projection.pairings))
    return [
        {
            "model": pairing.model, "datasets": " and ".join(pairing.datasets), "mean CKA": float(np.mean(pairing.cka)),
            "mean distance": float(np.mean(pairing.distances)),
            "spread of distances": float(np.std(pairing.distances, ddof=1)) if len(pairing.distances) > 1 else 0.0,
        }
        for pairing in sorted(projection.pairings, key=lambda pairing: models.index(pairing.model))
    ]  # fmt: skip


def _procrustes_table(projection: Projection) -> list[dict[str, str | float]]:
    """A row for each space that the clouds of layers are rotated in, of each row of `_pair_table`."""
    models = list(dict.fromkeys(pairing.model for pairing in projection.pairings))
    return [
        {
            "model": pairing.model, "datasets": " and ".join(pairing.datasets), "space": space,
            "‖AR - B‖": found.residual, "‖AR - B‖²": found.squared_residual,
            "‖AR - B‖ / √(‖A‖² + ‖B‖²)": found.relative_residual,
            "‖AR - B‖² / (‖A‖² + ‖B‖²)": found.relative_squared_residual,
        }
        for pairing in sorted(projection.pairings, key=lambda pairing: models.index(pairing.model))
        for space, found in (("map", pairing.procrustes_in_map), ("signatures", pairing.procrustes_of_signatures))
    ]  # fmt: skip


def _component_table(projection: Projection) -> list[dict[str, str | float]]:
    """A row for each number that the map's three axes have: what it is, and its value for each axis."""
    found = {"explained variance": projection.explained}
    for name, values in projection.correlation.items():
        if len({getattr(point, name) for point in projection.points}) > 1:
            found[f"correlation with the {name}"] = values
    if len({point.dataset for point in projection.points}) > 1 and len(projection.correlation_by_model) > 1:
        for model, values in projection.correlation_by_model.items():
            found[f"correlation with the dataset, {model}"] = values
    return [
        {"axis": name, **{f"PC{number}": value for number, value in enumerate(values, start=1)}}
        for name, values in found.items()
    ]


def _component_rows(table: list[dict[str, str | float]]) -> dict[str, str]:
    """Returns a sentence for each row of `_component_table`."""
    within = "The same within one model."
    axes = {"axis": "PC1 to PC3 are the three axes of the map."}
    return axes | {str(row["axis"]): COMPONENT_ROWS.get(str(row["axis"]), within) for row in table}
