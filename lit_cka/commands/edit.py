"""`lit-cka edit`: checkpoint files in, an edited checkpoint out."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.messages import is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.editing.artifacts import describe_edit
from lit_cka.editing.edits import NAMES
from lit_cka.editing.files import edit_files
from lit_cka.editing.parameter import ParameterRecord
from lit_cka.editing.settings import EditSettings
from lit_cka.functional.rank_rules import RULES

FILE_EDITS = [name for name in NAMES if name != "uniform_soup"]  # which takes more than two checkpoints
_PATTERNS = {
    "include": "to edit; all others stay fine-tuned",
    "exclude": "to leave fine-tuned",
    "keep_pretrained": "to take from the pretrained model",
    "keep_finetuned": "to leave fine-tuned whatever `include` says",
}


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka edit",
        description="Edit a fine-tuned checkpoint by MonoSoup or another way, file to file. A killed run goes on where "
        "it was; under torchrun, ranks share the work.",
        example="lit-cka edit --pretrained base.safetensors --finetuned tuned.safetensors --output edited.safetensors",
    )
    parser.add_command_options()
    files = "a safetensors file, a folder of `save_pretrained`, or a state dict of torch"
    parser.add_argument("--pretrained", type=str, required=True, help=f"W0: {files}.")
    parser.add_argument("--finetuned", type=str, required=True, help=f"W1: {files}.")
    parser.add_argument("--output", type=str, required=True, help="What to write: as `finetuned`, a file or a folder.")
    parser.add_argument(
        "--variant",
        type=str,
        default="monosoup",
        help=f"{', '.join(FILE_EDITS)}; or package.module:function of your own.",
    )
    parser.add_argument(
        "--options", type=dict[str, Any], default={}, help='Of another edit than MonoSoup, such as {"alpha": 0.5}.'
    )
    for name, text in _PATTERNS.items():
        parser.add_argument(f"--{name}", type=list[str], default=[], help=f"Patterns of parameters {text}.")
    parser.add_argument(
        "--rule",
        choices=tuple(RULES),
        default="effective_rank",
        help="What the high part is: effective_rank (also freevariance, vetterli), or energy (variance).",
    )
    parser.add_argument("--R", type=float, default=0.8, help="Share of the energy, for the rule `energy`.")
    parser.add_argument("--min_rel_update", type=float, default=1e-6, help="Weights that changed less stay.")
    parser.add_argument("--device", type=str | None, default=None, help="Where to compute, such as cuda.")
    parser.add_argument("--report", type=str | None, default=None, help="A .json or .csv file, what each weight got.")
    parser.add_argument("--allow_differences", type=bool, default=False, help="Let tensors that differ in shape be.")
    parser.add_argument(
        "--trusted", type=bool, default=False, help="Unpickle the files: this runs code that their authors chose."
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="Which of several sets in a file, such as state_dict_ema."
    )
    return parser


def main(args: list[str]) -> list[ParameterRecord]:
    """Run the command; an error that a user can mend is one line and exit status 1."""
    config = parser().parse_args(args)
    with failing_in_a_line():
        records = edit_files(
            config.pretrained,
            config.finetuned,
            config.output,
            EditSettings(
                config.rule, config.R, config.min_rel_update, **{name: tuple(config[name]) for name in _PATTERNS}
            ),
            variant=config.variant,
            options=config.options,
            device=config.device,
            report=config.report,
            allow_differences=config.allow_differences,
            trusted=config.trusted,
            weights=config.weights,
        )
    if is_first_rank():
        Console(soft_wrap=True, highlight=False, markup=False).print(
            f"{describe_edit(records, config.variant)}\n{config.variant}: {config.output}"
        )
    return records
