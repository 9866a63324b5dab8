"""Tiny models and data to train for real, and features and CKA by hand, for the tests of `CKACallback`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests import oracles

WIDTH = 6
NUM_VAL = 44  # 5 WIDTH and some; with batches of 16 the last one is ragged


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    """Residual blocks and a head."""

    def __init__(self, num_blocks: int = 3, width: int = WIDTH, dropout: float = 0.0, num_classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Classifier(pl.LightningModule):
    """A module of the most usual kind, with its losses kept for comparison."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.2) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.lr = lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def dataset(n: int, seed: int = 0, width: int = WIDTH) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) + 2
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 4).long())


def loader(n: int = NUM_VAL, seed: int = 1, batch_size: int = 16, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset(n, seed), batch_size=batch_size, shuffle=shuffle)


def train_loader(batch_size: int = 8) -> DataLoader:
    return loader(32, seed=0, batch_size=batch_size, shuffle=True)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer that writes below `folder`; on the CPU, quiet, without a logger or checkpoints unless asked for."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


class Keeper(pl.Callback):
    """Keeps a copy of the network at every validation and test but the sanity check."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def _keep(self, trainer: pl.Trainer, module: nn.Module) -> None:
        if not trainer.sanity_checking:
            self.models.append(frozen(module))

    on_validation_end = on_test_end = _keep


def frozen(module: nn.Module) -> nn.Module:
    """A copy in eval mode."""
    return copy.deepcopy(module).eval()


Run = Callable[[nn.Module, Any], Any]


def first_item(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def features(
    model: nn.Module,
    layer_names: Iterable[str],
    batches: Iterable[Any],
    run: Run = first_item,
    pool: Callable[[Any, Any], Tensor] = lambda output, batch: output,
) -> dict[str, list[Tensor]]:
    """The output of every layer, pooled, for each of the batches: taken by hand."""
    taken: dict[str, list[Tensor]] = {name: [] for name in layer_names}
    batches = list(batches)
    current: list[Any] = []

    def take(name: str, module: nn.Module, args: Any, output: Any) -> None:
        taken[name].append(pool(output, current[0]).detach().double().clone())

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(take, name)) for name in taken]
    try:
        with torch.no_grad():
            for batch in batches:
                current[:] = [batch]
                run(model.eval(), batch)
    finally:
        for hook in hooks:
            hook.remove()
    return taken


def hand_cka(
    before: nn.Module,
    after: nn.Module,
    layer_names: Sequence[str],
    batches: Iterable[Any],
    estimator: str = "exact",
    debiased: bool = True,
    **how: Any,
) -> dict[str, float]:
    """CKA of each layer by the textbook, of features taken by hand."""
    batches = list(batches)
    X, Y = features(before, layer_names, batches, **how), features(after, layer_names, batches, **how)
    if estimator == "exact":
        return {name: oracles.linear_cka(torch.cat(X[name]), torch.cat(Y[name]), debiased) for name in layer_names}
    return {name: _minibatch_cka(X[name], Y[name]) for name in layer_names}


def _minibatch_cka(X: list[Tensor], Y: list[Tensor]) -> float:
    grams = [(oracles.linear_gram(x.numpy()), oracles.linear_gram(y.numpy())) for x, y in zip(X, Y, strict=True)]
    xy = np.mean([oracles.unbiased_hsic(K, L) for K, L in grams])
    xx = np.mean([oracles.unbiased_hsic(K, K) for K, _ in grams])
    yy = np.mean([oracles.unbiased_hsic(L, L) for _, L in grams])
    return float(xy / np.sqrt(xx * yy))


class PlainLogger(Logger):
    """A logger that keeps numbers and can do nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        pass


BLOCKS = [f"net.blocks.{i}" for i in range(3)]


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks there are on all modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
