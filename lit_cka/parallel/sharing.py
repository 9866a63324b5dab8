"""Work shared out: over the cores of this machine, and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, local
from typing import TypeVar

import torch

from lit_cka.functional.lapack import in_one_thread

Result = TypeVar("Result")


def one_thread_each(function: Callable[[str], Result], names: Sequence[str], *, enabled: bool) -> Iterator[Result]:
    """Yields `map(function, names)`, computed on as many cores as torch may use, with one thread for each call."""
    if not enabled:
        yield from map(function, names)
        return
    num_threads = torch.get_num_threads()
    try:
        with in_one_thread(), ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(function, names)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)  # parts of it are global


_STREAMS = 8  # of a GPU, which has room for so many factorisations of a few thousand rows at a time


def one_stream_each(function: Callable[[str], Result], names: Sequence[str], device: torch.device) -> Iterator[Result]:
    """Yields `map(function, names)`, of work for a GPU that leaves most of it idle, several calls at a time.

    Each call runs in a stream of its own, after all that is queued on the device's current one, and has ended there
    when it is yielded.
    """
    before = torch.cuda.Event()
    before.record(torch.cuda.current_stream(device))

    def run(name: str) -> Result:
        stream = _stream_of_thread(device)
        stream.wait_event(before)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            result = function(name)
            stream.synchronize()
        return result

    with ThreadPoolExecutor(_STREAMS) as pool:
        try:
            yield from pool.map(run, names)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = vars(_LOCAL).setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


_LOCAL = local()


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
