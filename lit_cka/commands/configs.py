"""`lit-cka configs`, and where a config is that an option names: in the working folder, or among those that ship."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lit_cka.commands.messages import DATA, USAGE, fail, note, suggestion
from lit_cka.files import write_text


def shipped() -> dict[str, Path]:
    """The configs that ship, by name: in the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    folder = next((each for each in (package / "configs", package.parent / "configs") if each.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> str:
    """The path of a config: the file `name` or `name`.yaml, else the one of this name that ships.

    `configs/NAME.yaml`, as in a checkout, is found among those that ship as well. A file wins over one that ships: it
    is the user's own, perhaps a copy that was changed; one line says so. Addresses and YAML in place of a path stay.

    Raises:
        FileNotFoundError: if there is neither.
        IsADirectoryError: if it is a folder, and no config of this name ships.
    """
    if "://" in name or "\n" in name or name.lstrip().startswith("{"):
        return name
    path, configs = Path(name), shipped()
    stem = path.stem if path.suffix == ".yaml" else path.name
    ours = configs.get(stem) if str(path.parent) in (".", "configs") else None
    theirs = next((each for each in (path, path.with_name(f"{path.name}.yaml")) if each.is_file()), None)
    if theirs is not None:
        if ours is not None and path.name == name and not theirs.samefile(ours):
            note(f"`{name}` is {theirs} of this folder, not the config of that name that ships ({ours}).")
        return str(theirs)
    if ours is not None:
        return str(ours)
    kind = "is a folder" if path.is_dir() else "there is none"
    hint = suggestion(stem, configs) + " `lit-cka configs` lists those that ship."
    if path.is_dir():
        raise IsADirectoryError(f"Expected a config file, but {name!r} {kind}{hint}")
    raise FileNotFoundError(f"Expected a config at {name!r}, but {kind}{hint}")


def description(path: Path) -> str:
    """The first line of comment of a config."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


def main(args: list[str]) -> list[str]:
    """Run the command: list the configs that ship, print one, or copy it."""
    parser = argparse.ArgumentParser(
        prog="lit-cka configs", description="The configs that ship: list them, print one, or copy it to change it."
    )
    parser.add_argument("name", nargs="?", help="the config to print")
    parser.add_argument("--copy", metavar="DIR", help="copy it to this folder instead; files there are kept")
    options = parser.parse_args(args)
    configs = shipped()
    if options.name is None:
        if options.copy is not None:
            fail("Expected the name of a config to copy; for example: lit-cka configs digits --copy .", USAGE)
        width = max(map(len, configs), default=0)
        _print("".join(f"{name:{width}}  {description(path)}\n" for name, path in configs.items()))
        return list(configs)
    name = Path(options.name).name.removesuffix(".yaml")
    if name not in configs:
        fail(f"Expected the name of a config that ships, but got {options.name!r}{suggestion(name, configs)}", USAGE)
    if options.copy is None:
        _print(configs[name].read_text(encoding="utf-8"))
    else:
        print(copy(configs[name], Path(options.copy)))
    return [name]


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `lit-cka configs | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def copy(config: Path, folder: Path) -> Path:
    """Copy a config into a folder, which is made if need be; a file of that name there stays, and ends the process."""
    target = folder / config.name
    if target.exists():
        fail(f"Expected a folder without {config.name}, but {str(target)!r} exists already.", DATA)
    try:
        return write_text(target, config.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"Expected `--copy` to be a folder to write to, but got {str(folder)!r}: {error.strerror}.", DATA)
