"""Several processes at one job, on whose steps they agree: all go on, or all end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

_TIMEOUT = timedelta(days=1)  # a rank may be through with its share long before another
Result = TypeVar("Result")


def is_distributed() -> bool:
    """Returns whether this process is one of those of a process group of `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()


def run_on_all_ranks(function: Callable[[], Result], group: Any = None) -> list[Result]:
    """Returns what the function returns on each rank, in their order. An error on one rank is one on all ranks.

    Otherwise the others would wait, for as long as the process group has patience, for one that has ended. Every rank
    has to call it; a process that is alone calls the function and no more.

    Args:
        function: without arguments; what it returns has to be picklable where there are several ranks.
        group: the process group; None for the default one.

    Raises:
        ValueError: if the function raises one on another rank, with that rank's message.
        OSError: likewise.
        RuntimeError: if it raises anything else on another rank. On the rank itself, what it raises comes through.
    """
    num_ranks = dist.get_world_size(group) if is_distributed() else 1
    if num_ranks == 1:
        return [function()]
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    outcomes: list[Any] = [None] * num_ranks
    dist.all_gather_object(outcomes, (result, None if error is None else _for_others(error)), group=group)
    if error is not None:
        raise error
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            kind, message = problem
            raise kind(message if kind is not RuntimeError else f"Rank {rank} failed with {message}")
    return [result for result, _ in outcomes]


def agreed(function: Callable[[], Result], group: Any = None) -> Result:
    """Returns what the function returns here; an error on one rank is one on all, as for `run_on_all_ranks`."""
    results: list[Result] = []
    run_on_all_ranks(lambda: results.append(function()), group)
    return results[0]


def _for_others(error: Exception) -> tuple[type[Exception], str]:
    """Returns an error's kind and message for ranks that did not raise it: itself, it may not be picklable."""
    for kind in (ValueError, OSError):  # what a user has done or lacks, which the message says in full
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


class Ranks:
    """The processes that torchrun started, or a process group that is there; else this process alone.

    Attributes:
        rank: this process's number.
        size: the number of processes.
    """

    def __enter__(self) -> Ranks:
        self.rank, self.size, self._started_group = 0, 1, False
        self._group: Any = None
        if not dist.is_available():
            return self
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
            self._started_group = True
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.group.WORLD if self._started_group else dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._group is not None:
            dist.destroy_process_group(None if self._started_group else self._group)

    def agree(self, function: Callable[[], Result]) -> Result:
        """Returns what the function returns here, once it is through on all ranks; an error on one is one on all."""
        return agreed(function, self._group)

    def gather(self, function: Callable[[], Result]) -> list[Result]:
        """Returns what the function returns on each rank; an error on one is one on all. See `run_on_all_ranks`."""
        return run_on_all_ranks(function, self._group)
