"""What freezing has saved so far, in FLOPs and in seconds: `Savings`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from lit_cka.control.plan import FreezePlan

_MOST_TIMES = 200  # of steps of the same kind that are kept


class Savings:
    """Counts the steps with so many blocks frozen, and so many of them left out, and times them.

    Of FLOPs, a backward counts twice its forward: once for the gradients of the weights, once for those of the inputs.
    The time saved is, for each kind of step, the number of steps times the difference of the median step from the
    median of those without frozen blocks; on an accelerator, whose work goes on behind the clock, that is coarse.

    Attributes:
        num_steps: by (blocks frozen, blocks left out), how many steps there were.
    """

    def __init__(self) -> None:
        self.num_steps: dict[tuple[int, int], int] = {}
        self._seconds: dict[tuple[int, int], list[float]] = {}
        self._started: float | None = None

    def begin_step(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def end_step(self, num_frozen: int, num_skipped: int) -> None:
        """A step with so many blocks frozen has ended, of which so many were left out."""
        kind = num_frozen, num_skipped
        self.num_steps[kind] = self.num_steps.get(kind, 0) + 1
        times = self._seconds.setdefault(kind, [])
        if self._started is not None and len(times) < _MOST_TIMES:
            times.append(time.perf_counter() - self._started)
        self._started = None

    def flops(self, plan: FreezePlan) -> tuple[int, int]:
        """Returns the FLOPs that all steps took, and that they would have taken without freezing."""
        taken = sum(count * step_flops(plan, *kind) for kind, count in self.num_steps.items())
        return taken, sum(self.num_steps.values()) * step_flops(plan, 0, 0)

    def share_of_flops(self, plan: FreezePlan) -> float:
        """Returns the part of the FLOPs that was saved, in [0, 1)."""
        taken, full = self.flops(plan)
        return 1 - taken / full if full else 0.0

    def seconds(self) -> tuple[float, float]:
        """Returns the seconds that all steps took, by the medians, and that they would have taken without freezing."""
        medians = {kind: statistics.median(times) for kind, times in self._seconds.items() if times}
        whole = medians.get((0, 0), float("nan"))
        taken = sum(self.num_steps[kind] * median for kind, median in medians.items())
        return taken, sum(self.num_steps[kind] for kind in medians) * whole

    def state(self) -> dict[str, Any]:
        """Returns the counts and times in primitives, for a checkpoint."""
        steps = [[*kind, count, list(self._seconds.get(kind, []))] for kind, count in self.num_steps.items()]
        return {"steps": steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.num_steps = {(frozen, skipped): count for frozen, skipped, count, _ in state["steps"]}
        self._seconds = {(frozen, skipped): list(times) for frozen, skipped, _, times in state["steps"]}


def step_flops(plan: FreezePlan, num_frozen: int, num_skipped: int) -> int:
    """Returns the FLOPs of a step: forward of what is not left out, and twice that of what is trained, backward.

    Args:
        plan: with the FLOPs of each block's forward.
        num_frozen: the number of blocks that are frozen, together with what runs before the first.
        num_skipped: of these, how many are left out; what runs before them is not.
    """
    frozen = plan.flops_stem + plan.flops_within(num_frozen) if num_frozen else 0
    return plan.flops - plan.flops_within(num_skipped) + 2 * (plan.flops - frozen)
