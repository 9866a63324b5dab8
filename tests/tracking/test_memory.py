"""What tracking takes on top of a bare fit, at its highest and in time, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.tracking.memory_worker import CASES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)


def measured(name: str) -> dict[str, Any]:
    """What the worker has seen; malloc gives back what is freed, so that the peak is what was in use."""
    environment = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/tracking/memory_worker.py"), name]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    seen: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert seen["n"] == CASES[name].num_samples
    assert len(seen["scores"]) == CASES[name].num_layers
    assert min(seen["scores"]) > 0.9
    return seen


def above_bare(seen: dict[str, Any]) -> int:
    return int(seen["tracked"]["growth"] - seen["bare"]["growth"])


@pytest.mark.slow
def test_there_is_no_second_model() -> None:
    """Of 12 layers with 192 MiB of weights, a tenth, besides the features."""
    case = CASES["heavy"]
    weights = 4 * case.num_layers * case.width**2
    assert weights == 192 * 2**20
    assert case.feature_bytes // 4 < above_bare(measured("heavy")) < weights / 10 + case.feature_bytes


@pytest.mark.slow
def test_wide_layers_of_few_samples_take_their_features() -> None:
    """At most 6 times the features of 128 samples of 4 layers, 4096 wide, and 0.5 s; moments would be 63 times that."""
    case, seen = CASES["wide"], measured("wide")
    assert case.feature_bytes == 32 * 2**20
    assert case.feature_bytes // 4 < above_bare(seen) < 6 * case.feature_bytes
    seconds = [median(seen[kind]["seconds"][1:]) for kind in ("tracked", "bare")]
    assert seconds[0] - seconds[1] < 0.5


@pytest.mark.slow
def test_many_wide_layers_fit_in_2_gibibytes() -> None:
    """32 layers, 4096 wide, of 512 samples: all that the process has, and the packages that it has loaded."""
    case, seen = CASES["deep and wide"], measured("deep and wide")
    assert case.feature_bytes == 2**30
    assert case.feature_bytes // 4 < above_bare(seen)
    assert seen["tracked"]["peak"] < 2**31
