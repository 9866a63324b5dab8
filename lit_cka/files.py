"""Files that are written whole or not at all, what goes into them, and names that any file system takes."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PARTIAL = ".partial-"
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
_PACKAGES = (
    "lit-cka",
    "torch",
    "lightning",
    "torchmetrics",
    "timm",
    "open-clip-torch",
    "transformers",
    "numpy",
    "scipy",
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def written_whole(path: str | os.PathLike[str], *, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to: it becomes `path` when the block ends, and is removed if it fails.

    A file that was there is replaced. Nobody ever sees half of one: neither a reader nor the next run after a crash.

    Args:
        path: where the file or folder is to be; the folder around it is made where it is missing.
        durable: wait until the content is on the disk before it becomes `path`.
        new: replace nothing: what is at `path` by the end of the block stays, and that is a FileExistsError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path.name))
    try:
        yield partial
        if durable:
            sync(partial)
        place_new(partial, path) if new else os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def place_new(source: Path, target: Path) -> None:
    """Move a file or folder to where nothing is, at once: what has come into being there stays as it is.

    A folder also goes where an empty folder is, where the system lets it.

    Raises:
        FileExistsError: if something is there, be it a link that leads nowhere.
    """
    try:
        if source.is_dir():
            os.rename(source, target)  # onto nothing else than an empty folder
        else:
            _rename_file(source, target)
    except OSError as error:
        if error.errno in _TAKEN and os.path.lexists(target):
            raise FileExistsError(f"Expected a path to write to, but {str(target)!r} exists already.") from error
        raise


def _rename_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        target.open("xb").close()  # of a file system without links: what holds the place is replaced
        os.replace(source, target)
    else:
        os.unlink(source)


def existing_part(folder: str | os.PathLike[str]) -> Path:
    """Returns the nearest folder above, or this one, that there is; or what is in its place."""
    path = Path(folder).absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def require_writable(option: str, folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError if there can't be a folder to write to, rather now than after all the work."""
    path, above = Path(folder).absolute(), existing_part(folder)
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        below = "" if path == above else f" in {str(above)!r}, which can not"
        raise ValueError(f"Expected `{option}` to be a folder that can be written to, but got {str(folder)!r}{below}.")


def partial_name(name: str) -> str:
    """Returns a name for a file in the making that is to be called `name`.

    It is hidden, belongs to this call alone, and has the same suffix, by which some writers choose a format.
    """
    path = Path(name)
    return f"{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}-{path.stem[:40]}{path.suffix}"


def is_partial(path: Path) -> bool:
    """Returns whether the name is one of `partial_name`: what a process that was killed has left behind."""
    return path.name.startswith(_PARTIAL)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes, *, durable: bool = False, new: bool = False) -> Path:
    """Write a file, whole or not at all; returns its path. See `written_whole`."""
    with written_whole(path, durable=durable, new=new) as partial:
        partial.write_bytes(content)
    return Path(path)


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; returns its path."""
    return write_bytes(path, content.encode())


def write_json(path: str | os.PathLike[str], content: Any, *, durable: bool = False) -> Path:
    """Write JSON, whole or not at all; numbers that aren't finite become null. Returns the path."""
    return write_bytes(path, json_bytes(content), durable=durable)


def json_bytes(content: Any) -> bytes:
    """Returns JSON in UTF-8; numbers that aren't finite become null."""
    return (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode()


def visible(name: str) -> str:
    """Returns a name on one line, with escapes in place of what would not be seen: control and direction characters.

    Example:
        >>> visible("layer\\n1")
        'layer\\\\n1'
    """
    letters = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return "".join(letters)


def file_name(name: str) -> str:
    """Returns a name of letters, digits, dashes and underscores, of 60 bytes at most: three fit into a file's name."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return plain.encode()[:60].decode(errors="ignore") or "_"


def _plain(value: Any) -> Any:
    """Returns the value as dictionaries, lists, strings, numbers and None: what JSON has."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
