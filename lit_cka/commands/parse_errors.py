"""What jsonargparse says about wrong options, in a line: what was expected, what came, and the nearest names."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from textwrap import dedent
from typing import TYPE_CHECKING

from lit_cka.commands.configs import shipped
from lit_cka.commands.messages import suggestion

if TYPE_CHECKING:
    from lit_cka.commands.parsing import Parser

_MOST = 300  # characters of what is passed on as it is
_EXPECTED = re.compile(
    r"^[\s-]*(?:Expected an?|Not of type) (?!path )(.*?)(?:\. Got value.*|: does not conform.*)?$", re.MULTILINE
)


def explain(message: str, parser: Parser) -> str:
    """The error of a parser as one line; with an example in a second one where something is missing."""
    for pattern, explanation in _KINDS.items():
        found = re.search(pattern, message, re.DOTALL)
        if found is not None:
            return explanation(found, parser)
    return _short(message)


def _unrecognized(found: re.Match[str], parser: Parser) -> str:
    arguments = found[1].split()
    unknown = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if unknown:
        near = _near(unknown[0].lstrip("-"), parser, prefix="--")
        return f"Expected an option of {parser.prog}, but got `{unknown[0]}`{near}"
    hint = f" Did you mean `--config {arguments[0]}`?" if arguments[0] in shipped() else ""
    return f"Expected options, `--name value`, but got {arguments[0]!r}.{hint}"


def _required(found: re.Match[str], parser: Parser) -> str:
    command = parser.prog.rpartition(" ")[2]
    names = [name.removeprefix(f"{command}.") for name in found[1].split(", ")]
    helps = {each.dest: re.split(r"\.(?:\s|$)", " ".join((each.help or "").split()))[0] for each in parser._actions}
    missing = [f"`--{name}` ({helps[name]})" if helps.get(name) else f"`--{name}`" for name in names]
    return f"Expected {', '.join(missing)}, but got none.\nFor example: {parser.example}"


def _not_accepted(found: re.Match[str], parser: Parser) -> str:
    """A key of a config that is no option: the shortest part of it that none begins with."""
    parts = [*filter(None, [found["group"]]), *found["key"].split(".")]
    starts = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    known = [f"{option}." for option in _options(parser)]
    unknown = next(
        (start for start in starts if not any(option.startswith(f"{start}.") for option in known)), starts[-1]
    )
    return f"Expected an option of {parser.prog}, but got `{unknown}`{_where(unknown, parser)}{_near(unknown, parser)}"


def _near(name: str, parser: Parser, prefix: str = "") -> str:
    options = _options(parser)
    groups = [option.rpartition(".")[0] for option in options if "." in option]
    return suggestion(name, [*options, *groups], prefix)


def _options(parser: Parser) -> list[str]:
    return [action.dest for action in parser._actions if action.option_strings and not action.dest.endswith("help")]


def _where(key: str, parser: Parser) -> str:
    sources = parser.configs.sources(key)
    return f" in {' and '.join(sources)}" if sources else ""


def _wrong_value(found: re.Match[str], parser: Parser) -> str:
    return _of_value(found[1], found[2], parser)


def _of_value(option: str, said: str, parser: Parser) -> str:
    """What is wrong with the value of an option: within the class that it names, or as a whole."""
    class_path, detail = _problem(said)
    if class_path is None:
        kinds = [_kind(kind) for kind in _EXPECTED.findall(said)]
        kinds = [kind for kind in dict.fromkeys(kinds) if kind != "a NoneType"]
        value = re.search(r"(?:Got value|Given value): (.*)", said)
        if kinds and value is not None:
            return _short(f"Expected `{option}` to be {' or '.join(kinds)}, but got {value[1]!r}.")
        return _short(f"Expected another value for `{option}`: {said}")
    if inner := re.match(r'Parser key "([^"]+)"[^:]*:\s*\n(.*)', detail, re.DOTALL):
        return _of_value(f"{option}.init_args.{inner[1]}", inner[2], parser)
    if unknown := re.match(r"Option '([^']+)' is not accepted", detail):
        where = f"{_where(unknown[1], parser)}{suggestion(unknown[1], _arguments(class_path))}"
        return f"Expected an argument of {class_path} in `{option}`, but got `{unknown[1]}`{where}"
    if missing := re.match(r"the following arguments are required: (.*)", detail):
        return f"Expected `{option}.init_args.{missing[1]}`, which {class_path} takes, but got none."
    module, _, name = class_path.rpartition(".")
    if re.search(r"no attribute|attribute \w+$", detail):
        near = suggestion(name, dir(import_module(module)))
        return f"Expected `{option}` to be a class, but {module!r} has no {name!r}{near}"
    return _short(f"Expected `{option}` to be a class, but could not use {class_path!r}: {detail}")


def _problem(said: str) -> tuple[str | None, str]:
    """The class that jsonargparse could not build a value for, and why: the lines that are indented further."""
    lines = said.splitlines()
    for index, line in enumerate(lines):
        found = re.search(r"Problem with given class_path '([^']+)':", line)
        if found is not None:
            rest = lines[index + 1 :]
            end = next((i for i, each in enumerate(rest) if len(each) - len(each.lstrip()) <= found.start()), len(rest))
            return found[1], dedent("\n".join(rest[:end])).strip()
    return None, ""


def _kind(kind: str) -> str:
    """A type as jsonargparse names it, in words."""
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {choices[1]}"
    if kind.startswith("dot import path"):
        return "a class path"
    name = re.sub(r"^<class '(?:\w+\.)*(\w+)'>$", r"\1", kind)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _arguments(class_path: str) -> list[str]:
    """The names of a class's arguments, those behind `**kwargs` included."""
    from jsonargparse import ArgumentParser

    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(import_module(module), name))
    return [action.dest for action in parser._actions]


def _argument(found: re.Match[str], parser: Parser) -> str:
    option, said = found[1], found[2]
    if choice := re.match(r"invalid choice: (.*?) \(choose from (.*)\)", said):
        return f"Expected `{option}` to be one of {choice[2]}, but got {choice[1]}."
    return (
        f"Expected a value for `{option}`, but got none."
        if said.startswith("expected")
        else _short(f"{option}: {said}")
    )


_KINDS: dict[str, Callable[[re.Match[str], Parser], str]] = {
    r"^unrecognized arguments: (.*)": _unrecognized,
    r"^the following arguments are required: (.*)": _required,
    r"^(?:Subcommand '\w+'|Group '(?P<group>[^']+)') does not accept option '(?P<key>[^']+)'": _not_accepted,
    r"^(?P<group>)Option '(?P<key>[^']+)' is not accepted": _not_accepted,
    r'^Parser key "([^"]+)"[^:]*:\s*\n(.*)': _wrong_value,
    r"^argument (\S+?): (.*)": _argument,
}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."
