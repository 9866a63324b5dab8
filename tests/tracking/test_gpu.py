"""On a GPU the same as on a CPU: scores by the oracle, and a training that does not notice.

`python -m pytest -m gpu -o addopts= --import-mode=importlib tests` runs what needs one, here and elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_cka import CKACallback
from lit_cka.analysis import compare
from lit_cka.statistics.layer import ExactStatistics
from tests import oracles
from tests.oracles import paired_features
from tests.tracking.helpers import BLOCKS, Classifier, Keeper, Net, frozen, hand_cka, loader, train_loader, trainer

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def fitted(folder: Path, device: str, *callbacks: Any, lr: float = 0.2, **options: Any) -> Classifier:
    torch.manual_seed(0)
    module = Classifier(Net(dropout=0.1), lr=lr)
    if not lr:  # all there is to change are the running means of the norms
        for block in module.net.blocks:
            block.norm = nn.Identity()
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer(folder, *callbacks, accelerator=accelerator, **options).fit(module, train_loader(), loader())
    return module


@DEVICES
@pytest.mark.parametrize("debiased", [False, True])
def test_scores_are_the_oracles_and_the_training_is_the_same(tmp_path: Path, device: str, debiased: bool) -> None:
    keeper = Keeper()
    callback = CKACallback(debiased=debiased, log_figures=False)
    tracked = fitted(tmp_path, device, callback, keeper)
    random_state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    torch.manual_seed(0)
    start = frozen(Classifier(Net(dropout=0.1)))
    expected = hand_cka(start, keeper.models[-1].cpu(), BLOCKS, loader(), debiased=debiased)
    assert callback.scores == pytest.approx(expected, abs=1e-5)
    bare = fitted(tmp_path, device)
    assert bare.losses == tracked.losses
    assert torch.equal(random_state, torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state())
    for name, value in bare.state_dict().items():
        assert torch.equal(value, tracked.state_dict()[name])


@DEVICES
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_unchanged_model_scores_1(tmp_path: Path, device: str, precision: str) -> None:
    callback = CKACallback(log_figures=False, layers="net.blocks.*.linear")
    fitted(tmp_path, device, callback, lr=0.0, precision=precision)
    assert list(callback.scores.values()) == pytest.approx([1.0] * 3, abs=1e-6)


@DEVICES
@pytest.mark.parametrize("products", [None, "float64", "float32"])
@pytest.mark.parametrize("shape", [(64, 200), (900, 40)], ids=["few samples", "many samples"])
def test_products_far_from_0(device: str, products: Any, shape: tuple[int, int]) -> None:
    n, d = shape
    X, Y = paired_features(n, d, d + 3, offset=1e4)
    statistics = ExactStatistics(products=products)
    for x, y in zip(X.split(50), Y.split(50), strict=True):
        statistics.add(x.to(device), y.to(device))
    score = statistics.score(torch.device(device), debiased=False)
    assert score.cka == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-6)


@DEVICES
def test_comparing_is_the_same_on_both(device: str) -> None:
    torch.manual_seed(0)
    a, b = Net().eval(), Net().eval()
    data = DataLoader(loader().dataset.tensors[0], 16)
    here = compare(a, b, data, layers="blocks.*", progress=False)
    there = compare(a, b, data, layers="blocks.*", progress=False, device=device)
    torch.testing.assert_close(torch.as_tensor(there.values), torch.as_tensor(here.values), atol=1e-5, rtol=0)
