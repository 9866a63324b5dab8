"""A command's options: found configs, help that fits a screen, and an error in a line where something is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from typing_extensions import override

from lit_cka.commands.brief_help import brief_help
from lit_cka.commands.configs import find_config
from lit_cka.commands.given import GivenConfigs
from lit_cka.commands.messages import USAGE, fail, note
from lit_cka.commands.parse_errors import explain


class Parser(ArgumentParser):
    """jsonargparse's parser with a short help and errors of one line.

    Options can't be abbreviated: a typo in a name should be an error, not another option.

    Args:
        example: a command line that works, for the help and where a required option is left out.
        brief: says by name which options the short help shows; None for all.
        kwargs: as of `jsonargparse.ArgumentParser`.
    """

    def __init__(
        self, *args: Any, example: str = "", brief: Callable[[str], bool] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.example = example
        self.brief = brief
        self.configs = GivenConfigs()
        self.required: set[str] = set()

    def add_command_options(self, *names: str) -> None:
        """Add what every command has: `--config`, by further names if need be, and `--help.all`."""
        self.add_argument(
            *names, "--config", action=ConfigFile, metavar="NAME",
            help="A YAML file with these options, or a config that ships (`lit-cka configs` lists them). Of several, "
            "the later wins.",
        )  # fmt: skip
        self.add_argument("--help.all", action=_FullHelp, help="Show every option in full, and exit.")

    def describe(self, helps: Mapping[str, str]) -> None:
        """Put words of our own in place of those that came with options of another library."""
        for action in self._actions:
            action.help = helps.get(action.dest, action.help)

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        self.note_required()  # while jsonargparse parses, none is
        return super().parse_args(*args, **kwargs)

    def note_required(self) -> None:
        """Note which options are required, for the help, here and in subcommands."""
        self.required = {action.dest for action in self._actions if action.required}
        self.required |= getattr(self, "_extra_required_keys", set())  # classes, which jsonargparse keeps apart
        for parser in self._subcommands_action.choices.values() if self._subcommands_action else ():
            parser.note_required()

    @override
    def format_help(self, *args: Any) -> str:
        # Of a class, which is asked for by its name (`--model.help CLASS`), all is shown.
        return brief_help(self) if self.example else self.format_full_help()

    def format_full_help(self) -> str:
        """The help of jsonargparse, with all options, types and classes that may be named."""
        return super().format_help()

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class among the options: the command's parser says it
            super().error(message, ex)
        fail(explain(message, self.concerned(ex)), USAGE)

    def concerned(self, error: Exception | None) -> Parser:
        """The subcommand's parser, where there are subcommands: an error of its options may reach the one above."""
        commands = self._subcommands_action
        named = getattr(error, "subcommand_parser", None) or (commands and commands.choices.get(self.args[0]))
        return named if isinstance(named, Parser) else self


class ConfigFile(ActionConfigFile):
    """`--config`: a file of the working folder, or a config that ships; of several, the later wins.

    So it is in jsonargparse, and with options behind a config; a second config that changes a few things of the first
    is a common use, so that it is no error. But an overlap may be an oversight, and one line says who won.
    """

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = find_config(values)
            for line in parser.configs.add(path, [action.dest for action in parser._actions]):
                note(line)
        except (OSError, ValueError) as error:
            fail(str(error), USAGE)
        try:
            super().__call__(parser, cfg, path, option_string)  # type: ignore[no-untyped-call]
        except (OverflowError, RecursionError) as error:  # of numbers and nesting that no option has
            fail(f"Expected options in {path!r}, but got values that none takes: {error}.", USAGE)


class _FullHelp(argparse._HelpAction):
    @override
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_full_help(), end="")
        parser.exit()
