"""Memory and time of a bare fit and of a tracked one, in a process of their own: `python memory_worker.py CASE`.

Prints, of each, the growth of the resident memory at its highest during the fit, what the process has at its highest,
and how long the CPU took for each epoch's validation.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import CKACallback

WIDTH = 64  # of the samples


class Scaled(nn.Module):
    """A layer whose output is wide and whose weights are few."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


class Case(NamedTuple):
    """A network's layers, and the samples of a validation."""

    layer: Any
    num_layers: int
    width: int
    num_samples: int
    batch_size: int
    epochs: int

    @property
    def feature_bytes(self) -> int:
        """Of the features in float64, of the live model and of the reference."""
        return 2 * 8 * self.num_layers * self.num_samples * self.width


CASES = {
    "heavy": Case(lambda width: nn.Linear(width, width), 12, 2048, 32, 8, 2),  # 192 MiB of weights
    "wide": Case(Scaled, 4, 4096, 128, 32, 6),
    "deep and wide": Case(Scaled, 32, 4096, 512, 64, 2),
}


class Module(pl.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, case.width)
        self.blocks = nn.ModuleList(case.layer(case.width) for _ in range(case.num_layers))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head.weight.sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("mean", self(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Timer(pl.Callback):
    """The first callback, which begins before the others do, and ends after them all where it is the last as well."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds, self._start = seconds, 0.0

    def on_validation_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, *args: Any) -> None:
        self._seconds.append(time.process_time() - self._start)


def kilobytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def fit(module: Module, case: Case, *callbacks: pl.Callback) -> dict[str, Any]:
    data = TensorDataset(torch.randn(case.num_samples, WIDTH, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(data, case.batch_size)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=case.epochs, limit_train_batches=1, num_sanity_val_steps=0, logger=False,
            callbacks=[Timer(seconds), *callbacks], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = kilobytes("VmRSS")
        trainer.fit(module, loader, loader)
        peak = kilobytes("VmHWM")
    return {"growth": (peak - before) * 1024, "peak": peak * 1024, "seconds": seconds}


def main(case: Case) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    module, callback = Module(case), CKACallback(layers="blocks.*", log_figures=False)
    fit(module, case._replace(epochs=1))  # what is loaded and kept once
    seen = {"bare": fit(module, case), "tracked": fit(module, case, callback)}
    print("\n" + json.dumps({**seen, "n": callback.history[-1]["n"], "scores": list(callback.scores.values())}))


if __name__ == "__main__":
    main(CASES[sys.argv[1]])
