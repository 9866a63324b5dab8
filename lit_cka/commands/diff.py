"""`lit-cka diff`: what differs between checkpoint files, tensor by tensor, without any model code."""

from __future__ import annotations

from argparse import SUPPRESS
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.messages import USAGE, fail, is_first_rank
from lit_cka.commands.parsing import Parser
from lit_cka.commands.running import plain_options
from lit_cka.files import require_writable

if TYPE_CHECKING:
    from rich.console import Console

    from lit_cka.editing.tensor_diff import Diff, TensorDiff

_SHOWN = 10  # tensors


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="lit-cka diff",
        description="What differs between checkpoints, tensor by tensor: from A, the base, to B, and to C if there are "
        "three. Each is a safetensors file, a folder of `save_pretrained`, or a state dict of torch.",
        example="lit-cka diff base.safetensors tuned.safetensors --output runs/diff",
        usage="lit-cka diff A B [C] [options]",
    )
    parser.add_command_options()
    # Without a default, which would win over what a config says.
    parser.add_argument(
        "checkpoints", type=str, nargs="*", default=SUPPRESS, help="A, the base, then B, and C if there are three."
    )
    parser.add_argument("--output", type=str | None, default=None, help="Folder for JSON, CSV, figures and a page.")
    parser.add_argument(
        "--spectra", type=bool, default=True, help="Compute ranks of the updates, which takes the most time."
    )
    parser.add_argument("--device", type=str | None, default=None, help="Where to compute, such as cuda.")
    parser.add_argument(
        "--trusted", type=bool, default=False, help="Unpickle the files: this runs code that their authors chose."
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="Which of several sets in a file, such as state_dict_ema."
    )
    parser.add_argument("--num_threads", type=PositiveInt | None, default=None, help="CPU threads for torch.")
    return parser


def main(args: list[str]) -> Diff | None:
    """Run the command; an error that a user can mend is one line and exit status 1."""
    options = parser()
    config = options.parse_args(args)
    checkpoints = config.get("checkpoints") or []
    if len(checkpoints) not in (2, 3):
        fail(
            f"Expected two checkpoints, or a base and two others, but got {len(checkpoints)}.\n"
            f"For example: {options.example}",
            USAGE,
        )
    if not is_first_rank():  # under torchrun, there is nothing to share
        return None
    with failing_in_a_line():
        return _diff(config, plain_options(options, config))


def _diff(config: Any, plain: dict[str, Any]) -> Diff:
    import torch
    from rich.console import Console

    from lit_cka.editing.diff_results import describe_diff, save_diff
    from lit_cka.editing.difference import diff_files

    if config.output is not None:
        _check_output(config.output, config.checkpoints)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    found = diff_files(
        *config.checkpoints,
        device=config.device,
        spectra=config.spectra,
        trusted=config.trusted,
        weights=config.weights,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    _print_changes(found, console)
    for line in describe_diff(found):
        console.print(line)
    if config.output is not None:
        console.print(f"Report: {save_diff(config.output, found, plain)}")
    return found


def _check_output(output: str, checkpoints: list[str]) -> None:
    """Raise a ValueError if there can't be such a folder, or if it would put files among a checkpoint's."""
    require_writable("output", output)
    place = Path(output).resolve()
    for checkpoint in checkpoints:
        if Path(checkpoint).resolve() in (place, *place.parents):
            raise ValueError(f"Expected `output` apart from the checkpoints, but got {output!r} and {checkpoint!r}.")


def _print_changes(found: Diff, console: Console) -> None:
    """Print the tensors that changed most, by their relative change in any of the checkpoints."""
    from rich import box
    from rich.table import Table

    from lit_cka.plots import short_names

    changes: dict[str, float] = {}
    for tensors in found.tensors:
        for each in tensors:
            if each["relative_change"]:
                changes[each["name"]] = max(changes.get(each["name"], 0.0), each["relative_change"])
    names = sorted(changes, key=lambda name: -changes[name])[:_SHOWN]
    if not names:
        return
    sides = [{each["name"]: each for each in tensors} for tensors in found.tensors]
    columns = {"relative_change": "change"}
    columns |= {"effective_rank": "eff. rank", "stable_rank": "stable rank"} if len(sides) == 1 else {}
    table = Table(title=f"The {len(names)} tensors that changed most, of {len(changes)}", box=box.SIMPLE_HEAD)
    table.add_column("tensor", overflow="fold")
    for label, heading in ((label, heading) for label in found.labels for heading in columns.values()):
        table.add_column(f"{heading} {label}" if len(sides) > 1 else heading, justify="right", no_wrap=True)
    if len(sides) > 1:
        table.add_column("cosine", justify="right", no_wrap=True)
    for name, shown in zip(names, short_names(names, 60), strict=True):
        numbers: list[float | None] = [_number(side.get(name), key) for side in sides for key in columns]
        numbers += [found.cosines.get(name)] if len(sides) > 1 else []
        table.add_row(shown, *("" if number is None else f"{number:.4g}" for number in numbers))
    console.print(table)


def _number(record: TensorDiff | None, key: str) -> float | None:
    return None if record is None else record[key]  # type: ignore[literal-required]
