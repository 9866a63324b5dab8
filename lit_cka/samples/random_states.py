"""The global random states, left as they were: `preserved_rng`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Whether random numbers were drawn within `preserved_rng`."""

    any = False


@contextmanager
def preserved_rng() -> Iterator[Draws]:
    """Leave the random states of Python, NumPy, and torch (CPU and current GPU) as they were."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    draws, before = Draws(), _torch_states(devices)
    try:
        with torch.random.fork_rng(devices):
            yield draws
            same = all(map(torch.equal, before, _torch_states(devices)))
            same = same and all(map(np.array_equal, np.random.get_state(), states[1]))
            draws.any = not same or random.getstate() != states[0]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _torch_states(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
