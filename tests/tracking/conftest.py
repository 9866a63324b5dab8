from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable_and_fast() -> Iterator[None]:
    """One thread: on models this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    yield
    torch.set_num_threads(threads)
