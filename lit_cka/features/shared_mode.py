"""A mode that several objects hold at once, and let go of in any order: `SharedMode`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Generic, TypeVar

Holder = TypeVar("Holder")


class SharedMode(Generic[Holder]):
    """Enters a context for the first of its holders, and leaves it after the last, in whatever order they come and go.

    A context has to be left before those that were entered before it. Callbacks of one trainer do not do that: the
    first to begin is the first to end.

    Args:
        context: makes the context; none is entered by default.

    Attributes:
        holders: those that hold the mode now, in the order in which they began.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._make_context = context
        self._entered = ExitStack()
        self.holders: list[Holder] = []

    def hold(self, holder: Holder) -> None:
        """Begin, if this holder has not yet."""
        if holder in self.holders:
            return
        if not self.holders:
            self._entered.enter_context(self._make_context())
        self.holders.append(holder)

    def release(self, holder: Holder) -> None:
        """End, if this holder has begun; for the last, everything is then as it was before the first."""
        if holder not in self.holders:
            return
        self.holders.remove(holder)
        if not self.holders:
            self._entered.close()
