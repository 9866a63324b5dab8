"""Seconds and memory of work whose size is known."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from lit_cka.study.measuring import measured


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory can be reset on Linux alone")
def test_the_peak_counts_and_not_what_is_left() -> None:
    """160 MiB for a while, of which 40 are returned; what was there before does not count."""
    before = torch.ones(30 * 2**18)

    def work() -> torch.Tensor:
        large = torch.ones(120 * 2**18)
        time.sleep(0.05)
        return large[: 40 * 2**18].clone()

    for _ in range(2):  # freed memory of the first time is no discount for the second
        result, cost = measured(work, torch.device("cpu"))
        assert result.numel() == 40 * 2**18
        assert 0.05 <= cost.seconds < 5
        assert cost.mebibytes == pytest.approx(160, abs=12)
    assert before.sum() == 30 * 2**18


def test_nothing_takes_next_to_nothing() -> None:
    result, cost = measured(lambda: 3, torch.device("cpu"))
    assert result == 3
    assert cost.mebibytes is None or cost.mebibytes < 8


@pytest.mark.gpu
def test_on_a_gpu_its_memory_counts() -> None:
    result, cost = measured(lambda: torch.ones(2**20, device="cuda") + 1, torch.device("cuda"))
    assert result.device.type == "cuda"
    assert cost.mebibytes == pytest.approx(8, abs=1)
