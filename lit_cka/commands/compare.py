"""`lit-cka compare`: the layers x layers matrix of two models, or of one with itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from rich.console import Console

from lit_cka import plots
from lit_cka.analysis.comparison import Comparison, compare_features
from lit_cka.analysis.explanations import common_beginning, comparison_columns, describe_measure
from lit_cka.analysis.layer_ranges import whole_short_names
from lit_cka.analysis.page import Section, write_page
from lit_cka.analysis.settings import Settings
from lit_cka.commands.heatmap_options import HeatmapOptions, matrices_figure, matrix_figures
from lit_cka.commands.messages import is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.commands.results import (
    FORMATS,
    Data,
    Model,
    as_json,
    best_by_chance,
    feature_pairs,
    label,
    print_table,
    save_comparison,
)
from lit_cka.commands.running import run
from lit_cka.files import file_name, versions, write_json


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka compare",
        description="Compare two models, or one with itself: every layer with every layer, on the same samples.",
        example="lit-cka compare --config compare_digits",
    )
    parser.add_command_options()
    parser.add_argument(
        "--models", type=list[Model], default=[], help="One model, or two: TextModel or ImageModel of lit_cka.analysis."
    )
    parser.add_argument(
        "--data", type=list[Data] | Data, default=[], help="What they are compared on: one set, or several."
    )
    parser.add_argument(
        "--features",
        type=str,
        nargs="+",
        default=[],
        help="In place of models and data: one or two files that were stored.",
    )
    parser.add_class_arguments(Settings, "settings")
    parser.add_class_arguments(HeatmapOptions, "heatmap")
    parser.add_argument("--output", type=str, required=True, help="Folder for the results.")
    parser.add_argument("--title", type=str | None, default=None, help="Of the report.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> list[Comparison]:
    """Run the command."""
    return run(parser(), args, _compare)


def _compare(options: Any, config: dict[str, Any]) -> list[Comparison]:
    folder = Path(options.output)
    pairs = feature_pairs(options, folder)
    if not is_first_rank():
        return []
    for pair in pairs:
        options.heatmap.check_layers(pair[0], pair[-1])
    comparisons = [compare_features(pair[0], pair[-1], options.settings) for pair in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    sections = []
    if len(comparisons) > 1:
        sections.append(_overview(comparisons, folder, options.heatmap))
    for number, comparison in enumerate(comparisons):
        name = f"{number}_{file_name(comparison.model_a)}_{file_name(comparison.model_b)}_{file_name(comparison.data)}"
        pictures = save_comparison(comparison, matrix_figures(comparison, options.heatmap), folder, name)
        section = _section(comparison, pictures)
        sections.append(section)
        for line in best_by_chance(comparison):
            console.print(f"{section.heading}: {line}")
        if section.table:
            print_table(f"{section.heading}: {label(comparison)}, n = {comparison.num_samples}", section.table, console)
    write_json(
        folder / "comparison.json",
        {"config": config, "versions": versions(), "comparisons": [as_json(comparison) for comparison in comparisons]},
    )
    title = options.title or " and ".join(dict.fromkeys([comparisons[0].model_a, comparisons[0].model_b]))
    page = write_page(folder, title, sections, about="How similar the representations are, layer by layer.")
    console.print(f"Report: {page}")
    return comparisons


def _overview(comparisons: Sequence[Comparison], folder: Path, options: HeatmapOptions) -> Section:
    """Write the figure of all datasets, and return the part of the page that shows it."""
    plots.save_figure(matrices_figure(comparisons, options), folder / "all_datasets", FORMATS)
    caption = f"{label(comparisons[0])}: every layer with every layer, on each dataset, by the same colours"
    return Section("All datasets side by side", images={"all_datasets.svg": caption})


def _section(comparison: Comparison, pictures: dict[str, str]) -> Section:
    """Returns the part of the page on one dataset: each layer with its counterpart, and pictures."""
    settings, is_alone = comparison.settings, not comparison.has_counterparts or comparison.is_with_itself
    text = [f"{label(comparison)}; n = {comparison.num_samples} samples."]
    rows: list[dict[str, Any]] = []
    beginning = ""
    if not is_alone:
        shown = whole_short_names(comparison.layers_a)
        beginning = common_beginning(comparison.layers_a, shown)
        rows = [{**row, "layer": name} for name, row in zip(shown, comparison.diagonal(), strict=True)]
        text[0] += " The table is the diagonal of the matrix: each layer with its counterpart in the other model."
    else:
        text[0] += f" {describe_measure(settings.measure, settings.debiased)}"
    text += best_by_chance(comparison)
    heading = f"{comparison.model_a} and {comparison.model_b} on {comparison.data}"
    return Section(heading, text, rows, pictures, explanations=comparison_columns(comparison, beginning))
