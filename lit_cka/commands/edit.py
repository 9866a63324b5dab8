"""`analyze.py edit`: checkpoint files in, an edited checkpoint out."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser
from rich.console import Console

from lit_cka.commands.running import is_first_rank
from lit_cka.editing.artifacts import describe_edit
from lit_cka.editing.files import edit_files
from lit_cka.editing.parameter import EDITED, EditSettings, ParameterRecord
from lit_cka.functional.spectral import RULES


def parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="analyze.py edit",
        description="Edit a fine-tuned checkpoint by MonoSoup, file to file. A killed run goes on where it was; "
        "under torchrun, ranks share the work.",
    )
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    files = "a safetensors file, a folder of `save_pretrained`, or a state dict of torch"
    parser.add_argument("--pretrained", type=str, required=True, help=f"W0: {files}.")
    parser.add_argument("--finetuned", type=str, required=True, help=f"W1: {files}.")
    parser.add_argument("--output", type=str, required=True, help="What to write: as `finetuned`, a file or a folder.")
    parser.add_argument("--variant", choices=EDITED, default="monosoup")
    parser.add_argument("--rule", choices=tuple(RULES), default="effective_rank", help="What the high part is.")
    parser.add_argument("--R", type=float, default=0.8, help="Share of the energy, for the rule `energy`.")
    parser.add_argument("--min_rel_update", type=float, default=1e-6, help="Weights that changed less stay.")
    parser.add_argument("--device", type=str | None, default=None, help="Where to compute, such as cuda.")
    parser.add_argument("--report", type=str | None, default=None, help="A .json or .csv file, what each weight got.")
    parser.add_argument("--allow_differences", type=bool, default=False, help="Let tensors that differ in shape be.")
    parser.add_argument(
        "--trusted", type=bool, default=False, help="Unpickle the files: this runs code that their authors chose."
    )
    return parser


def main(args: list[str]) -> list[ParameterRecord]:
    """Run the command; an error that a user can mend is one line and exit status 1."""
    config = parser().parse_args(args)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        records = edit_files(
            config.pretrained,
            config.finetuned,
            config.output,
            EditSettings(config.rule, config.R, config.min_rel_update),
            variant=config.variant,
            device=config.device,
            report=config.report,
            allow_differences=config.allow_differences,
            trusted=config.trusted,
        )
    except (ValueError, OSError) as error:
        if is_first_rank():
            console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    if is_first_rank():
        Console(soft_wrap=True, highlight=False, markup=False).print(
            f"{describe_edit(records, config.variant)}\n{config.variant}: {config.output}"
        )
    return records
