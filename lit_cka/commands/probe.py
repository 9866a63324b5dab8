"""`lit-cka probe`: where fine-tuning changed a model, and whether the change helped."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from rich.console import Console

from lit_cka import plots
from lit_cka.analysis.comparison import compare_features
from lit_cka.analysis.explanations import common_beginning, describe_measure, probe_columns
from lit_cka.analysis.layer_ranges import whole_short_names
from lit_cka.analysis.linear_probe import ProbeSettings
from lit_cka.analysis.page import Section, write_page
from lit_cka.analysis.probes import ProbeRow, advice, probe_layers
from lit_cka.analysis.settings import Settings
from lit_cka.commands.heatmap_options import HeatmapOptions, matrix_figures
from lit_cka.commands.messages import is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.commands.results import (
    FORMATS,
    Data,
    Model,
    all_features,
    as_json,
    label,
    print_table,
    save_comparison,
)
from lit_cka.commands.running import run
from lit_cka.files import versions, write_json


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka probe",
        description="Where fine-tuning changed a model, by CKA, and whether linear probes gained from the change.",
        example="lit-cka probe --config probe_digits",
    )
    parser.add_command_options()
    parser.add_argument(
        "--before",
        type=Model,
        required=True,
        help="The pretrained model: a TextModel or ImageModel of lit_cka.analysis.",
    )
    parser.add_argument("--after", type=Model, required=True, help="The fine-tuned model.")
    parser.add_argument("--data", type=Data, required=True, help="Samples with labels.")
    parser.add_class_arguments(ProbeSettings)
    parser.add_class_arguments(Settings, "settings")
    parser.add_argument("--output", type=str, required=True, help="Folder for the results.")
    parser.add_argument("--title", type=str, default="Where fine-tuning changed the model", help="Of the report.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> list[ProbeRow]:
    """Run the command."""
    return run(parser(), args, _probe)


def _probe(options: Any, config: dict[str, Any]) -> list[ProbeRow]:
    folder = Path(options.output)
    probe_settings = ProbeSettings(**{field.name: options[field.name] for field in fields(ProbeSettings)})
    ((before, after),) = all_features([options.before, options.after], [options.data], folder)
    if not is_first_rank():
        return []
    rows = probe_layers(before, after, settings=probe_settings, debiased=options.settings.debiased)
    comparison = compare_features(before, after, options.settings)
    pictures = save_comparison(comparison, matrix_figures(comparison, HeatmapOptions()), folder, "matrix")
    figure, _ = plots.probe_figure(
        [row.layer for row in rows],
        [row.cka for row in rows],
        [row.accuracy_before for row in rows],
        [row.accuracy_after for row in rows],
        errors=([row.error_before for row in rows], [row.error_after for row in rows]),
        names=(before.model, after.model),
        title=f"{before.data}, n = {before.num_samples}",
    )
    plots.save_figure(figure, folder / "probe", FORMATS)
    names = whole_short_names(comparison.layers_a)
    table = [
        {
            "layer": name, "CKA": row.cka, f"accuracy, {before.model}": row.accuracy_before,
            f"accuracy, {after.model}": row.accuracy_after,
            "difference": f"{row.difference:+.3f} ± {row.error_difference:.3f}", "verdict": row.verdict,
        }
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    said = advice(rows)
    write_json(
        folder / "probe.json",
        {
            "config": config, "versions": versions(), "layers": [asdict(row) for row in rows], "advice": said,
            "comparison": as_json(comparison),
        },
    )  # fmt: skip
    said_of_matrix = (
        f"{label(comparison)}. {describe_measure(comparison.settings.measure, comparison.settings.debiased)}"
    )
    explanations = probe_columns(
        before, after, probe_settings, debiased=options.settings.debiased,
        beginning=common_beginning(comparison.layers_a, names),
    )  # fmt: skip
    sections = [
        Section(
            "Did it change, and did the change help?", [said], table,
            {"probe.svg": "CKA, and the accuracy of the probes before and after; bands are standard errors over folds"},
            explanations=explanations,
        ),
        Section("Every layer with every layer", [said_of_matrix], images=pictures),
    ]  # fmt: skip
    page = write_page(folder, options.title, sections, about=f"{before.data}, n = {before.num_samples} samples.")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    print_table(f"{before.data}, n = {before.num_samples}", table, console)
    console.print(said)
    console.print(f"Report: {page}")
    return rows
