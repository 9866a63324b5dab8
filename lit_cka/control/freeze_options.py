"""What `FreezeConverged` was asked for: `FreezeOptions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Union

from lit_cka.features.layers import Layers

Policy: TypeAlias = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], int]
Cache: TypeAlias = Literal["memory", "disk"]
OptimizerState: TypeAlias = Literal["drop", "keep"]


@dataclass(frozen=True)
class FreezeOptions:
    """The arguments of `FreezeConverged`, which says what they mean; all that is wrong with them alone is an error."""

    share: float
    num_evaluations: int
    blocks: Layers | None
    max_frozen: int | None
    monitor: Union[str, None]
    mode: str
    patience: int
    min_delta: float
    optimizer_state: OptimizerState
    norm_in_eval: bool
    dropout_in_eval: bool
    cache: Cache | None
    cache_memory: float
    policy: Policy | None
    prefix: str

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"Expected `share`, where 1 is an equal share, to be above 0, but got {self.share}.")
        whole = {"num_evaluations": self.num_evaluations, "patience": self.patience, "max_frozen": self.max_frozen}
        for name, number in whole.items():
            if not isinstance(number, (int, type(None))):
                raise ValueError(f"Expected `{name}` to be a whole number, but got {number!r}.")
        for name, number in {"num_evaluations": self.num_evaluations, "patience": self.patience}.items():
            if number < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {number}.")
        if self.max_frozen is not None and self.max_frozen < 1:
            raise ValueError(f"Expected `max_frozen` to be at least 1, or None, but got {self.max_frozen}.")
        if not self.min_delta >= 0:
            raise ValueError(f"Expected `min_delta` to be 0 or more, but got {self.min_delta}.")
        choices: dict[str, tuple[str | None, tuple[str | None, ...]]] = {
            "mode": (self.mode, ("min", "max")),
            "optimizer_state": (self.optimizer_state, ("drop", "keep")),
            "cache": (self.cache, (None, "memory", "disk")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}, but got {value!r}.")
        if self.cache is not None and not (self.norm_in_eval and self.dropout_in_eval):
            raise ValueError(
                "Expected `norm_in_eval` and `dropout_in_eval` with `cache`, since activations can only be kept if "
                "they are the same every time: leave out `cache`, or have both."
            )
