"""Work shared out: over the cores of this machine, and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

import torch

Result = TypeVar("Result")


def one_thread_each(function: Callable[[str], Result], names: Sequence[str], *, enabled: bool) -> Iterator[Result]:
    """Yields `map(function, names)`, computed on as many cores as torch may use, with one thread for each call."""
    if not enabled:
        yield from map(function, names)
        return
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(function, names)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)  # parts of it are global


def share_out(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Returns a rank for each piece of work, so that all have about as much: the costliest first, to who has least."""
    loads, owners = [0.0] * num_ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[index]] += costs[index] + 1.0
    return owners


class MemoryBudget:
    """So many bytes, taken and given back by several threads."""

    def __init__(self, nbytes: int) -> None:
        self._free, self._given_back = nbytes, Condition()

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        with self._given_back:
            self._given_back.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._given_back:
                self._free += nbytes
                self._given_back.notify_all()
