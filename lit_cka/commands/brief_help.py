"""The help of a command on a screen or two: each option with the first sentence of what it is."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_cka.commands.parsing import Parser

_COLUMN = 32  # where the sentences begin
_IN_THE_LAST_LINE = ("--print_config", "--help.all", "--help")

# In place of Lightning's words, which are many.
TRAINER_HELP = {
    "trainer.accelerator": "Such as auto, cpu, gpu or mps.",
    "trainer.devices": "How many, or a list of indices.",
    "trainer.num_nodes": "How many machines.",
    "trainer.strategy": "Such as auto, ddp, fsdp or deepspeed.",
    "trainer.precision": "Such as 32-true, 16-mixed, bf16-mixed or bf16-true.",
    "trainer.deterministic": "Only algorithms of torch that give the same each time.",
    "trainer.logger": "A logger, or a list of them, by class path; false for none.",
    "trainer.callbacks": "A list of callbacks, by class path, such as lit_cka.CKACallback.",
    "trainer.max_epochs": "After how many epochs to stop.",
    "trainer.max_steps": "After how many optimizer steps to stop.",
    "trainer.limit_train_batches": "How many batches of an epoch to train on: a number, or a share.",
    "trainer.limit_val_batches": "How many batches to validate on: a number, or a share.",
    "trainer.limit_test_batches": "How many batches to test on: a number, or a share.",
    "trainer.default_root_dir": "Folder of logs and checkpoints.",
}


def brief_help(parser: Parser) -> str:
    """The command's own options first, then those of its groups, and where to find the rest."""
    width = max(min(shutil.get_terminal_size().columns, 120) - 1, _COLUMN + 20)
    lines = [f"usage: {parser.usage or f'{parser.prog} [options]'}", ""]
    lines += [*textwrap.wrap(parser.description or "", width), ""]
    shown = [action for action in parser._actions if _is_shown(parser, action)]
    groups: dict[str, list[argparse.Action]] = {}
    for action in shown:
        groups.setdefault(_name(action).rpartition(".")[0], []).append(action)
    for _, actions in sorted(groups.items(), key=lambda item: item[0] != ""):
        lines += [line for action in actions for line in _lines(action, width, action.dest in parser.required)] + [""]
    lines += [f"Every option, in full: {parser.prog} --help.all; as a config: --print_config."]
    return "\n".join([*lines, f"For example: {parser.example}"]) + "\n"


def _is_shown(parser: Parser, action: argparse.Action) -> bool:
    if not action.option_strings or action.help == argparse.SUPPRESS:
        return False
    name = _name(action)
    is_group = action.default == argparse.SUPPRESS  # `--settings CONFIG`, beside its members
    hidden = f"--{name}" in _IN_THE_LAST_LINE or name.endswith(".help") or is_group
    return not hidden and (parser.brief is None or parser.brief(name))


def _name(action: argparse.Action) -> str:
    return next((name for name in action.option_strings if name.startswith("--")), "--")[2:]


def _lines(action: argparse.Action, width: int, is_required: bool) -> list[str]:
    names = [name for name in action.option_strings if not name.endswith("+")]  # which appends to a list
    left = f"  {', '.join(names)}{_choices(action)}"
    right = textwrap.wrap(_sentence(action) + (" (required)" if is_required else _default(action)), width - _COLUMN)
    if len(left) >= _COLUMN:
        return [left, *(" " * _COLUMN + line for line in right)]
    return [(left.ljust(_COLUMN) + "".join(right[:1])).rstrip(), *(" " * _COLUMN + line for line in right[1:])]


def _choices(action: argparse.Action) -> str:
    """What the option takes, if that is one of a few words."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    listed = re.fullmatch(r"\{(.*)\}", metavar)  # of a Literal
    choices = list(map(str, action.choices)) if action.choices else listed[1].split(",") if listed else []
    return f" {'|'.join(choices)}" if 0 < len("|".join(choices)) < 40 and choices[:2] != ["true", "false"] else ""


def _sentence(action: argparse.Action) -> str:
    """The first sentence of what the option is."""
    said = " ".join(TRAINER_HELP.get(action.dest, action.help or "").split())
    first = re.split(r"(?<=[.;])\s", said, maxsplit=1)[0].rstrip(".;")
    return f"{first[:1].upper()}{first[1:]}"


def _default(action: Any) -> str:
    value = action.default
    if value in (None, argparse.SUPPRESS) or str(value) in ("()", "[]", "{}") or len(str(value)) > 30:
        return ""
    return f" ({str(value).lower() if isinstance(value, bool) else value})"
