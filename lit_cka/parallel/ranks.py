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


class Ranks:
    """The processes that torchrun started, or a process group that is there; else this process alone.

    Attributes:
        rank: this process's number.
        size: the number of processes.
    """

    def __enter__(self) -> Ranks:
        self.rank, self.size, self._is_own = 0, 1, False
        self._group: Any = None
        if not dist.is_available():
            return self
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
            self._is_own = True
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.group.WORLD if self._is_own else dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._group is not None:
            dist.destroy_process_group(None if self._is_own else self._group)

    def agree(self, function: Callable[[], Result]) -> Result:
        """What the function returns here, once it is through on all ranks; raises on all if it does on one."""
        results: list[Result] = []
        self.gather(lambda: results.append(function()))
        return results[0]

    def gather(self, function: Callable[[], Result]) -> list[Result]:
        """What the function returns on each rank; raises on all if it does on one."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        if self._group is None or self.size == 1:
            if error is not None:
                raise error
            return [result]  # type: ignore[list-item]  # there was no error
        told: list[Any] = [None] * self.size
        kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
        mine = (result, None if error is None else f"{type(error).__name__}: {error}", kind)
        dist.all_gather_object(told, mine, group=self._group)
        if error is not None:
            raise error
        for rank, (_, text, kind) in enumerate(told):
            if text is not None:
                raise kind(f"Rank {rank} failed with {text}")
        return [each for each, _, _ in told]
