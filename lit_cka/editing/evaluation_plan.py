"""Which variants are evaluated, and on which test sets CKA is taken: `EvaluationPlan`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation measures.

    Args:
        variants: to evaluate; None for all.
        evaluate: measure accuracy and the like; False for CKA alone.
        cka_sets: names of the test sets to take CKA on; None for all, empty for none.
        max_cka_batches: of each of them; 0 for none, None for all.

    Raises:
        ValueError: if nothing is left to measure, or an option is out of range.
    """

    variants: Sequence[str] | None = None
    evaluate: bool = True
    cka_sets: Sequence[str] | None = None
    max_cka_batches: int | None = None

    def __post_init__(self) -> None:
        if self.max_cka_batches is not None and self.max_cka_batches < 0:
            raise ValueError(f"Expected `max_cka_batches` to be at least 0, or None, but got {self.max_cka_batches}.")
        for option in ("variants", "cka_sets"):
            if isinstance(getattr(self, option), str):
                object.__setattr__(self, option, (getattr(self, option),))
        if self.variants is not None and not self.variants:
            raise ValueError("Expected at least one variant in `variants`, or None for all, but got none.")
        if not self.evaluate and not self.takes_cka:
            raise ValueError("Expected something to measure, but `evaluate` is False and CKA is taken on no test set.")

    @property
    def takes_cka(self) -> bool:
        """Whether CKA is taken on any test set."""
        return self.max_cka_batches != 0 and (self.cka_sets is None or len(self.cka_sets) > 0)

    def takes_cka_on(self, test_set: str) -> bool:
        """Whether CKA is taken on this test set."""
        return self.takes_cka and (self.cka_sets is None or test_set in self.cka_sets)

    def evaluated(self, available: Sequence[str]) -> list[str]:
        """Returns the variants to evaluate, in the order of `available`.

        Raises:
            ValueError: if there is no such variant; the nearest is named.
        """
        _check("variants", self.variants, available, "variants")
        found = [name for name in available if self.variants is None or name in self.variants]
        if not self.evaluate and found == [available[0]]:
            raise ValueError(
                f"Expected variants to compare with {available[0]!r} by CKA, but `variants` names no other one."
            )
        return found

    def check_sets(self, names: Sequence[str]) -> None:
        """Raise a ValueError if CKA is to be taken on a test set that isn't there."""
        _check("cka_sets", self.cka_sets, names, "test sets")

    def max_batches(self, test_set: str) -> int | None:
        """Returns how many batches of a test set are needed, in one process; None for all."""
        if self.evaluate:
            return None
        return self.max_cka_batches if self.takes_cka_on(test_set) else 0


def _check(option: str, asked: Sequence[str] | None, available: Sequence[str], kind: str) -> None:
    for name in asked or ():
        if name not in available:
            near = difflib.get_close_matches(name, available, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Expected {kind} in `{option}` ({', '.join(available)}), but got {name!r}.{hint}")
