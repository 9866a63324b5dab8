"""Batches that are put together otherwise than in the recording: said, where a sample's features depend on that."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lit_cka import CKACallback
from tests.tracking.helpers import WIDTH, Classifier, Net, loader, train_loader, trainer


def unchanged(net: nn.Module) -> Classifier:
    return Classifier(net, lr=0.0)


class BatchStatistics(Net):
    """In evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)


class Plain(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.LayerNorm(WIDTH)


class Sequences(nn.Module):
    """Takes the mean over tokens, over the padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.net = nn.Linear(WIDTH, WIDTH), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embedding(x).mean(1))


def padded(samples: list[Any]) -> list[Tensor]:
    tokens = [x.repeat(9 if x[0] > 3.5 else 2, 1) for x, _ in samples]  # there are few long ones
    return [pad_sequence(tokens, batch_first=True), torch.stack([y for _, y in samples])]


def all_padded(samples: list[Any]) -> list[Tensor]:
    x, y = padded(samples)
    return [torch.cat([x, x.new_zeros(len(x), 9 - x.shape[1], WIDTH)], dim=1), y]


def shuffled(**options: Any) -> DataLoader:
    return DataLoader(loader().dataset, batch_size=16, shuffle=True, **options)


def fit(folder: Path, module: Classifier, data: Any, **options: Any) -> tuple[CKACallback, list[str]]:
    callback = CKACallback(debiased=True, **options)
    train = DataLoader(train_loader().dataset, batch_size=8, collate_fn=getattr(data, "collate_fn", None))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(folder, callback, max_epochs=3).fit(module, train, data)
    return callback, [str(each.message) for each in seen if "other samples of its batch" in str(each.message)]


@pytest.mark.parametrize(
    ("build", "data"),
    [(BatchStatistics, shuffled()), (Sequences, shuffled(collate_fn=padded))],
    ids=["statistics of the batch", "padding to the longest"],
)
def test_features_that_depend_on_the_batch(tmp_path: Path, build: Callable[[], nn.Module], data: Any) -> None:
    callback, messages = fit(tmp_path, unchanged(build()), data)
    (message,) = messages
    found = re.search(r"would get a CKA of (-?[\d.]+) in layer '([\w.]+)'", message)
    assert found is not None
    said, real = float(found[1]), [record["scores"][found[2]] for record in callback.history]
    assert min(real) < 0.99  # that is what it warns of
    assert said < 0.99


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (BatchStatistics, loader()),
        (Plain, shuffled()),
        (Sequences, shuffled(collate_fn=all_padded)),
    ],
    ids=["the same batches", "no such features", "padding of one length"],
)
def test_features_that_do_not(tmp_path: Path, build: Callable[[], nn.Module], data: Any) -> None:
    callback, messages = fit(tmp_path, unchanged(build()), data)
    assert messages == []
    for record in callback.history:
        assert record["scores"] == pytest.approx(dict.fromkeys(record["scores"], 1.0), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"reference": "other"}, {"cache_dtype": "bfloat16"}], ids=str)
def test_a_trained_model_is_compared_with_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    """And not with itself: what training has changed is no reason for a warning."""
    options = {**options, "reference": Plain()} if "reference" in options else options
    module = Classifier(Plain(), lr=0.5)
    callback, messages = fit(tmp_path, module, shuffled(), **options)
    assert messages == []
    assert min(callback.scores.values()) < 0.9
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    module = Classifier(BatchStatistics(), lr=0.5)
    _, messages = fit(tmp_path, module, shuffled())
    assert len(messages) == 1
    assert all(torch.isfinite(value).all() for value in weights.values())
