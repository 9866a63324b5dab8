"""A model that changes its inputs in place leaves those of the next as they are, whatever form they have."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_cka import CKACallback, MonoSoupEditor
from lit_cka.analysis import Settings, compare, extract, project
from lit_cka.reference.arguments import batch_copy
from tests.tracking.helpers import trainer


@dataclass
class Images:
    pixels: Tensor
    scale: float = 2.0


class Pair(NamedTuple):
    inputs: Any
    labels: Tensor


class Net(nn.Module):
    """Normalises its inputs, in place or not, whatever holds them."""

    def __init__(self, in_place: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.in_place = in_place
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)

    def normalised(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.sub_(0.5).mul_(2.0) if self.in_place else (x - 0.5) * 2.0
        if isinstance(x, Images):
            return self.normalised(x.pixels)
        if isinstance(x, dict):
            return self.normalised(x["x"])
        return self.normalised(x[0])

    def forward(self, x: Any) -> Tensor:
        x = self.normalised(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def rows() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 6, generator=generator), torch.arange(10) % 3) for _ in range(4)
    ]  # fmt: skip


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: ({"x": x}, y),
    "dataclass": lambda x, y: (Images(x), y),
    "nested": lambda x, y: ([[{"x": x}]], y),
    "named tuple": lambda x, y: Pair(x, y),
    "mapping": lambda x, y: {"x": x, "labels": y},
    "of another's": lambda x, y: UserDict({"x": x, "labels": y}),
    "view": lambda x, y: (x.t().contiguous().t(), y),
    "not to be copied": lambda x, y: ([x, (number for number in range(3))], y),
}


def batches(form: str) -> list[Any]:
    return [FORMS[form](x, y) for x, y in rows()]


def layers(form: str, in_place: bool) -> Any:
    """What two models make of the same batches, one after the other."""
    data = batches(form)
    return [extract(Net(in_place), data, layers="blocks.*", progress=False).layers for _ in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_every_model_gets_the_same(form: str) -> None:
    wanted, got = layers(form, in_place=False)[0], layers(form, in_place=True)
    for held in got:
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_compare_and_project() -> None:
    data, settings = batches("dict"), Settings(debiased=False)
    model = Net(True)
    found = compare(model, copy.deepcopy(model), data, layers="blocks.*", settings=settings, progress=False)
    assert found.values.diagonal() == pytest.approx(1.0)
    assert all(torch.equal(batch[0]["x"], x) for batch, (x, _) in zip(data, rows(), strict=True))
    positions = []
    for in_place in (False, True):
        of_models = [
            extract(Net(in_place, seed), data, layers="blocks.*", progress=False, name=str(seed)) for seed in (0, 1)
        ]
        positions.append([point.position for point in project(of_models).points])
    assert positions[0] == positions[1]


class Evaluated(Net):
    num_classes = 3

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        return (batch["x"], batch["labels"]) if "labels" in batch else (batch[0], batch[1])


@pytest.mark.parametrize("form", ["tensor", "dict", "nested", "mapping", "dataclass"])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_variant_gets_the_same(form: str, sequential: bool, tmp_path: Any) -> None:
    found = []
    for in_place, of_form in ((False, "tensor"), (True, form)):
        models = Evaluated(in_place), Evaluated(in_place, 1)
        editor = MonoSoupEditor(*models, layers="blocks.*", sequential=sequential)
        data: Any = batches(of_form)
        trainer(tmp_path).test(editor, DataLoader(data, batch_size=None), verbose=False)
        assert editor.results is not None
        found.append((editor.results.metrics, editor.results.cka))
    assert found[0] == found[1]


@pytest.mark.parametrize("form", ["tensor", "list", "dict", "nested"])
def test_the_batches_of_a_probe_stay_as_they_are(form: str, tmp_path: Any) -> None:
    class Module(pl.LightningModule):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.net = Net(in_place)

        def forward(self, x: Any) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net.head(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    histories = []
    for in_place in (False, True):
        data: Any = rows()
        held = batches(form)
        callback = CKACallback(layers="net.blocks.*", probe=held, log_figures=False)
        trainer(tmp_path, callback, max_epochs=2).fit(Module(in_place), DataLoader(data, batch_size=None))
        histories.append(callback.history)
        for batch, fresh in zip(held, batches(form), strict=True):
            assert str(batch) == str(fresh)
    assert [record["scores"] for record in histories[0]] == [record["scores"] for record in histories[1]]
    assert all(score == pytest.approx(1.0) for record in histories[1] for score in record["scores"].values())


def test_what_can_not_be_copied_is_passed_on() -> None:
    iterator, x = (number for number in range(3)), torch.ones(2)
    given = {"a": [x, iterator], "b": Pair(x, x), "c": (x, iterator)}
    copied = batch_copy(given)
    assert copied["a"][1] is iterator
    assert copied["a"][0] is not x
    assert isinstance(copied["b"], Pair)
    assert torch.equal(copied["c"][0], x)
