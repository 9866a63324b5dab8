"""Errors that the user can mend, in a line; the others keep their traceback: bugs, and code of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lit_cka.commands.hub import chain, hub_failure
from lit_cka.commands.messages import DATA, fail

# Code that runs between a command and what went wrong, and is not the user's. What these libraries call is theirs.
_BETWEEN = {"lit_cka", "lightning", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics", "jsonargparse"}
_LIBRARIES = {
    "timm", "open_clip", "transformers", "tokenizers", "datasets", "huggingface_hub", "safetensors", "torchvision",
    "sklearn", "scipy", "numpy", "pandas", "pyarrow", "peft", "fsspec", "yaml", "PIL", "matplotlib", "tensorboard",
    "rich", "lazy_loader", "typing_extensions",
}  # fmt: skip


@contextmanager
def failing_in_a_line(options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While active, an error that the user can mend ends the process with a line on stderr and status 1.

    Those are values and files that can't be (ValueError, OSError and what Lightning calls a misconfiguration), names on
    a hub that can't be reached, and packages that aren't installed. An error is left as it is where code of the user's
    own is involved, which only a traceback can show, and where it is of a kind that no option should cause.

    Args:
        options: the command's, as a config holds them, to say which one takes a local folder instead.
    """
    try:
        yield
    except Exception as error:
        # jsonargparse raises an error of its own where the user's class can't be made, with that as the cause.
        is_of_user = any(_passes_user_code(each.__traceback__) for each in chain(error))
        reason = None if is_of_user else _reason(error, options or {})
        if reason is None:
            raise
        fail(reason, DATA)


def _reason(error: Exception, options: Mapping[str, Any]) -> str | None:
    hub = hub_failure(error, options)
    if hub is not None:
        return hub
    if isinstance(error, PermissionError):
        return (
            f"Expected access to {error.filename!r}, but got {error.strerror!r}: name another place by the options, or "
            "run in another folder."
        )
    is_bug = isinstance(error, ImportError) and str(error.name).partition(".")[0] == "lit_cka"
    # By name, since Lightning's need not be loaded.
    is_mendable = (
        isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ == "MisconfigurationException"
    )
    return _told(str(error)) if is_mendable and not is_bug else None


def _told(message: str) -> str:
    """What went wrong in an object's constructor: jsonargparse lists that after the classes it could not be."""
    lines = message.splitlines()
    if lines and lines[0].startswith("Does not validate against any of the Union subtypes"):
        tried = [line[4:] for line in lines if line.startswith("  - ")]
        reasons = [line for line in tried if "does not correspond to a subclass of" not in line]
        lines = reasons[:1] or lines
    return " ".join(" ".join(lines).split())


def _passes_user_code(traceback: TracebackType | None) -> bool:
    """Whether the calls that led to an error went through code that is neither ours nor of a library we use."""
    while traceback is not None:
        frame = traceback.tb_frame
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _LIBRARIES:
            return False
        if package not in _BETWEEN and package not in sys.stdlib_module_names:
            return True
        traceback = traceback.tb_next
    return False
