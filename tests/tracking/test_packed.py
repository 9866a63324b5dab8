"""A training of models that pack the images of a batch into one sequence, from the default layers to the CKA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_cka import CKACallback
from tests import oracles
from tests.features.test_packed import images, qwen2_5_vl, qwen2_vl, raw_of, text_of
from tests.tracking.helpers import trainer

# The images of the samples, of unequal sizes; of a tower by itself, each sample is one image.
GRIDS = [[[1, 4, 8]], [[1, 4, 4], [1, 8, 8]], [[1, 8, 4]], [[1, 4, 4]]]
NUM_SAMPLES = 22
Sample = dict[str, Tensor]


def joined(samples: list[Sample]) -> Sample:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def call_of(sample: Sample) -> dict[str, Any]:
    """The arguments of a tower, or of a model with a text."""
    tower = {"hidden_states": sample["pixel_values"], "grid_thw": sample["image_grid_thw"]}
    return sample if "input_ids" in sample else tower


class Images(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def step(self, batch: Sample, batch_idx: int) -> Tensor:
        return self.net(**call_of(batch)).last_hidden_state.square().mean()

    training_step = validation_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=5.0)


def samples_of(*, with_text: bool) -> list[Sample]:
    grids = [GRIDS[i % 4] if with_text else GRIDS[i % 4][:1] for i in range(NUM_SAMPLES)]
    return [{**images(grid), **(text_of(grid) if with_text else {})} for grid in grids]


def rows(model: nn.Module, layer: str, samples: list[Sample]) -> Tensor:
    """What a layer returns for each sample alone, its mean over the sample's own rows."""
    return torch.stack([raw_of(model, layer, **call_of(sample)).flatten(0, -2).mean(0) for sample in samples])


@pytest.mark.filterwarnings("ignore:CKA is biased upward")  # of few samples, which all of it is
@pytest.mark.parametrize("with_text", [False, True], ids=["tower", "model"])
@pytest.mark.parametrize("make", [qwen2_vl, pytest.param(qwen2_5_vl, marks=pytest.mark.slow)])
def test_default_layers_of_packed_images(tmp_path: Path, make: Callable[[], Any], with_text: bool) -> None:
    torch.manual_seed(0)
    net = make() if with_text else make().visual
    samples, before = samples_of(with_text=with_text), copy.deepcopy(net).eval()
    loader = DataLoader(samples, 3, collate_fn=joined)  # of each batch other sizes
    callback = CKACallback(log_figures=False)
    trainer(tmp_path, callback, max_epochs=1, limit_train_batches=1).fit(Images(net), loader, loader)
    blocks = ["visual.blocks", "language_model.layers"] if with_text else ["blocks"]
    layers = [f"{each}.{i}" for each in blocks for i in (0, 1)]
    expected = {
        f"net.{layer}": oracles.linear_cka(rows(before, layer, samples), rows(net.eval(), layer, samples), True)
        for layer in layers
    }
    assert callback.history[-1]["n"] == NUM_SAMPLES
    assert min(expected.values()) < 0.8
    assert callback.scores == pytest.approx(expected, abs=1e-6)
