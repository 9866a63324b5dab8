"""Two small models and test sets for `MonoSoupEditor`, and a script for `test_evaluation.py`: on several ranks.

    python tests/editing/evaluation_worker.py FOLDER

writes what each rank has seen to `FOLDER/all_jobs-<world size>-<rank>.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lit_cka import MonoSoupEditor
from lit_cka.data import TestSet, TestSetsDataModule
from lit_cka.data.language import LanguageTestsDataModule
from lit_cka.editing.artifacts import save_results
from tests.sync_worker import fork_ranks
from tests.tracking import ranks_worker
from tests.tracking.helpers import WIDTH, Classifier, Net

NUM_CLASSES = 7
SECONDS = 90
CHOSEN = [1, 3, 0, 5, 2, 6]  # the classes of the test set "chosen"
OPTIONS: dict[str, Any] = {"wise_ft": (0.25, 0.5), "lines": (0.3, 0.6)}


def models() -> tuple[Classifier, Classifier]:
    """A model, and the same after something like a fine-tuning, its BatchNorm included; on every rank the same."""
    generator = torch.Generator().manual_seed(0)

    def randn(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=generator)

    pretrained = Classifier(Net(num_classes=NUM_CLASSES))
    with torch.no_grad():
        for value in pretrained.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.4 * randn(value) if value.ndim > 1 else 1 + 0.3 * randn(value).abs())
        pretrained.net.head.weight.mul_(4)
        finetuned = copy.deepcopy(pretrained)
        for value in finetuned.state_dict().values():
            value.add_(0.2 * randn(value).abs() if value.is_floating_point() else 3)
    return pretrained, finetuned


def samples(n: int, seed: int, num_classes: int = NUM_CLASSES, chosen: list[int] | None = None) -> TensorDataset:
    """Inputs (n, 6), and labels that the fine-tuned model gets right about every other time."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator) + 2
    with torch.no_grad():
        logits = models()[1].eval()(x)
    labels = (logits if chosen is None else logits[:, chosen]).argmax(dim=1)
    noise = torch.randint(num_classes, (n,), generator=generator)
    return TensorDataset(x, torch.where(torch.rand(n, generator=generator) < 0.5, labels, noise))


def choose(logits: Tensor) -> Tensor:
    return logits[:, CHOSEN]


class Counted(Dataset[Any]):
    """Counts how often each item is read."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data
        self.counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.counts[index] += 1
        return self.data[index]


class Sets(TestSetsDataModule):
    """Three test sets of sizes that neither the batch size nor 2 nor 3 divides, one of them with classes of its own."""

    sizes = (37, 41, 10)

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        data = [samples(n, seed) for seed, n in enumerate(self.sizes)]
        data[1] = samples(self.sizes[1], 1, len(CHOSEN), CHOSEN)
        self.data = [Counted(each) for each in data]

    def read_test_sets(self) -> list[TestSet]:
        names, maps = ("clean", "chosen", "few"), (None, choose, None)
        return [TestSet(*arguments) for arguments in zip(names, self.data, maps, strict=True)]


def seen_of(editor: MonoSoupEditor, run: pl.Trainer) -> Any:
    assert editor.results is not None
    logged = {key: value.item() for key, value in run.callback_metrics.items()}
    return {**dataclasses.asdict(editor.results), "records": editor.edited.records, "logged": logged}


def evaluated(rank: int, world_size: int, folder: Path) -> Any:
    """All metrics and CKA, plain and debiased; what one rank alone then writes."""
    seen = {}
    for debiased, sequential in ((False, False), (True, True)):
        pretrained, finetuned = models()
        editor = MonoSoupEditor(
            pretrained.double(), finetuned.double(), debiased=debiased, sequential=sequential, **OPTIONS
        )
        run = ranks_worker.trainer(folder, world_size, precision="64-true")
        run.test(editor, Sets(), verbose=False)
        seen[str(debiased)] = seen_of(editor, run)
    if rank == 0:
        assert editor.results is not None
        save_results(folder / f"results-{world_size}", editor.results, editor.edited.records, {"seed": 0})
    return seen


def shared(rank: int, world_size: int, folder: Path) -> Any:
    """Shares as the user has made them, of other sizes: one rank of three has a single sample."""
    editor = MonoSoupEditor(*(model.double() for model in models()))
    run = ranks_worker.trainer(folder, world_size, precision="64-true", use_distributed_sampler=False)
    shares = {1: [range(37)], **ranks_worker.SHARES}[world_size][rank]
    run.test(editor, DataLoader(Subset(samples(37, 0), shares), batch_size=8), verbose=False)
    return seen_of(editor, run)


def languages(rank: int, world_size: int, folder: Path) -> Any:
    """A language model on texts, choices and answers, whose samples are several rows each."""
    editor = MonoSoupEditor(folder / "pretrained", folder / "finetuned")
    files = {name: str(folder / f"{name}.jsonl") for name in ("texts", "choices", "answers")}
    run = ranks_worker.trainer(folder, world_size, precision="64-true")
    run.test(editor, LanguageTestsDataModule(files, batch_size=2), verbose=False)
    return seen_of(editor, run)


def limited(rank: int, world_size: int, folder: Path) -> Any:
    """CKA over the samples of two batches, which the ranks share; of texts, over their rows."""
    seen = []
    files = {name: str(folder / f"{name}.jsonl") for name in ("texts", "choices")}
    for sources, data in (
        (models(), Sets()),
        ((folder / "pretrained", folder / "finetuned"), LanguageTestsDataModule(files, batch_size=2)),
    ):
        editor = MonoSoupEditor(*sources, max_cka_batches=2)
        run = ranks_worker.trainer(folder, world_size, precision="64-true")
        run.test(editor, data, verbose=False)
        seen.append(seen_of(editor, run))
    return seen


def damaged(rank: int, world_size: int, folder: Path) -> Any:
    """A NaN in a weight that one rank alone edits, which all ranks have to refuse."""
    pretrained, finetuned = models()
    with torch.no_grad():
        finetuned.net.blocks[1].linear.weight[0, 0] = torch.nan
    editor = MonoSoupEditor(pretrained, finetuned)
    try:
        ranks_worker.trainer(folder, world_size).test(editor, Sets(), verbose=False)
    except ValueError as error:
        return str(error)


def all_jobs(rank: int, world_size: int, folder: Path) -> Any:
    tempfile.tempdir = str(folder)  # forked processes end without a word to who would remove files
    jobs = (evaluated, shared, languages, limited, damaged)
    return {job.__name__: job(rank, world_size, folder) for job in jobs}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fork_ranks(ranks_worker.work, all_jobs, 3, folder, SECONDS)  # which have all that two have
