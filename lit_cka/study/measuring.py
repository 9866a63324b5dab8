"""What a piece of work takes: seconds, and memory at its peak."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20
Result = TypeVar("Result")


class Cost(NamedTuple):
    """What a piece of work took."""

    seconds: float
    mebibytes: float | None  # above what was there before, what it returns included; None where it can't be told


def measured(function: Callable[[], Result], device: torch.device) -> tuple[Result, Cost]:
    """Returns what the function returns, and what it took.

    Memory is that of the GPU if the device is one; else the process's resident memory, whose peak Linux can reset
    (`/proc/self/clear_refs`). Memory that was freed before is given back to the system first, where the C library can.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: float | None = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    mebibytes = None if before is None or peak is None else max(peak - before, 0.0) / _MIB
    return result, Cost(seconds, mebibytes)


def _reset_peak() -> float | None:
    """Returns the resident memory in bytes, which is the peak from now on; None where that can't be."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:  # of glibc alone
        trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> float | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return None if found is None else 1024.0 * int(found[1])
