"""What an edit is told: how weights are split, and which parameters take part: `EditSettings`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_cka.features.layers import glob_regex
from lit_cka.functional.rank_rules import RankRule, check_rule

_PATTERNS = ("include", "exclude", "keep_pretrained", "keep_finetuned")


@dataclass(frozen=True)
class EditSettings:
    """How weights are split, and which.

    Args:
        rule: "effective_rank" (alias "freevariance", "vetterli") or "energy" (alias "variance").
        R: share of the energy that the high part reaches, in (0, 1]; for "energy" alone.
        min_rel_update: weights with a smaller relative change keep their fine-tuned value.
        include: patterns of the parameters to edit, all others stay fine-tuned; empty for all. `*` stays within a
            dotted segment, `**` crosses.
        exclude: patterns of parameters that stay fine-tuned.
        keep_pretrained: patterns of parameters to take from the pretrained model, included or not.
        keep_finetuned: patterns of parameters to leave fine-tuned, included or not.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> EditSettings(rule="energy", R=0.9, exclude=["head.*"]).R
        0.9
    """

    rule: RankRule = "effective_rank"
    R: float = 0.8
    min_rel_update: float = 1e-6
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    keep_pretrained: Sequence[str] = ()
    keep_finetuned: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_rule(self.rule, self.R)
        if not self.min_rel_update >= 0:
            raise ValueError(f"Expected `min_rel_update` to be at least 0, but got {self.min_rel_update}.")
        for name in _PATTERNS:
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))

    def of_monosoup(self) -> dict[str, str | float]:
        """Returns what other edits may share with MonoSoup."""
        return {"rule": self.rule, "R": self.R, "min_rel_update": self.min_rel_update}

    def fate(self, name: str) -> Literal["pretrained", "finetuned"] | None:
        """Returns as what a parameter is kept; None where it is to be edited."""
        if self._matches("keep_pretrained", name):
            return "pretrained"
        if self._matches("keep_finetuned", name) or self._matches("exclude", name):
            return "finetuned"
        return "finetuned" if self.include and not self._matches("include", name) else None

    def check_patterns(self, names: Collection[str]) -> None:
        """Raise a ValueError if a pattern matches none of the model's parameters, or one is to be kept as both."""
        for option in _PATTERNS:
            for pattern in getattr(self, option):
                if not any(glob_regex(pattern).fullmatch(name) for name in names):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                    hint = f" Names like it: {', '.join(near)}." if near else ""
                    raise ValueError(
                        f"Expected patterns of the model's parameters in `{option}`, but {pattern!r} matches none."
                        f"{hint}"
                    )
        both = [n for n in names if self._matches("keep_pretrained", n) and self._matches("keep_finetuned", n)]
        if both:
            raise ValueError(f"Expected {both[0]!r} in `keep_pretrained` or in `keep_finetuned`, but it is in both.")

    def _matches(self, option: str, name: str) -> bool:
        return any(glob_regex(pattern).fullmatch(name) for pattern in getattr(self, option))
