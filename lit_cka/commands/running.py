"""How a command runs: its options read, errors that a user can mend in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from lit_cka.parallel.ranks import Ranks

Result = TypeVar("Result")


def run(parser: ArgumentParser, args: list[str], command: Callable[[Any, dict[str, Any]], Result]) -> Result:
    """Parse `args`, and give the command its options, as objects and as they were written.

    A wrong value or a missing file ends the process with one line and status 1. Under torchrun, ranks share what the
    command lets them share; each has a GPU of its own, where there are GPUs.
    """
    import yaml

    config = parser.parse_args(args)
    if config.get("num_threads") is not None:
        torch.set_num_threads(config.num_threads)
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=True))
    plain.pop("config", None)
    if num_ranks() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        check_folder(config.output)
        with Ranks():
            return command(parser.instantiate_classes(config), plain)
    except (ValueError, OSError) as error:
        if is_first_rank():
            Console(stderr=True, soft_wrap=True, highlight=False).print(
                f"error: {_reason(error)}", style="red", markup=False
            )
        sys.exit(1)


def check_folder(output: str) -> None:
    """Raise a ValueError if there can't be a folder of results, rather now than after all the work."""
    path = Path(output).absolute()
    above = next(each for each in (path, *path.parents) if each.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"Expected `output` to be a folder that can be written to, but got {output!r}.")


def num_ranks() -> int:
    """How many processes torchrun has started; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _reason(error: Exception) -> str:
    """What went wrong in an object's constructor: jsonargparse lists that after the classes it could not be."""
    lines = str(error).splitlines()
    if not lines or not lines[0].startswith("Does not validate against any of the Union subtypes"):
        return str(error)
    tried = [line[4:] for line in lines if line.startswith("  - ")]
    reasons = [line for line in tried if "does not correspond to a subclass of" not in line]
    return reasons[0] if reasons else str(error)
