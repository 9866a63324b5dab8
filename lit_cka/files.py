"""What goes into files: JSON, whole or not at all, versions of packages, and names that any file system takes."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write a text file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write JSON, whole or not at all; numbers that aren't finite become null."""
    return write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def file_name(name: str) -> str:
    """A name of letters, digits, dashes and underscores, at most 60 bytes: three of them fit into a file's name."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return plain.encode()[:60].decode(errors="ignore") or "_"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
