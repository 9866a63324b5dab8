"""The texts in which callbacks say what they did to layers, found among all texts of a run: `read_events`."""

from __future__ import annotations

from typing import Any

from tensorboard.data.provider import RunTagFilter

from lit_cka.tracking.layer_events import LayerEvents, from_text

_TEXTS = "text"
_END = "/layers/text_summary"  # of their tags: what writers make of the callbacks' "/layers"


def last_changes(provider: Any, context: Any, experiment: str) -> dict[str, float]:
    """Returns, by run, when such a text was written last, in seconds since 1970."""
    listed = provider.list_tensors(context, experiment_id=experiment, plugin_name=_TEXTS)
    return {
        run: max(times)
        for run, tags in listed.items()
        if (times := [series.max_wall_time for tag, series in tags.items() if tag.endswith(_END)])
    }


def read_events(provider: Any, context: Any, experiment: str, run: str) -> list[LayerEvents]:
    """Returns what each callback of a run did to layers, as its last text has it, by the callbacks' prefixes."""
    here = RunTagFilter(runs=[run])
    listed = provider.list_tensors(context, experiment_id=experiment, plugin_name=_TEXTS, run_tag_filter=here)
    tags = sorted(tag for tag in listed.get(run, {}) if tag.endswith(_END))
    if not tags:
        return []
    read = provider.read_tensors(
        context,
        experiment_id=experiment,
        plugin_name=_TEXTS,
        downsample=1,  # which leaves the last
        run_tag_filter=RunTagFilter(runs=[run], tags=tags),
    )
    found = (_events(data[-1]) for _, data in sorted(read.get(run, {}).items()) if data)
    return [events for events in found if events is not None]


def _events(datum: Any) -> LayerEvents | None:
    try:
        text = datum.numpy.item()
        return from_text(text.decode() if isinstance(text, bytes) else str(text))
    except (ValueError, AttributeError):  # no single text
        return None
