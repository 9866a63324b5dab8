"""Trainings that take turns batch by batch, each with a clock of its own: `PacedFit`, `in_turns`.

A machine that others use as well is now fast, now slow, by more than what is to be seen. So all trainings run in one
process, each in a thread of its own of which one runs at a time: a batch of this one, a batch of that one, in random
order. A drift is then the same for all, and what is left is known from a training that is compared with its like.

Counted are the seconds that a thread was on the CPU, so that what else runs on the machine is not, and the seconds of
the wall. Torch is to compute in one thread (`--threads 1`), or what others do for it is not counted.
"""

from __future__ import annotations

import ctypes
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from workload import fit


class Seconds(NamedTuple):
    """Of the clock on the wall, and of one thread on the CPU."""

    wall: float
    cpu: float


class PacedFit:
    """A `fit` whose validations and recordings wait for their turn before they begin, and before every batch.

    Args:
        device: where it runs.
        options: of `workload.fit`.
    """

    def __init__(self, device: str, **options: Any) -> None:
        self._device, self._options = device, options
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._resumed = Seconds(0.0, 0.0)
        self._segments: list[Seconds] = []
        self._is_in_pass = False
        self._error: BaseException | None = None
        self.has_ended = False
        threading.Thread(target=self._fit, daemon=True).start()

    def _fit(self) -> None:
        self._go.acquire()
        try:
            with tempfile.TemporaryDirectory() as folder:
                fit(folder=Path(folder), around_pass=self._time, before_step=self._wait, device=self._device,
                    **self._options)  # fmt: skip
        except BaseException as error:
            self._error = error
        self.has_ended = True
        self._paused.release()

    def _clock(self) -> Seconds:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return Seconds(time.perf_counter(), time.thread_time())

    def _time(self, run: Callable[[], Any]) -> None:
        self._pause()
        self._segments, self._is_in_pass = [], True
        self._resumed = self._clock()
        run()
        self._note()
        self._is_in_pass = False
        self._pause()

    def _wait(self) -> None:
        if self._is_in_pass:
            self._note()
            self._pause()
            self._resumed = self._clock()

    def _note(self) -> None:
        now = self._clock()
        self._segments.append(Seconds(now.wall - self._resumed.wall, now.cpu - self._resumed.cpu))

    def _pause(self) -> None:
        self._paused.release()
        self._go.acquire()

    def advance(self) -> bool:
        """Run up to the next pause; whether a pass has come to its end there, or goes on."""
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._is_in_pass

    @property
    def seconds(self) -> Seconds:
        """What the last pass took: all that is between its beginning and its end, and nothing of other trainings."""
        return Seconds(sum(each.wall for each in self._segments), sum(each.cpu for each in self._segments))


def steady_malloc() -> None:
    """Have malloc serve all threads from one heap, as it does one thread, and keep what is freed: otherwise what it
    gives back to the system, and when, differs from one training to the next. To be called before there are threads.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


def in_turns(fits: Mapping[str, PacedFit], order: random.Random) -> dict[str, Seconds]:
    """Run the next pass of each fit, batch by batch in turns; what each took.

    Args:
        fits: by name. Each has to have one more pass.
        order: of the fits, anew for every batch.
    """
    for each in fits.values():
        each.advance()  # to the beginning of the pass
    going = list(fits.values())
    while going:
        order.shuffle(going)
        going = [each for each in going if each.advance()]
    return {name: each.seconds for name, each in fits.items()}
