"""The configs that a command line names: what they set, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class GivenConfigs:
    """The configs given so far, in order."""

    def __init__(self) -> None:
        self._contents: dict[str, dict[str, Any]] = {}  # by path
        self._winners: dict[str, tuple[Any, str]] = {}  # by option, its value and the path that it is from

    def add(self, path: str, options: Sequence[str]) -> list[str]:
        """Read a config, and return a line for each earlier one that sets some of its options to other values.

        Args:
            path: of the config; addresses, and YAML in place of a path, are not looked into.
            options: the names of all options, by which a group of options is told from one whose value is a mapping.

        Raises:
            ValueError: if it holds no options in YAML.
            OSError: if it can't be read.
        """
        if not Path(path).is_file():
            return []
        self._contents[path] = _read(path)
        found = dict(_settings(self._contents[path], options))
        differing: dict[str, list[str]] = {}
        for key, value in found.items():
            earlier_value, earlier = self._winners.get(key, (value, path))
            if value != earlier_value:
                differing.setdefault(earlier, []).append(f"`{key}`")
        self._winners |= {key: (value, path) for key, value in found.items()}
        return [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: "
            f"{path} wins over {earlier}, since it comes later."
            for earlier, names in differing.items()
        ]

    def sources(self, key: str) -> list[str]:
        """The configs that mention a dotted name, as a whole or as the end of a longer one."""
        return [
            path
            for path, content in self._contents.items()
            if any(f".{name}".endswith(f".{key}") for name in _names(content))
        ]


def _read(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"Expected {path!r} to be YAML, but{line}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path!r} to be YAML, but it is no text.") from error
    except (ValueError, TypeError, RecursionError, OverflowError) as error:  # of dates, keys and numbers
        raise ValueError(f"Expected {path!r} to be YAML, but it is not: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path!r} to hold options, as `name: value`, but got {str(content)[:60]!r}.")
    return content


def _settings(content: dict[str, Any], options: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each option with its value: those of groups, and the arguments of classes, one by one."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and "class_path" in value:
            yield f"{key}.class_path", value["class_path"]
        if isinstance(value, dict) and ("class_path" in value or "init_args" in value):
            yield from _settings(value.get("init_args") or {}, (), f"{key}.init_args.")
        elif isinstance(value, dict) and any(option.startswith(f"{key}.") for option in options):
            yield from _settings(value, options, f"{key}.")
        else:
            yield key, value


def _names(value: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every key, through the items of lists as well."""
    items = value.items() if isinstance(value, dict) else ()
    for name, inner in items:
        yield f"{prefix}{name}"
        yield from _names(inner, f"{prefix}{name}.")
    for inner in value if isinstance(value, list) else ():
        yield from _names(inner, prefix)
