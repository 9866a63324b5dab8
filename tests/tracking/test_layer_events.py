"""What was done to layers, written as a text and read again, and what it means for one layer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lit_cka.tracking.layer_events import EventsLog, LayerEvent, LayerEvents, from_text, spans_of, to_text

GROUPS = (("stem", "blocks.0"), ("blocks.1",), ("blocks.1.attn.inner",))


def events(*each: Any) -> LayerEvents:
    return LayerEvents(GROUPS, tuple(LayerEvent(*event) for event in each))


def spans(layer: str, *each: Any) -> list[tuple[Any, ...]]:
    return [(span["what"], span["start"], span["end"], span["why"]) for span in spans_of(layer, events(*each))]


def test_a_text_is_read_as_it_was_written() -> None:
    given = events((3, "frozen", (0, 1), 'of "quotes"\n'), (7, "trained", (1,), ""))
    assert from_text(to_text(given)) == given
    assert all(line.startswith("    ") for line in to_text(given).splitlines())  # Markdown's block of code
    empty = LayerEvents((), ())
    assert from_text(to_text(empty)) == empty


@pytest.mark.parametrize(
    "text",
    ["", "notes", "[]", "3", "{}", '{"format": "layer events 2", "groups": [], "events": []}',
     '{"format": "layer events 1", "groups": []}', '{"format": "layer events 1", "groups": [], "events": [[1]]}',
     '{"format": "layer events 1", "groups": [["a"]], "events": [[1, "frozen", [1], ""]]}',
     '{"format": "layer events 1", "groups": [["a"]], "events": [["x", "frozen", [0], ""]]}'],
)  # fmt: skip
def test_other_texts_are_no_events(text: str) -> None:
    assert from_text(text) is None


def test_a_layer_has_what_was_done_around_it() -> None:
    frozen = (9, "frozen", (0,), "converged")
    for layer in ("stem", "stem.proj", "blocks.0", "blocks.0.attn.qkv"):
        assert spans(layer, frozen) == [("frozen", 9, None, "converged")]
    for layer in ("blocks.1", "blocks.01", "blocks", "head", "stems"):
        assert spans(layer, frozen) == []
    # Of those around it the innermost counts.
    assert spans("blocks.1.attn.inner.x", (9, "frozen", (1,), "")) == []
    assert spans("blocks.1.attn.inner.x", (9, "frozen", (2,), "")) == [("frozen", 9, None, "")]


def test_what_lasts_ends_with_what_is_done_next() -> None:
    turned = (30, "trained", (0, 1), "the loss turned")
    assert spans("stem", (9, "frozen", (0,), "a"), turned, (50, "frozen", (0,), "b")) == [
        ("frozen", 9, 30, "a"),
        ("frozen", 50, None, "b"),
    ]
    assert spans("blocks.1", turned) == []
    slowed = [(10, "slowed", (0,), "x 0.1"), (20, "slowed", (0,), "x 0.01"), (30, "slowed", (0,), "x 0.01")]
    assert spans("stem", *slowed) == [("slowed", 10, 20, "x 0.1"), ("slowed", 20, None, "x 0.01")]
    back = (20, "rolled back", (0,), "")
    assert spans("stem", (10, "slowed", (0,), "x"), back, (25, *back[1:])) == [
        ("slowed", 10, None, "x"),
        ("rolled back", 20, 20, ""),
        ("rolled back", 25, 25, ""),
    ]


def test_few_texts_hold_many_events(tmp_path: Path) -> None:
    """A text has all events so far, so a text for each of many would be too much; the last has all in any case."""
    writer = SummaryWriter(str(tmp_path))
    run = SimpleNamespace(is_global_zero=True, loggers=[SimpleNamespace(experiment=writer), SimpleNamespace()])
    log, given = EventsLog("drift"), [(step, "rolled back", (0,), "") for step in range(300)]
    for number in range(301):
        log.write(run, events(*given[:number]))
    log.write(run, events(*given), is_last=True)
    log.write(run, events(*given), is_last=True)
    another = SimpleNamespace(is_global_zero=False, loggers=run.loggers)
    EventsLog("other").write(another, events(*given))
    writer.close()
    read = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert read.Tags()["tensors"] == ["drift/layers/text_summary"]
    texts = [each.tensor_proto.string_val[0].decode() for each in read.Tensors("drift/layers/text_summary")]
    assert 100 < len(texts) < 240
    assert [len(json.loads(text)["events"]) for text in texts[:100]] == list(range(1, 101))
    assert from_text(texts[-1]) == events(*given)
