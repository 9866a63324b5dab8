"""Small networks whose blocks run one after the other, and trainings of them, for the tests of `control`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_cka import CKACallback, FreezeConverged
from tests.tracking.helpers import WIDTH, Classifier, dataset, loader, trainer

NUM_BLOCKS = 4
NUM_TRAIN, BATCH_SIZE = 32, 8
STEPS = NUM_TRAIN // BATCH_SIZE  # in an epoch


class NormedBlock(nn.Module):
    """Residual, with a norm of each sample by itself, so that batches can be parted."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Chain(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)  # first, though it runs last
        self.shift = nn.Parameter(torch.zeros(WIDTH))  # of no module that is called
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))
        self.blocks = nn.ModuleList(NormedBlock() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Adam(Classifier):
    """Trained in float64 with an optimizer that moves every parameter whose gradient it finds."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__(Chain() if net is None else net, lr)
        self.double()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0].double()), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


class Steps:
    """A policy that freezes so many blocks after each evaluation, whatever was measured."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __call__(self, records: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> int:
        return self.numbers[min(len(records), len(self.numbers)) - 1]


def freezing(*numbers: int, **options: Any) -> FreezeConverged:
    """The callback, with the numbers of blocks to freeze after each evaluation."""
    return FreezeConverged(**{"policy": Steps(*numbers), "monitor": None, **options})


def train_data(batch_size: int = BATCH_SIZE, shuffle: bool = False) -> Any:
    return loader(NUM_TRAIN, seed=0, batch_size=batch_size, shuffle=shuffle)


def fit(folder: Path, module: pl.LightningModule, callback: pl.Callback, *others: pl.Callback, **options: Any) -> Any:
    """Train with CKA tracked; return the trainer."""
    data, val = options.pop("data", None), options.pop("val", None)
    checkpoint = options.pop("ckpt_path", None)
    run = trainer(folder, callback, CKACallback(log_figures=False), *others, **{"max_epochs": 3, **options})
    run.fit(module, data or train_data(), val or loader(), ckpt_path=checkpoint)
    return run


def by_hand(
    module: Classifier, frozen_epochs: Sequence[int], accumulate: int = 1, batch_size: int = BATCH_SIZE
) -> None:
    """Train a `Chain` in a plain loop, with so many blocks frozen in each epoch, and their optimizer state dropped."""
    optimizer: torch.optim.Optimizer = module.configure_optimizers()
    x, y = dataset(NUM_TRAIN, 0).tensors
    net = module.net
    before = 0
    for num_frozen in frozen_epochs:
        parts = [net.stem, *net.blocks[:num_frozen]] if num_frozen else []
        frozen = {id(p) for part in parts for p in part.parameters()} | ({id(net.shift)} if num_frozen else set())
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
            if id(parameter) in frozen and num_frozen != before:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
        before = num_frozen
        for number, start in enumerate(range(0, NUM_TRAIN, batch_size)):
            if number % accumulate == 0:
                optimizer.zero_grad()
            (module.loss([x[start : start + batch_size], y[start : start + batch_size]]) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
