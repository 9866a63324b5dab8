"""The tracker by itself, without a trainer: which batches are looked at, to see whether they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_cka.reference.recording import Recording
from lit_cka.samples.batch_rows import rows_of
from lit_cka.samples.counting import DataRanks
from lit_cka.samples.sample_keys import BatchSamples, keys_of_indices
from lit_cka.tracking.tracker import Tracker
from tests.tracking.helpers import NUM_VAL, Net, dataset

LAYERS = [f"blocks.{i}" for i in range(3)]
ALONE = DataRanks(0, 1, None, torch.device("cpu"))
SIZE = 11


def samples(start: int, content: int) -> BatchSamples:
    indices = torch.arange(start, start + SIZE)
    keys = keys_of_indices(indices.numpy(), 0)
    assert keys is not None
    counted = torch.ones(SIZE, dtype=torch.bool)
    return BatchSamples("index", keys, counted, rows_of([indices]), torch.full((SIZE, 2), content))


@pytest.mark.filterwarnings("ignore:44 samples of validate dataloader 0 are not what they were")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_an_accelerator_the_first_batch_tells_whether_all_are_looked_at(tmp_path: Path, device: str) -> None:
    model = Net().eval()
    tracker = Tracker(model, LAYERS, "mean", Recording(LAYERS, 1e9, "auto", tmp_path))
    x, numbers, looked_at = dataset(NUM_VAL, 1).tensors[0], [], []
    for number, content in enumerate([1, 1, 2, 1]):  # the third time, all batches are others
        tracker.open("validate", 1, ALONE, record=number == 0)
        for batch_idx, start in enumerate(range(0, NUM_VAL, SIZE)):
            batch, held = x[start : start + SIZE], samples(start, content)
            looked_at.append(tracker.looks_at_content(batch_idx, torch.device(device)))
            held.content = held.content if looked_at[-1] or number == 0 else None
            if tracker.has_changed(0, held):
                continue
            tracker.begin(0, batch)
            with torch.no_grad():
                model(batch)
            if number == 0:
                tracker.record(held, tracker.take())
            else:
                tracker.compare(held)
        tracker.close()
        if number == 0:
            tracker.conclude_recording()
        else:
            numbers.append({score.n for score in tracker.scores(0).values()})
    assert numbers == [{NUM_VAL}, {0}, {NUM_VAL}]
    of_passes = [looked_at[start : start + 4] for start in (0, 4, 8, 12)]
    first_alone = [True] * 4 if device == "cpu" else [True, False, False, False]
    assert of_passes == [first_alone, first_alone, [True] * 4, first_alone]
