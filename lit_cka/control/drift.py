"""Which layers have drifted further than they may: `layers_beyond`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def layers_beyond(record: Mapping[str, Any], budget: float) -> list[str]:
    """Returns the layers whose CKA with the reference is below 1 - budget for sure: by the upper end of its interval.

        high_i < 1 - budget

    Args:
        record: an entry of the history of a `CKACallback` with intervals.
        budget: the drift 1 - CKA that is allowed.

    Raises:
        ValueError: if the record has no intervals.

    Example:
        >>> layers_beyond({"scores": {"0": 0.95, "1": 0.85}, "high": {"0": 0.97, "1": 0.88}}, budget=0.1)
        ['1']
    """
    if "high" not in record:
        raise ValueError(
            "Expected the history of CKACallback to have intervals, to know which layers have drifted for sure, but "
            "its records have none: leave out `intervals=False`."
        )
    return [layer for layer, high in record["high"].items() if high < 1 - budget]
