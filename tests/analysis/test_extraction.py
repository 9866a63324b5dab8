"""Features of whole datasets, against the layers called by hand; what is restored; too little memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_cka.analysis import extraction
from lit_cka.analysis.extraction import extract
from lit_cka.analysis.features import Features

X = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)) + 3
LABELS = torch.arange(11) % 3


class Net(nn.Module):
    """Two layers with dropout and batch norm between them; notes what it ran on."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(6, 3)
        self.most = most
        self.sizes: list[int] = []

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        hidden = self.first(x)
        if self.most is not None and len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} samples")
        hidden = self.dropout(self.norm(hidden).relu())
        return self.second(hidden if scale is None else hidden * scale)


LAYERS = ["first", "second"]


def by_hand(net: Net, x: Tensor = X) -> dict[str, np.ndarray]:
    """In NumPy, with the statistics of batch norm at their initial 0 and 1."""
    first = x.numpy() @ net.first.weight.detach().numpy().T + net.first.bias.detach().numpy()
    hidden = np.maximum(first / np.sqrt(1 + net.norm.eps), 0)
    return {"first": first, "second": hidden @ net.second.weight.detach().numpy().T + net.second.bias.detach().numpy()}


def assert_right(features: Features, net: Net, x: Tensor = X) -> None:
    expected = by_hand(net, x)
    assert list(features.layers) == LAYERS
    for name, value in features.layers.items():
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, LABELS), batch_size)


def mappings() -> list[dict[str, Any]]:
    parts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    return [{"id": [f"s{row}" for row in range(11)][part], "x": X[part], "labels": LABELS[part]} for part in parts]


@pytest.mark.parametrize(
    ("batches", "has_labels"),
    [
        (loader(), True),
        (loader(11), True),
        (loader(1), True),
        (DataLoader(TensorDataset(X), 4), False),
        (list(X.split(4)), False),
        ([(part, [str(index)] * len(part)) for index, part in enumerate(X.split(4))], True),
        ([{"x": part} for part in X.split(4)], False),
        ([{"x": x, "label": y} for x, y in zip(X.split(4), LABELS.split(4), strict=True)], True),
        ([{"x": x, "labels": torch.zeros(len(x), 5)} for x in X.split(4)], False),
    ],
    ids=["tuples", "one batch", "single", "tensors", "inputs", "words", "mapping", "label", "dense labels"],
)
def test_batches_of_all_kinds(batches: Any, has_labels: bool) -> None:
    net = Net()
    features = extract(net, batches, layers=LAYERS, name="net", data="noise", progress=False)
    assert_right(features, net)
    assert features.ids == [str(index) for index in range(11)]
    assert (features.labels is not None) == has_labels
    assert (features.model, features.data, features.pooling) == ("net", "noise", "mean")
    assert sum(net.sizes) == 11


def test_ids_and_labels_of_mappings() -> None:
    net = Net()
    features = extract(net, mappings(), layers=LAYERS, progress=False)
    assert_right(features, net)
    assert features.ids == [f"s{index}" for index in range(11)]
    assert features.labels == LABELS.tolist()
    numbered = [{**batch, "id": torch.tensor([int(name[1:]) + 5 for name in batch["id"]])} for batch in mappings()]
    assert extract(net, numbered, layers=LAYERS, progress=False).ids == [str(index + 5) for index in range(11)]
    named = extract(net, loader(), layers=LAYERS, ids=[f"t{index}" for index in range(11)], progress=False)
    assert named.ids == [f"t{index}" for index in range(11)]


class Stream(IterableDataset[Tensor]):
    """Of unknown length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from X


def test_data_of_unknown_length() -> None:
    net = Net()
    assert_right(extract(net, DataLoader(Stream(), 4), layers=LAYERS), net)
    assert_right(extract(net, iter(X.split(4)), layers=LAYERS), net)


def test_progress_is_shown_in_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    extract(Net(), loader(), layers=LAYERS)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    extract(Net(), loader(), layers=LAYERS, name="net", data="noise")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "net on noise" in shown.err
    assert "3/3" in shown.err
    extract(Net(), loader(), layers=LAYERS, progress=False)
    assert capsys.readouterr() == ("", "")


def test_poolings_are_named() -> None:
    def halves(tensor: Tensor) -> Tensor:
        return tensor[:, :2]

    features = extract(Net(), loader(), layers=LAYERS, pooling=halves, progress=False)
    assert features.pooling == "halves"
    assert features.layers["first"].shape == (11, 2)
    assert extract(Net(), loader(), layers=LAYERS, pooling="flatten", progress=False).pooling == "flatten"


class Broken(nn.Module):
    """Draws random numbers, and fails on its second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("second batch")
        return self.net(x)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_model_and_random_states_are_left_as_they_were(num_batches: int) -> None:
    model = Broken().train()
    model.net.norm.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches = list(X.split(4))[:num_batches]
    if num_batches == 1:
        assert_right(rename(extract(model, batches, layers=["net.first", "net.second"])), model.net, X[:4])
    else:
        with pytest.raises(RuntimeError, match="second batch"):
            extract(model, batches, layers=["net.first", "net.second"])
    assert [module.training for module in model.modules()] == modes
    assert num_hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def rename(features: Features) -> Features:
    layers = {name.removeprefix("net."): value for name, value in features.layers.items()}
    return Features(layers, features.ids)


def test_what_is_no_dataset() -> None:
    with pytest.raises(ValueError, match="'data' to give samples, but it gave none"):
        extract(Net(), [], layers=LAYERS)
    twice = [{"x": X[:2], "id": ["a", "b"]}, {"x": X[2:4], "id": ["c", "b"]}]
    with pytest.raises(ValueError, match="its own id, but 'b' comes more than once"):
        extract(Net(), twice, layers=LAYERS)
    with pytest.raises(ValueError, match=r"as many as there are ids, but those of layer 'first' have shape \(3, 6\)"):
        extract(Net(), [{"x": X[:3], "id": ["a", "b"]}], layers=LAYERS)
    with pytest.raises(ValueError, match="an id for each of 11 samples, but got 1"):
        extract(Net(), loader(), layers=LAYERS, ids=["a"])
    with pytest.raises(ValueError, match=r"Unknown layer 'first\.extra'"):
        extract(Net(), loader(), layers="first.extra")


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (8, [8, 3]),
        (4, [8, 4, 4, 2, 1]),
        (3, [8, 4, 2, 2, 2, 2, 1, 1, 1]),
        (1, [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("kind", ["tuples", "mappings"])
def test_batches_are_halved_until_they_fit_and_stay_so(most: int, sizes: list[int], kind: str) -> None:
    net = Net(most)
    batches: Any = loader(8)
    if kind == "mappings":
        names = [f"s{index}" for index in range(11)]
        weights = torch.ones(9, 1)  # longer than a batch, of no samples
        batches = [
            {"x": X[part], "scale": torch.ones(6), "weights": weights, "id": names[part], "labels": LABELS[part]}
            for part in (slice(0, 8), slice(8, 11))
        ]
    features = extract(net, batches, layers=LAYERS, progress=False)
    assert net.sizes == sizes
    assert_right(features, net)
    assert features.labels == LABELS.tolist()
    assert features.ids == [f"{'s' if kind == 'mappings' else ''}{index}" for index in range(11)]
    assert num_hooks(net) == 0


def test_parts_that_are_done_are_not_run_again() -> None:
    """Another program may take the memory in between."""

    class Crowded(Net):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            self.most = 3 if self.sizes == [8, 4] else 4
            return super().forward(x, scale)

    net = Crowded()
    features = extract(net, loader(8), layers=LAYERS, progress=False)
    assert net.sizes == [8, 4, 4, 2, 2, 1, 1, 1]
    assert_right(features, net)


def test_memory_for_less_than_one_sample() -> None:
    net = Net(0).train()
    with pytest.raises(torch.OutOfMemoryError, match="1 samples"):
        extract(net, loader(8), layers=LAYERS, progress=False)
    assert net.sizes == [8, 4, 2, 1]
    assert net.training
    assert num_hooks(net) == 0


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        extract(Net(), [X[:, :3]], layers=LAYERS, progress=False)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["DataLoader", "generator"])
def test_ranks_have_every_batch_once(kind: str, num_ranks: int) -> None:
    batches = loader(2)
    shares = []
    for rank in range(num_ranks):
        own, num_batches = extraction._share(batches if kind == "DataLoader" else iter(batches), rank, num_ranks)
        shares.append([batch[0] for batch in own])
        assert num_batches in (0, len(shares[-1]))
    turns = [shares[number % num_ranks][number // num_ranks] for number in range(6)]
    assert torch.equal(torch.cat(turns), X)
    assert sum(map(len, shares)) == 6


def test_an_order_of_their_own_is_no_order_for_ranks() -> None:
    shuffled = DataLoader(TensorDataset(X), 2, shuffle=True)
    with pytest.raises(ValueError, match="does not shuffle"):
        extraction._share(shuffled, 0, 2)


def test_distributed_without_ranks_is_one_process() -> None:
    alone, shared = (
        extract(Net(), loader(4), layers=LAYERS, progress=False, distributed=flag) for flag in (False, True)
    )
    assert all(torch.equal(alone.layers[name], shared.layers[name]) for name in LAYERS)
    assert alone.ids == shared.ids
