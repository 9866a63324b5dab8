"""`needs`: files that a command makes first where they are missing, each by a training with a config."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lit_cka.commands.configs import find_config
from lit_cka.commands.messages import num_ranks
from lit_cka.commands.parsing import Parser


def add_needs(parser: Parser) -> None:
    """Add the option."""
    parser.add_argument(
        "--needs",
        type=dict[str, str | list[str]],
        default={},
        help="Files to make first, if they aren't there: {path: train config}, or in place of the config a list of it "
        "and of options of `lit-cka fit`, such as [digits, --seed_everything=1].",
    )


def train_what_is_needed(needs: dict[str, str | list[str]]) -> None:
    """Train, one after the other, what isn't there.

    Raises:
        FileNotFoundError: if there is no such config, or it does not write the file by its `save_weights`.
        ValueError: if something is missing under torchrun, where several processes would train it.
    """
    missing = {path: [how] if isinstance(how, str) else how for path, how in needs.items() if not Path(path).is_file()}
    if missing and num_ranks() > 1:
        raise ValueError(
            f"Expected {next(iter(missing))!r} of `needs` to be there under torchrun, but it is missing: run the "
            "command "
            "once in a single process, which makes it."
        )
    configs = {
        path: find_config(config) for path, (config, *_) in missing.items()
    }  # an error before the first training
    for number, (path, (config, *options)) in enumerate(missing.items(), start=1):
        from lit_cka.commands import training

        counted = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
        Console(markup=False).rule(f"First{counted}: {' '.join([config, *options])}")
        where = [f"--save_weights={path}"] if isinstance(needs[path], list) else []
        training.main(["fit", "--config", configs[path], *options, *where])
        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected {config!r} to write {path!r} (`save_weights`), but it did not.")
