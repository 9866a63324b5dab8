"""What callbacks did to layers in a training, as a text that event files keep: `LayerEvents`, and `spans_of` a layer.

The text holds all events so far, so that the last one of a run is enough, also after a restart. Torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from typing_extensions import TypedDict

What = Literal["frozen", "trained", "slowed", "rolled back", "stopped"]
# What stays so until something else is done to the layer; the rest is over at once.
LASTING = ("frozen", "slowed")
_FORMAT = "layer events 1"
_TAG = "layers"  # behind the prefix of a callback's keys
_SHARE = 0.01  # by which the events have to grow before all of them are written once more


class LayerEvent(NamedTuple):
    """What was done at one step.

    Attributes:
        step: of the loggers, from which on it is so.
        what: was done.
        groups: numbers of the groups of layers that it was done to.
        why: in a few words.
    """

    step: int
    what: What
    groups: tuple[int, ...]
    why: str


class LayerEvents(NamedTuple):
    """What one callback did.

    Attributes:
        groups: names of layers that are acted on together; a layer stands for all that is inside it.
        events: oldest first.
    """

    groups: tuple[tuple[str, ...], ...]
    events: tuple[LayerEvent, ...]


class Span(TypedDict):
    """What was done to one layer, and until which step that holds: None if it still does."""

    what: What
    start: int
    end: int | None
    why: str


def to_text(events: LayerEvents) -> str:
    """Returns the events as JSON, an event a line, in a block of Markdown that shows it as it is.

    Example:
        >>> print(to_text(LayerEvents((("blocks.0",),), (LayerEvent(9, "frozen", (0,), "converged"),))))
            {"format": "layer events 1", "groups": [["blocks.0"]], "events": [
            [9, "frozen", [0], "converged"]
            ]}
    """
    lines = ",\n    ".join(json.dumps(event) for event in events.events)
    return f'    {{"format": "{_FORMAT}", "groups": {json.dumps(events.groups)}, "events": [\n    {lines}\n    ]}}'


def from_text(text: str) -> LayerEvents | None:
    """Returns the events in a text, or None if it is another text."""
    try:
        read: Any = json.loads(text)
        if not isinstance(read, dict) or read.get("format") != _FORMAT:
            return None
        groups = tuple(tuple(map(str, group)) for group in read["groups"])
        events = [LayerEvent(int(step), what, tuple(map(int, places)), str(why)) for step, what, places, why
                  in read["events"]]  # fmt: skip
    except (ValueError, TypeError, KeyError):
        return None
    is_whole = all(place in range(len(groups)) for event in events for place in event.groups)
    return LayerEvents(groups, tuple(events)) if is_whole else None


def spans_of(layer: str, events: LayerEvents) -> list[Span]:
    """Returns what was done to a layer, or to the innermost layer around it that was acted on, in the order of steps.

    Example:
        >>> events = (LayerEvent(9, "frozen", (0,), "converged"), LayerEvent(30, "trained", (0,), "the loss turned"))
        >>> spans_of("blocks.0.attn", LayerEvents((("blocks.0",),), events))
        [{'what': 'frozen', 'start': 9, 'end': 30, 'why': 'converged'}]
    """
    around = {name: number for number, group in enumerate(events.groups) for name in group
              if f"{layer}.".startswith(f"{name}.")}  # fmt: skip
    if not around:
        return []
    number = around[max(around, key=len)]
    spans: list[Span] = []
    lasting: Span | None = None
    for step, what, groups, why in events.events:
        if number not in groups or (lasting is not None and (lasting["what"], lasting["why"]) == (what, why)):
            continue
        if lasting is not None and what in (*LASTING, "trained"):
            lasting["end"], lasting = step, None
        if what == "trained":
            continue
        span = Span(what=what, start=step, end=None if what in LASTING else step, why=why)
        lasting = span if what in LASTING else lasting
        spans.append(span)
    return spans


def spans_of_layers(layers: Iterable[str], sources: Sequence[LayerEvents]) -> list[list[Span]]:
    """Returns, by layer, what several callbacks did to it, in the order of steps."""
    return [
        sorted((span for events in sources for span in spans_of(layer, events)), key=lambda span: span["start"])
        for layer in layers
    ]


class EventsLog:
    """Writes the events of a callback for TensorBoard, to every logger of the trainer that has one of its writers.

    Args:
        prefix: of the callback's keys.
    """

    def __init__(self, prefix: str) -> None:
        self._tag = f"{prefix}/{_TAG}"
        self._num_written = 0

    def write(self, trainer: Any, events: LayerEvents, *, is_last: bool = False) -> None:
        """Write all events, if there are new ones: of more than a hundred, once there are a hundredth more, or at last.

        Args:
            trainer: whose loggers.
            events: all so far.
            is_last: whether no other follow.
        """
        num_events = len(events.events)
        is_due = num_events >= (1 + _SHARE) * self._num_written
        if num_events == self._num_written or not (is_due or is_last) or not trainer.is_global_zero:
            return
        self._num_written = num_events
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text") and hasattr(writer, "add_custom_scalars"):  # TensorBoard's, of any library
                writer.add_text(self._tag, to_text(events), events.events[-1].step)
