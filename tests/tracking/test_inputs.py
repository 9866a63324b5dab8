"""What a step passes to the model: which of the batch's tensors, or something that was computed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_cka import CKACallback
from lit_cka.tracking.inputs import PassedTensors
from tests.tracking.helpers import BLOCKS, NUM_VAL, WIDTH, Classifier, frozen, hand_cka, loader, train_loader, trainer


def test_tensors_are_known_by_where_they_are() -> None:
    x, y, mask = torch.randn(4, 3), torch.randn(4), torch.ones(4, 3)
    passed = PassedTensors()
    passed.begin({"x": x, "rest": [y, (mask,)], "name": "a"})
    passed.note((x,), {"mask": mask, "scale": 2.0})
    passed.note((x.view(4, 3), x * 1.0, x[:2], x.T, y.detach()), {})
    passed.note(("a",), {})
    assert str(passed) == "0,2;0,-1,-1,-1,1;"
    passed.begin([mask, x])
    assert str(passed) == ""
    passed.note((x, y), {})
    assert str(passed) == "1,-1"


def test_tensors_without_memory_of_their_own() -> None:
    sparse, meta = torch.eye(3).to_sparse(), torch.empty(3, device="meta")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    passed = PassedTensors()
    passed.begin([sparse, nested, meta])
    passed.note((nested, sparse, torch.eye(3).to_sparse()), {})
    assert str(passed) == "1,0,-1"


class TwoViews(Classifier):
    """Every second epoch is validated on something else."""

    weights = torch.arange(1.0, 1 + WIDTH)

    def view(self, x: Tensor, epoch: int) -> Tensor:
        return x * self.weights if epoch % 2 else x

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        epoch = self.trainer.current_epoch
        x = self.view(batch[0], epoch)
        (self.net if epoch % 2 else self)(x)


class Same(TwoViews):
    """Another way to the same input is none."""

    def view(self, x: Tensor, epoch: int) -> Tensor:
        return x.view(x.shape) if epoch % 2 else x


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(loader().dataset)


@pytest.mark.parametrize("data", [loader(), DataLoader(Stream(), batch_size=16)], ids=["by index", "by content"])
@pytest.mark.parametrize("kind", [TwoViews, Same])
def test_a_step_that_passes_something_else_in_some_epochs(tmp_path: Path, kind: type[TwoViews], data: Any) -> None:
    module, callback = kind(), CKACallback()
    before = frozen(module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, max_epochs=3).fit(module, train_loader(), data)
    messages = [str(each.message) for each in seen if "when the reference was recorded" in str(each.message)]
    numbers = [record["n"] for record in callback.history]
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-7)
    if kind is Same:
        assert messages == []
        assert numbers == [NUM_VAL] * 3
    else:
        (message,) = messages
        assert message.startswith(
            f"The step passes something else to the model, for {NUM_VAL} samples of validate data"
        )
        assert numbers == [NUM_VAL, 0, NUM_VAL]
        assert np.isnan(list(callback.history[1]["scores"].values())).all()
