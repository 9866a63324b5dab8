"""What a command says on stderr: a line each, with the nearest names, and of several processes by the first alone."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

USAGE, DATA = 2, 1  # exit statuses: what was typed can't be right, or what it names


def note(message: str) -> None:
    """Say something that the user should know, and go on."""
    if _speaks():
        print(f"note: {message}", file=sys.stderr)


def fail(message: str, status: int) -> NoReturn:
    """Say what went wrong, and end the process."""
    if _speaks():
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
        print(f"{red}error: {message}{plain}", file=sys.stderr)
    sys.exit(status)


def without_noise() -> None:
    """Leave out what Lightning says that nobody can act on: tips to install other packages, and deprecations of what it
    uses itself.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_no_tip not in logger.filters:
        logger.addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=".*LeafSpec")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def num_ranks() -> int:
    """How many processes torchrun has started; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is the one that writes results, of those that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


def _speaks() -> bool:
    # Lightning's own launcher sets no RANK.
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that `name` may have been meant for, the likeliest first.

    Of dotted names, one with the same last part counts as near, however long the rest: `max_epochs` is
    `trainer.max_epochs`.
    """
    names = list(dict.fromkeys(names))
    leaf = name.rpartition(".")[2]
    same_leaf = [other for other in names if other.rpartition(".")[2] == leaf]
    return list(dict.fromkeys([*same_leaf, *get_close_matches(name, names, n=3)]))[:3]


def suggestion(name: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean ...?` with the near ones of `names`, behind `prefix`; or a full stop where none is near."""
    found = " or ".join(f"`{prefix}{other}`" for other in nearest(name, names))
    return f"; did you mean {found}?" if found else "."
