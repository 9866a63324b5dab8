"""`lit-cka plan`: how many samples it takes to see what two models differ in, from a pilot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console

from lit_cka.analysis.comparison import compare_features
from lit_cka.analysis.features import Features, matched
from lit_cka.analysis.page import Section, write_page
from lit_cka.analysis.settings import Settings
from lit_cka.analysis.uncertainty import repeated_samples
from lit_cka.commands.messages import is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.commands.results import Data, Model, feature_pairs, print_table
from lit_cka.commands.running import run
from lit_cka.files import versions, write_json
from lit_cka.functional.planning import plan_samples

_COLUMNS = {
    "layer": "Of the first model, with its counterpart in the second, or with the most similar layer there.",
    "CKA": "Of the pilot, debiased. 1: the same geometry; 0: unrelated.",
    "low": "Lower end of the pilot's own 95 % interval for the CKA of all such samples.",
    "high": "Upper end of it.",
    "n": "So many samples give an interval as narrow as asked, if they are like the pilot's.",
    "plain at n": "What the plain estimator, which is biased upward, is to be expected to give with n samples.",
}


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka plan",
        description="How many samples give intervals of CKA as narrow as asked, from a pilot of some hundred.",
        example="lit-cka plan --config plan_digits --width 0.02",
    )
    parser.add_command_options()
    parser.add_argument(
        "--models", type=list[Model], default=[], help="Two: TextModel or ImageModel of lit_cka.analysis."
    )
    parser.add_argument("--data", type=list[Data] | Data, default=[], help="The pilot.")
    parser.add_argument(
        "--features", type=str, nargs="+", default=[], help="In place of models and data: two files that were stored."
    )
    parser.add_argument("--width", type=float, default=0.05, help="Of the intervals: their upper end less the lower.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the results.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> list[dict[str, Any]]:
    """Run the command."""
    return run(parser(), args, _plan)


def _plan(options: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    folder = Path(options.output)
    pairs = feature_pairs(options, folder)
    if any(len(pair) < 2 for pair in pairs):
        raise ValueError("Expected two models to plan a comparison of, before and after say, but got one.")
    if not is_first_rank():
        return []
    rows = [row for pair in pairs for row in _rows(pair, options.width)]
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    pilot = pairs[0][0]
    heading = f"Samples for 95 % intervals of {options.width:g}, from a pilot of {pilot.num_samples}"
    print_table(heading, rows, console)
    said = _said(rows, options.width)
    console.print(said)
    write_json(folder / "plan.json", {"config": config, "versions": versions(), "layers": rows})
    section = Section(heading, [said], rows, explanations=_COLUMNS)
    page = write_page(folder, f"{pilot.model} and {pairs[0][1].model}: how many samples", [section])
    console.print(f"Report: {page}")
    return rows


def _rows(pair: list[Features], width: float) -> list[dict[str, Any]]:
    before, after = pair[0], matched(pair[0], pair[1])
    comparison = compare_features(before, after, Settings(intervals=False))
    too_sure = "intervals are too narrow, and more samples are needed than is said here"
    repeated_samples([*before.layers.values(), *after.layers.values()], before.data, too_sure)
    rows = []
    for index, name in enumerate(before.layers):
        other = name if comparison.has_counterparts else comparison.layers_b[int(comparison.values[index].argmax())]
        X, Y = (torch.as_tensor(each) for each in (before.layers[name], after.layers[other]))
        plan = plan_samples(X, Y, width=width)
        label = name if other == name else f"{name} with {other}"
        rows.append({
            "layer": label, "CKA": plan.cka, "low": plan.low, "high": plan.high, "n": plan.n, "plain at n": plan.plain,
        })  # fmt: skip
    return rows


def _said(rows: list[dict[str, Any]], width: float) -> str:
    needed = [row["n"] for row in rows if row["n"] is not None]
    if not needed:
        return "No number of samples does: CKA is undefined in all layers."
    hardest = max(rows, key=lambda row: row["n"] or 0)
    unknown = [row["layer"] for row in rows if row["n"] is None]
    text = (
        f"{max(needed):,} samples give every layer an interval of at most {width:g}: {hardest['layer']} takes so many."
    )
    return f"{text} Nothing is known of {', '.join(unknown)}, whose CKA is undefined." if unknown else text
