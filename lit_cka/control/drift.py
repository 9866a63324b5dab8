"""Which layers have drifted further than they may: `layers_beyond`, and what was done about it: `drift_events`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from lit_cka.tracking.layer_events import LayerEvent, LayerEvents, What

_WORDS: dict[str, What] = {"stop": "stopped", "slow": "slowed", "roll_back": "rolled back"}


class DriftEvent(TypedDict):
    """What was done about drift: an entry of `DriftBudget.history`."""

    step: int  # optimizer steps taken
    logged_step: int  # that the loggers have for it
    epoch: int
    action: str
    layers: list[str]  # that were beyond the budget
    cka: list[float]  # of each, by the upper end of its interval


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


def drift_events(history: Sequence[DriftEvent], factor: float) -> LayerEvents:
    """Returns what was done to which layer, for the loggers.

    Args:
        history: of a `DriftBudget`, oldest first.
        factor: by which a layer is slowed each time.
    """
    layers = list(dict.fromkeys(layer for event in history for layer in event["layers"]))
    times = dict.fromkeys(layers, 0)
    events: list[LayerEvent] = []
    for event in history:
        what = _WORDS[event["action"]]
        alike: dict[str, list[int]] = {}  # layers with the same reason
        for layer in event["layers"]:
            times[layer] += what == "slowed"
            why = f"learning rate x {factor ** times[layer]:.3g}" if what == "slowed" else "beyond the drift budget"
            alike.setdefault(why, []).append(layers.index(layer))
        step = event.get("logged_step", event["step"])
        events += [LayerEvent(step, what, tuple(places), why) for why, places in alike.items()]
    return LayerEvents(tuple((layer,) for layer in layers), tuple(events))
