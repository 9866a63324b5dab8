"""Warnings for people: in one line, and by one process of several: `warn`."""

from __future__ import annotations

import warnings
from typing import Any

_SEEN: dict[Any, Any] = {}  # what Python keeps to show a warning once


def warn(message: str) -> None:
    """Warn, in the first process alone, and once for each text unless filters say otherwise.

    Python shows the line of source that warns below the text, which is ours and tells nothing; so there is none.

    Args:
        message: what happened, and what to do.
    """
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(_warn)(message)


def _warn(message: str) -> None:
    warnings.warn_explicit(message, UserWarning, filename="lit_cka", lineno=1, module="lit_cka", registry=_SEEN)
