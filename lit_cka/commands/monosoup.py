"""`lit-cka monosoup`: edit, evaluate, draw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn

from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.hub import offline_if_unreachable
from lit_cka.commands.messages import note, without_noise
from lit_cka.commands.needs import add_needs, train_what_is_needed
from lit_cka.commands.parsing import Parser
from lit_cka.commands.running import plain_options
from lit_cka.editing.artifacts import print_results, save_results
from lit_cka.editing.editor import MonoSoupEditor
from lit_cka.files import require_writable

_TRAINER = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "logger",
)  # fmt: skip

_NOT_BRIEF = {
    *("trainer.num_nodes", "trainer.deterministic", "trainer.logger"),
    *("editor.include", "editor.exclude", "editor.keep_pretrained", "editor.keep_finetuned", "editor.weights"),
    *("editor.min_rel_update", "editor.sequential", "editor.shared"),
    *("editor.variants", "editor.evaluate", "editor.cka_sets", "editor.debiased"),
}


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka monosoup",
        description="Edit a fine-tuned model in memory, evaluate all variants on any number of test sets, and draw "
        "what came of it.",
        example="lit-cka monosoup --config monosoup_digits",
        brief=lambda option: option not in _NOT_BRIEF,
    )
    parser.add_command_options()
    parser.add_class_arguments(MonoSoupEditor, "editor")
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parser.describe({"data": "A LightningDataModule with the test sets, by its class path."})
    skip = {name for name in pl.Trainer.__init__.__annotations__ if name not in _TRAINER}
    parser.add_class_arguments(pl.Trainer, "trainer", skip=skip)
    # Of its own: `typing` may hand out Union[float, int] for the Union[int, float] of the Trainer, whichever a process
    # has made first, and 1 would become 1.0, which is all batches.
    parser.add_argument(
        "--trainer.limit_test_batches", type=int | float | None, default=None, help="A number, or a share from 0 to 1."
    )
    # All results go to `output`; and cuDNN and the like give the same bits each time, with a warning where they can't.
    parser.set_defaults({"trainer.logger": False, "trainer.deterministic": "warn"})
    parser.add_argument("--output", type=str, required=True, help="Folder for JSON, tables and pictures.")
    parser.add_argument("--export", type=dict[str, str], default={}, help="Variants to write: {monosoup: path}.")
    parser.add_argument("--plots", type=bool, default=True, help="Draw pictures; false for JSON and tables alone.")
    parser.add_argument("--seed", type=int, default=0, help="Of all random numbers.")
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    add_needs(parser)
    return parser


def main(args: list[str]) -> MonoSoupEditor:
    """Run the command; an error that a user can mend is one line and exit status 1."""
    without_noise()
    options = parser()
    config = options.parse_args(args)
    plain = plain_options(options, config)
    with failing_in_a_line(plain), _deterministic_meanwhile():
        editor = _monosoup(options, config, plain)
    return editor


@contextmanager
def _deterministic_meanwhile() -> Iterator[None]:
    """Put back afterwards what the trainer sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _monosoup(options: Parser, config: Namespace, plain: dict[str, Any]) -> MonoSoupEditor:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    for path in config.export.values():
        if os.path.lexists(path):
            raise ValueError(f"Expected paths to write to in `export`, but {path!r} exists already.")
        require_writable("export", Path(path).parent)
    if len({os.path.abspath(path) for path in config.export.values()}) < len(config.export):
        raise ValueError("Expected another path for each variant in `export`, but two have the same.")
    require_writable("output", config.output)
    train_what_is_needed(config.needs)
    offline_if_unreachable(plain)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    objects = _objects(options, config)
    trainer = objects.trainer
    editor: MonoSoupEditor = objects.editor
    unknown = sorted(set(config.export) - set(editor.variant_names))
    if unknown:
        raise ValueError(f"Expected variants in `export` ({', '.join(editor.variant_names)}), but got {unknown}.")
    written_config = {**plain, "working_directory": os.getcwd()}
    try:
        trainer.test(editor, datamodule=objects.data, verbose=False)
    except (KeyboardInterrupt, SystemExit):  # SIGTERM or Ctrl-C, and the trainer has cleaned up
        _report_unfinished(editor, objects, written_config)
        raise
    if editor.results is None:
        raise ValueError("Expected samples to test on, but there were none; see `limit_test_batches`.")
    _report(editor, objects, written_config)
    return editor


def _objects(options: Parser, config: Namespace) -> Any:
    """The editor, the data and the trainer."""
    try:
        return options.instantiate_classes(config)
    except ValueError:
        # Where a module can't be made, jsonargparse passes on the specification instead, and the editor can't use that:
        # this says what was wrong with the module.
        for name in ("pretrained", "finetuned", "model"):
            if isinstance(config.editor[name], Namespace):
                parser = Parser()
                parser.add_subclass_arguments(nn.Module, name)
                parser.instantiate_classes(Namespace({name: config.editor[name]}))  # type: ignore[no-untyped-call]
        raise


@rank_zero_only
def _report(editor: MonoSoupEditor, objects: Namespace, config: dict[str, Any]) -> None:
    assert editor.results is not None
    console = Console(soft_wrap=True, highlight=False)
    records = editor.edited.records
    written = save_results(
        objects.output, editor.results, records, config, seconds=editor.seconds, pictures=objects.plots
    )
    print_results(editor.results, records, console)
    for variant, path in objects.export.items():
        editor.export(variant, path)
        console.print(f"{variant}: {path}", markup=False)
    console.print(
        f"Results: {objects.output} ({', '.join(path.name for path in written if path.suffix != '.pdf')})", markup=False
    )


@rank_zero_only
def _report_unfinished(editor: MonoSoupEditor, objects: Namespace, config: dict[str, Any]) -> None:
    results = editor.results_so_far()
    if results is None:
        return
    save_results(
        objects.output, results, editor.edited.records, config,
        is_finished=False, seconds=editor.seconds, pictures=objects.plots,
    )  # fmt: skip
    print_results(results, editor.edited.records, Console(soft_wrap=True, highlight=False))
    samples = ", ".join(f"{number} of {name}" for name, number in results.num_samples.items())
    note(f"the evaluation was stopped; the results of {samples} are in {objects.output}.")
