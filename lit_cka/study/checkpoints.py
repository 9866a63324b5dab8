"""The fine-tuned checkpoints of a study: found by patterns, called by short names, known by what they are."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}


class Checkpoint(NamedTuple):
    """A fine-tuned model of a study."""

    name: str  # as short as tells it from the others
    path: str

    def identity(self) -> list[int]:
        """Returns by what it is found to be another one: its size in bytes and when it was written, of a folder the
        sum and the latest of its files.

        Raises:
            OSError: if it is not there.
        """
        path = Path(self.path)
        files = [path, *(each for each in path.rglob("*") if each.is_file())] if path.is_dir() else [path]
        stats = [each.stat() for each in files]
        return [sum(each.st_size for each in stats), max(each.st_mtime_ns for each in stats)]


def find_checkpoints(patterns: Sequence[str], pretrained: str) -> list[Checkpoint]:
    """Returns the checkpoints that the patterns match, each once, in the order of the patterns and of numbers in names.

    Args:
        patterns: paths of files or folders, in which `*`, `?` and `[...]` may stand, `**` for folders.
        pretrained: what is left out where a pattern with such signs matches it.

    Raises:
        FileNotFoundError: if a pattern matches nothing; the message names the nearest file.
        ValueError: if there is no pattern, or the pretrained model is among those named in full.
    """
    if not patterns:
        raise ValueError("Expected `checkpoints` to name fine-tuned checkpoints, but it is empty.")
    found: dict[str, str] = {}  # by the real path
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.exists(pattern)
        paths = sorted(glob.glob(pattern, recursive=True), key=_with_numbers) if is_glob else [pattern]
        paths = [path for path in paths if os.path.exists(path)]
        if not paths:
            raise FileNotFoundError(
                f"Expected {pattern!r} in `checkpoints` to be there, but nothing is.{_near(pattern)}"
            )
        for path in paths:
            if os.path.realpath(path) != os.path.realpath(pretrained):
                found.setdefault(os.path.realpath(path), path)
            elif not is_glob:
                raise ValueError(f"Expected fine-tuned models in `checkpoints`, but {path!r} is the pretrained one.")
    if not found:
        raise ValueError(
            f"Expected fine-tuned models in `checkpoints`, but {list(patterns)} match the pretrained alone."
        )
    return [Checkpoint(name, path) for name, path in zip(_names(list(found.values())), found.values(), strict=True)]


def _with_numbers(path: str) -> list[tuple[int, str]]:
    """Returns a key that puts `model_9` before `model_10`."""
    import re

    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _names(paths: Sequence[str]) -> list[str]:
    """Returns the ends of the paths that tell them apart, without what all end with if it is a usual suffix."""
    suffixes = {Path(path).suffix for path in paths}
    plain = [str(Path(path).with_suffix("")) if suffixes <= _SUFFIXES else path for path in paths]
    if len(set(plain)) < len(plain):
        plain = list(paths)
    parts = [Path(path).absolute().parts for path in plain]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [os.path.abspath(path) for path in paths]


def _near(pattern: str) -> str:
    folder = Path(pattern).parent
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(pattern).name, names, n=1, cutoff=0.5)
    if near:
        return f" There is {str(folder / near[0])!r}."
    return "" if folder.is_dir() else f" There is no folder {str(folder)!r}."
