"""What is to be frozen, after each evaluation: `FreezeDecision`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

from typing_extensions import TypedDict

from lit_cka.control.convergence import LossWatch, num_converged
from lit_cka.control.freeze_options import FreezeOptions
from lit_cka.control.measurement import warn_of_few_samples


class FreezeEvent(TypedDict):
    """A change of what is frozen: an entry of `FreezeConverged.history`."""

    step: int  # optimizer steps taken before
    logged_step: int  # that the loggers have for it
    epoch: int
    num_frozen: int  # blocks, from then on
    blocks: list[str]  # that were frozen, or are trained again
    why: str  # "converged", or "the loss turned"


class FreezeDecision:
    """Knows how many blocks are frozen, how many should be, and why.

    Attributes:
        num_frozen: how many blocks are frozen.
        target: how many should be, as soon as an optimizer step is over.
        why: this was decided.
        history: what was frozen when.

    Args:
        options: of the callback.
    """

    def __init__(self, options: FreezeOptions) -> None:
        self._options = options
        self._watch = LossWatch(options.patience, options.min_delta, options.mode)
        self._waits_for_best = False
        self._num_seen = 0  # records
        self._num_before = 0  # records of when other blocks were frozen than now
        self.num_frozen = self.target = 0
        self.why = ""
        self.history: list[FreezeEvent] = []

    def has_to_look(self, records: Sequence[Any]) -> bool:
        """Returns whether there are records that were not there the last time."""
        return len(records) > self._num_seen

    def update(
        self, records: Sequence[Mapping[str, Any]], blocks: Sequence[str], most: int, monitored: float | None
    ) -> tuple[int, str]:
        """Returns how many blocks should be frozen, and why, once an evaluation is over.

        Args:
            records: of all evaluations, oldest first.
            blocks: names of the blocks in their order.
            most: how many may be frozen.
            monitored: the value that should not turn; None if there is none.
        """
        self._num_seen = len(records)
        has_turned = monitored is not None and self._watch.update(monitored)
        self._waits_for_best = self._waits_for_best and monitored != self._watch.best
        if has_turned and self.target:
            self._waits_for_best = True
            return 0, "the loss turned"
        if self._waits_for_best:
            return self.target, self.why
        options = self._options
        if options.policy is not None:
            count = _whole_number(options.policy(records, blocks))
        elif self.target:
            count = self.target  # what blocks change behind frozen ones says nothing of their share
        else:
            warn_of_few_samples(records[-1], "FreezeConverged")
            count = num_converged(records[self._num_before :], blocks, options.share, options.num_evaluations)
        return max(self.target, min(count, most)), "converged"

    def carried_out(self, step: int, logged_step: int, epoch: int, blocks: Sequence[str]) -> None:
        """Note that what should be frozen now is, and nothing else.

        Args:
            step: the number of optimizer steps before.
            logged_step: that the loggers have for it.
            epoch: the epoch.
            blocks: names of the blocks in their order.
        """
        first, end = sorted((self.num_frozen, self.target))
        self.num_frozen, self._num_before = self.target, self._num_seen
        self._watch.num_worse = 0
        self.history.append(
            FreezeEvent(step=step, logged_step=logged_step, epoch=epoch, num_frozen=self.target,
                        blocks=list(blocks[first:end]), why=self.why)
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Returns what it knows in primitives, for a checkpoint."""
        return {
            "num_frozen": self.num_frozen,
            "target": self.target,
            "why": self.why,
            "num_seen": self._num_seen,
            "num_before": self._num_before,
            "waits_for_best": self._waits_for_best,
            "watch": self._watch.state(),
            "history": [dict(event) for event in self.history],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.num_frozen, self.target, self.why = state["num_frozen"], state["target"], state["why"]
        self._num_seen, self._waits_for_best = state["num_seen"], state["waits_for_best"]
        self._num_before = state.get("num_before", self._num_seen)  # of older versions: all is measured anew
        self._watch.load(state["watch"])
        self.history = [cast(FreezeEvent, dict(event)) for event in state["history"]]


def _whole_number(count: object) -> int:
    try:
        return operator.index(count)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"Expected `policy` to return how many of the first blocks to freeze, a whole number, but got {count!r}."
        ) from None
