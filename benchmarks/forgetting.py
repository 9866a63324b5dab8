"""What does a model that learns a new task still know of the old one, with `DriftBudget` and with what others do?

A small vision transformer learns the digits 0 to 4, then 5 to 9, each from another start for each seed. A task's
accuracy, on its test part, is among its own five digits. Compared are: fine-tuning as it is; early stopping by the
new task's validation loss; L2-SP (Li et al. 2018, arXiv 1802.01483: a penalty on the distance from the old weights);
WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903: interpolation with the old weights afterwards); and DriftBudget,
which is given images of the old task without their labels. Each at several strengths, since all trade one accuracy
for the other.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from common import Result, new_parser, parse, report
from finetuning_tasks import Encoder, Patches
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lit_cka import DriftBudget
from lit_cka.data import DigitsDataModule
from lit_cka.functional.edits import wise_ft

OLD, NEW = range(5), range(5, 10)


class Scores(NamedTuple):
    """Accuracies on the test parts of both tasks."""

    old: float
    new: float


class Classifier(pl.LightningModule):
    """Trained on the digits of one task; with a penalty on the distance from where it began, if there is one."""

    def __init__(self, network: Encoder, digits: range, penalty: float = 0.0) -> None:
        super().__init__()
        self.network, self.digits, self.penalty = network, digits, penalty
        self.start = [parameter.detach().clone() for parameter in network.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def loss(self, batch: list[Tensor]) -> Tensor:
        logits = self(batch[0])[:, self.digits.start : self.digits.stop]
        return cross_entropy(logits, batch[1] - self.digits.start)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.penalty:
            pairs = zip(self.network.parameters(), self.start, strict=True)
            loss = loss + self.penalty / 2 * sum((now - then).square().sum() for now, then in pairs)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.0)


class Tasks:
    """The data of both tasks."""

    def __init__(self, batch_size: int) -> None:
        self.modules = {digits: DigitsDataModule(digits, batch_size) for digits in (OLD, NEW)}
        for module in self.modules.values():
            module.setup("fit")

    def loaders(self, digits: range, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        module = self.modules[digits]
        order = torch.Generator().manual_seed(seed)
        train = DataLoader(module.loader("train").dataset, module.batch_size, shuffle=True, generator=order)
        return train, module.loader("val")

    def probe(self) -> list[Tensor]:
        """Images of the old task, without labels: those that it was trained on."""
        images, _ = self.modules[OLD].loader("train").dataset.tensors
        return list(images.split(256))

    @torch.no_grad()
    def scores(self, network: Encoder) -> Scores:
        network.eval()
        found = []
        for digits, module in self.modules.items():
            images, labels = module.loader("test").dataset.tensors
            chosen = network(images)[:, digits.start : digits.stop].argmax(1) + digits.start
            found.append(float((chosen == labels).float().mean()))
        return Scores(*found)


def fitted(module: Classifier, loaders: Any, epochs: int, *callbacks: pl.Callback) -> Encoder:
    """Train the module."""
    module.network.train()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        pl.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, *loaders)
    return module.network


def ways(tasks: Tasks) -> dict[str, Callable[[], tuple[float, list[pl.Callback]]]]:
    """The penalty of L2-SP and the callbacks of each way to train."""
    found: dict[str, Callable[[], tuple[float, list[pl.Callback]]]] = {
        "fine-tuned": lambda: (0.0, []),
        "early stopping, patience 1": lambda: (0.0, [EarlyStopping("val_loss", patience=1)]),
    }
    for penalty in (0.01, 0.1, 1.0):
        found[f"L2-SP, {penalty:g}"] = partial(lambda value: (value, []), penalty)
    for action in ("stop", "slow", "roll_back"):
        for budget in (0.05, 0.15, 0.4):

            def new(action: Any = action, budget: float = budget) -> tuple[float, list[pl.Callback]]:
                return 0.0, [DriftBudget(budget, action, probe=tasks.probe(), layers="network.blocks.*")]

            found[f"DriftBudget, {action}, {budget:g}"] = new
    return found


def compared(tasks: Tasks, seed: int, args: Any) -> dict[str, Scores]:
    """Learn the old task, and then the new one in every way."""
    pl.seed_everything(seed, verbose=False)
    start = Encoder(Patches(args.width), 16, args.width, 4, 10)
    old = fitted(Classifier(start, OLD), tasks.loaders(OLD, seed), args.old_epochs)
    scores = {"before": tasks.scores(old)}
    for name, new in ways(tasks).items():
        penalty, callbacks = new()
        pl.seed_everything(seed, verbose=False)
        module = Classifier(copy.deepcopy(old), NEW, penalty)
        network = fitted(module, tasks.loaders(NEW, seed), args.epochs, *callbacks)
        scores[name] = tasks.scores(network)
        if name == "fine-tuned":
            for alpha in (0.25, 0.5, 0.75):
                edited = copy.deepcopy(network)
                pairs = zip(edited.parameters(), old.parameters(), strict=True)
                for now, then in pairs:
                    now.data = wise_ft(then.data, now.data, alpha=alpha)
                scores[f"WiSE-FT, {alpha:g}"] = tasks.scores(edited)
    return scores


def interval(values: Sequence[float]) -> str:
    """The mean, and half of its 95 % interval by the t distribution."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--old-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.set_defaults(threads=1)
    args = parse(parser, {"seeds": 1, "old_epochs": 1, "epochs": 1, "width": 8, "batch_size": 128})
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = Tasks(args.batch_size)
    seeds = [compared(tasks, seed, args) for seed in range(args.seeds)]
    rows = []
    for name in seeds[0]:
        ours = [scores[name] for scores in seeds]
        means = [(each.old + each.new) / 2 for each in ours]
        soups = [(scores["WiSE-FT, 0.5"].old + scores["WiSE-FT, 0.5"].new) / 2 for scores in seeds]
        rows.append(
            [
                name,
                interval([each.old for each in ours]),
                interval([each.new for each in ours]),
                interval(means),
                interval([a - b for a, b in zip(means, soups, strict=True)]),
            ]
        )
    columns = ["training", "old digits", "new digits", "mean of both", "minus WiSE-FT, 0.5"]
    caption = f"Mean accuracies with 95 % intervals, over {args.seeds} seeds; the last column is paired."
    report("forgetting", args, [Result("Digits 0 to 4, then 5 to 9", columns, rows, caption)])


if __name__ == "__main__":
    main()
