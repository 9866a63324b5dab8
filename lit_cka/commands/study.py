"""`lit-cka study`: many fine-tuned checkpoints, edits and test sets in one run that can be gone on with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from rich import box
from rich.console import Console
from rich.table import Table

from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.hub import offline_if_unreachable
from lit_cka.commands.messages import is_first_rank, note, without_noise
from lit_cka.commands.needs import add_needs, train_what_is_needed
from lit_cka.commands.parsing import Parser
from lit_cka.commands.running import plain_options
from lit_cka.files import require_writable
from lit_cka.study.report import describe_study, save_study
from lit_cka.study.study import Study, StudyResults
from lit_cka.study.table import POINTS

if TYPE_CHECKING:
    from lit_cka.study.statistics import Effect
    from lit_cka.study.summary import Row

_NOT_BRIEF = {
    *("study.include", "study.exclude", "study.keep_pretrained", "study.keep_finetuned", "study.weights"),
    *("study.min_rel_update", "study.shared", "study.layers"),
}


_SHORT = {
    "more than shrinkage": "more",
    "less than shrinkage": "less",
    "trades otherwise": "a trade",
    "not told from shrinkage": "not told",
    "is a shrinkage": "shrinkage",
    "enlarges the update": "larger",
    "two checkpoints needed": "",
}


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka study",
        description="Edit many fine-tuned checkpoints of one pretrained model in many ways, evaluate them on any "
        "number of test sets, and tell what each edit gains, and whether it is more than shrinkage. The same command "
        "goes on "
        "where it was stopped.",
        example="lit-cka study --config study_digits",
        brief=lambda option: option not in _NOT_BRIEF,
    )
    parser.add_command_options()
    parser.add_class_arguments(Study, "study")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True)
    parser.describe({"data": "A LightningDataModule with the test sets, by its class path; the first in-distribution."})
    parser.add_argument("--output", type=str, required=True, help="Folder for JSON, CSV, figures and a page.")
    parser.add_argument("--seed", type=int, default=0, help="Of all random numbers.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    add_needs(parser)
    return parser


def main(args: list[str]) -> StudyResults:
    """Run the command; an error that a user can mend is one line and exit status 1."""
    without_noise()
    options = parser()
    config = options.parse_args(args)
    plain = plain_options(options, config)
    with failing_in_a_line(plain):
        return _study(options, config, plain)


def _study(options: Parser, config: Namespace, plain: dict[str, Any]) -> StudyResults:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    require_writable("output", config.output)
    offline_if_unreachable(plain)
    objects = options.instantiate_classes(config)  # before the trainings: what is wrong with an edit is said at once
    train_what_is_needed(config.needs)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    study: Study = objects.study
    results = study.run(objects.data, config.output, options=plain, seed=config.seed, say=console.print)
    if is_first_rank():
        rows = save_study(config.output, results, {**plain, "working_directory": os.getcwd()})
        _print_rows(rows, len(results.checkpoints), console)
        for line in describe_study(results, rows)[:2]:
            console.print(line)
        for name, why in results.failed.items():
            note(f"{name} was left out. {why}")
        console.print(f"Report: {os.path.join(config.output, 'index.html')}")
    return results


def _print_rows(rows: list[Row], num_checkpoints: int, console: Console) -> None:
    table = Table(title="Gains in percentage points, +- half of the 95 % interval", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("edit", overflow="fold", min_width=11)
    for heading in ("in-\ndistribution", "shifted", f"wins\nof {num_checkpoints}", "over its\nshrinkage"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        if row.label != "pretrained" and row.kept is None:  # what they are compared with
            continue
        beyond = row.beyond_shifted
        table.add_row(
            row.label,
            _shown(row.gain_in_distribution),
            _shown(row.gain_shifted),
            str(row.gain_shifted.wins),
            "" if beyond is None else _shown(beyond),
            _SHORT.get(row.verdict, row.verdict),
        )
    console.print(table)


def _shown(effect: Effect) -> str:
    low, high = effect.over_both
    return f"{POINTS * effect.mean:+.1f}" + (f" +- {POINTS * (high - low) / 2:.1f}" if low == low else "")
