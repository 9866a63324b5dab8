"""A script for `test_ranks.py`: `CKACallback` on several ranks, on data that can't be shared out evenly.

    python tests/tracking/ranks_worker.py FOLDER HOW

writes what each rank has seen to `FOLDER/<job>-<world size>-<rank>.json`. HOW is "forked": the ranks of many trainers
are forked here, as a cluster would start them, and those of "ddp_fork" by Lightning; or another of its strategies that
start the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from lit_cka import CKACallback
from lit_cka.tracking.tracker import Estimator
from tests.sync_worker import fork_ranks
from tests.tracking.helpers import WIDTH, Classifier, dataset, loader, train_loader

SECONDS = 60
NUM_UNEVEN = 37  # samples, for 2 and for 3 ranks
NUM_MISSING = 3


class Case(NamedTuple):
    num_samples: int
    batch_size: int
    kind: str


CASES = [
    *(Case(n, 3, "exact") for n in range(2, 11)),
    *(Case(n, 1, "exact") for n in (2, 5, 9)),
    *(Case(n, size, "exact") for n, size in ((37, 4), (37, 64), (44, 8))),
    *(Case(n, 3, "debiased") for n in (4, 5, 7, 10, 37)),
    *(Case(n, size, "minibatch") for n, size in ((10, 4), (13, 4), (37, 8), (44, 5))),
    *(Case(n, 3, "shuffled") for n in (2, 5, 10, 37)),
    *(Case(n, 3, "dropping") for n in (8, 37)),
    *(Case(n, 3, "limited") for n in (10, 37)),
]
ESTIMATORS: tuple[Estimator, ...] = ("exact", "minibatch")
RESHUFFLED_SIZE = 8
PLAIN = {"debiased": False}
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys((case.kind for case in CASES), PLAIN),
    "debiased": {},
    "minibatch": {"estimator": "minibatch"},
}
# Each rank's own share of the samples, by number of ranks. None is empty: there Lightning skips the validation.
SHARES = {2: [range(30), range(30, 37)], 3: [range(20), range(20, 36), range(36, 37)]}


class Counted(Classifier):
    """Counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(x)


def models() -> tuple[Counted, Classifier]:
    """A reference and a live model, the same on every rank. In float64, where other batches make no difference."""
    pl.seed_everything(1, verbose=False)
    reference = Counted()
    pl.seed_everything(2, verbose=False)
    return reference.double(), Classifier().double()


def trainer(folder: Path, world_size: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world_size,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"strategy": "ddp", "max_epochs": 2, "enable_checkpointing": False, **options},
    )


def logged(run: pl.Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in run.callback_metrics.items() if key.startswith("cka/")}


def validated(rank: int, world_size: int, folder: Path) -> Any:
    """Every case twice with one callback: the second time the reference's features come from the cache."""
    seen = []
    for case in CASES:
        reference, module = models()
        callback = CKACallback(reference=reference, **OPTIONS[case.kind])
        data, sampler = dataset(case.num_samples, 1), None
        if case.kind in ("shuffled", "dropping"):
            shuffle, drop_last = case.kind == "shuffled", case.kind == "dropping"
            sampler = DistributedSampler(data, world_size, rank, shuffle=shuffle, drop_last=drop_last)
        run = trainer(
            folder,
            world_size,
            callback,
            precision="64-true",
            use_distributed_sampler=sampler is None,
            limit_val_batches=1 if case.kind == "limited" else 1.0,
        )
        means = []
        for _ in range(2):
            run.validate(module, DataLoader(data, case.batch_size, sampler=sampler), verbose=False)
            means.append(logged(run)["cka/mean"])
        seen.append({"history": callback.history, "means": means, "num_calls": reference.num_calls})
    return seen


def too_few(rank: int, world_size: int, folder: Path) -> Any:
    """One sample, which all ranks have to refuse, or some would wait for the others."""
    reference, module = models()
    try:
        run = trainer(folder, world_size, CKACallback(reference=reference), precision="64-true")
        run.validate(module, loader(1), verbose=False)
    except ValueError as error:
        return str(error)


def changed(rank: int, world_size: int, folder: Path) -> Any:
    """Twice, the second time with another last sample, which one rank alone has; and once more."""
    reference, module = models()
    callback = CKACallback(reference=reference)
    run = trainer(folder, world_size, callback, precision="64-true")
    x, y = (values.clone() for values in dataset(NUM_UNEVEN, 1).tensors)
    num_calls = []
    for number in range(3):
        if number == 1:
            x[-1] += 3
        data = TensorDataset(x.clone(), y)
        run.validate(module, DataLoader(data, batch_size=4), verbose=False)
        num_calls.append(reference.num_calls)
    return {"history": callback.history, "num_calls": num_calls}


def shared(rank: int, world_size: int, folder: Path) -> Any:
    """Shares as the user has made them: one much smaller, and of three one of a single sample."""
    reference, module = models()
    callback = CKACallback(reference=reference)
    run = trainer(folder, world_size, callback, precision="64-true", use_distributed_sampler=False)
    for _ in range(2):
        data = DataLoader(Subset(dataset(NUM_UNEVEN, 1), SHARES[world_size][rank]), batch_size=8)
        run.validate(module, data, verbose=False)
    return {"history": callback.history, "logged": logged(run)}


def fitted(rank: int, world_size: int, folder: Path) -> Any:
    """A fit, and a test after it."""
    pl.seed_everything(0, verbose=False)
    reference, module = Counted(), Classifier()
    callback = CKACallback(reference=reference)
    run = trainer(folder, world_size, callback)
    run.fit(module, train_loader(), loader(NUM_UNEVEN))
    seen = {"logged": logged(run), "num_calls": reference.num_calls}
    run.test(module, loader(10), verbose=False)
    return {**seen, "history": callback.history}


def reshuffled(rank: int, world_size: int, folder: Path) -> Any:
    """A fit that changes nothing, in which samples come to other ranks in each validation."""
    seen = {}
    for estimator in ESTIMATORS:
        reference, module = models()
        module.lr = 0.0
        for block in module.net.blocks:
            block.norm.momentum = 0.0
        callback = CKACallback(reference=reference, estimator=estimator)
        run = trainer(folder, world_size, callback, precision="64-true")
        sampler = reshuffling(rank, world_size)
        run.fit(module, train_loader(), DataLoader(sampler.dataset, RESHUFFLED_SIZE, sampler=sampler))
        seen[estimator] = callback.history
    return seen


def reshuffling(rank: int, world_size: int) -> DistributedSampler[Any]:
    return DistributedSampler(dataset(44, 1), world_size, rank, seed=5)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def missing(rank: int, world_size: int, folder: Path) -> Any:
    """Twice, the second time with samples on the last rank that have not been there before."""
    reference, module = models()
    callback = CKACallback(reference=reference)
    run = trainer(folder, world_size, callback, precision="64-true")
    own = [dataset(NUM_UNEVEN, 1)[index] for index in range(rank, NUM_UNEVEN, world_size)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.validate(module, DataLoader(Stream(own), batch_size=4), verbose=False)
        if rank == world_size - 1:
            own = [dataset(NUM_MISSING, 9)[index] for index in range(NUM_MISSING)] + own[NUM_MISSING:]
        run.validate(module, DataLoader(Stream(own), batch_size=4), verbose=False)
    texts = [str(each.message) for each in warned]
    return {"history": callback.history, "warned": [text for text in texts if "are left out" in text]}


class Gathering(Classifier):
    """Its step works with the other ranks, and takes statistics of the batch."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        for block in self.net.blocks:
            block.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("mean", self.all_gather(self(batch[0])).mean(), on_step=True, on_epoch=True, sync_dist=True)


class Allowing(Gathering):
    """Its step does not, and a rank may be without data."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


def skipping(rank: int, world_size: int, folder: Path) -> Any:
    """Two validations, of which the last rank takes no part in the first."""
    module = Allowing().double()
    callback = CKACallback()
    run = trainer(folder, world_size, callback, precision="64-true", use_distributed_sampler=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for has_none in (True, False):
            own = [] if has_none and rank == world_size - 1 else range(rank, NUM_UNEVEN, world_size)
            run.validate(module, DataLoader(dataset(NUM_UNEVEN, 1), 8, sampler=own), verbose=False)
    texts = [str(each.message) for each in warned]
    return {"history": callback.history, "warned": [text for text in texts if "CKA" in text]}


def mixing(rank: int, world_size: int, folder: Path) -> Any:
    """Fits that change nothing, in which samples come in other batches in each validation."""
    seen = {}
    for kind in (Gathering, Allowing):
        pl.seed_everything(0, verbose=False)
        module, callback = kind(), CKACallback(debiased=True)
        run = trainer(folder, world_size, callback, max_epochs=4, use_distributed_sampler=False)
        sampler = reshuffling(rank, world_size)
        data = [DataLoader(sampler.dataset, RESHUFFLED_SIZE, sampler=sampler)]
        if kind is Allowing:
            is_last = rank == world_size - 1
            data.append(DataLoader(dataset(20, 3), 8, sampler=[] if is_last else range(20)))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run.fit(module, train_loader(), data)
        texts = [str(each.message) for each in warned]
        seen[kind.__name__] = {
            "warned": [text for text in texts if "other samples of its batch" in text],
            "history": callback.history,
            "mean": {name: value.item() for name, value in run.callback_metrics.items() if "mean_" in name},
        }
    return seen


def probed(rank: int, world_size: int, folder: Path) -> Any:
    """A validation on probes of five batches, of two, which leave a rank of three without, and shuffled; and a fit."""
    seen = {}
    for num_samples in (NUM_UNEVEN, 10):
        reference, module = models()
        callback = CKACallback(reference=reference, probe=loader(num_samples, batch_size=8))
        run = trainer(folder, world_size, callback, precision="64-true")
        for _ in range(2):
            run.validate(module, loader(20, seed=3), verbose=False)
        seen[str(num_samples)] = callback.history
    reference, module = models()
    os.environ.pop("PL_GLOBAL_SEED")  # with which Lightning would seed all alike
    torch.manual_seed(rank)
    callback = CKACallback(reference=reference, probe=loader(NUM_UNEVEN, batch_size=8, shuffle=True))
    trainer(folder, world_size, callback, precision="64-true").validate(module, loader(20, seed=3), verbose=False)
    seen["shuffled"] = callback.history
    pl.seed_everything(0, verbose=False)
    callback = CKACallback(probe=loader(10, batch_size=8), probe_every_n_steps=1)
    run = trainer(folder, world_size, callback)
    run.fit(Classifier(), train_loader())
    return {**seen, "fit": callback.history, "logged": logged(run)}


def lacking(rank: int, world_size: int, folder: Path) -> Any:
    """The last rank has no sample, known before or not; or no file with the reference."""
    is_last = rank == world_size - 1
    seen: dict[str, Any] = {}
    empty = DataLoader(Subset(dataset(NUM_UNEVEN, 1), range(0 if is_last else NUM_UNEVEN)), batch_size=8)
    for name, options in {"tracked": {}, "probed": {"probe": loader(8)}, "other stage": {"stages": ("test",)}}.items():
        _, module = models()
        module.allow_zero_length_dataloader_with_multiple_devices = True
        run = trainer(folder, world_size, CKACallback(**options), use_distributed_sampler=False, precision="64-true")
        try:
            seen[name] = f"no error but {run.validate(module, empty, verbose=False)}"
        except ValueError as error:
            seen[name] = str(error)
    reference, module = models()
    callback = CKACallback(reference=reference)
    run = trainer(folder, world_size, callback, precision="64-true")
    x, y = dataset(NUM_UNEVEN, 1)[: NUM_UNEVEN if rank == 0 else 0]
    stream = Stream(list(zip(x.double(), y, strict=True)))
    run.validate(module, DataLoader(stream, batch_size=8), verbose=False)
    seen["stream"] = callback.history
    path = folder / f"reference-{world_size}{'-gone' if is_last else ''}.pt"
    if rank == 0:
        torch.save(reference.state_dict(), path)
    dist.barrier()
    try:
        run = trainer(folder, world_size, CKACallback(reference=path), precision="64-true")
        run.validate(module, loader(NUM_UNEVEN), verbose=False)
    except OSError as error:
        seen["file"] = str(error)
    return seen


def continued(rank: int, world_size: int, folder: Path) -> Any:
    """A fit that 2 ranks have begun, gone on with by as many, by more, and by one: the model stays as it is."""
    place = folder / "continued"
    reference, module = models()
    module.lr = 0.0
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm1d)):
        norm.momentum = 0.0
    callback = CKACallback(reference=reference)
    checkpoint = place / "first.ckpt"
    is_resumed = checkpoint.exists()
    dist.barrier()
    saving = [] if is_resumed else [ModelCheckpoint(place, filename="first")]
    options = {"enable_checkpointing": not is_resumed, "max_epochs": 1 + is_resumed, "precision": "64-true"}
    run = trainer(place, world_size, callback, *saving, **options)
    run.fit(module, train_loader(), loader(NUM_UNEVEN), ckpt_path=checkpoint if is_resumed else None)
    return callback.history


def work(job: Callable[[int, int, Path], Any], rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning, which takes it that all ranks are started
    meeting = f"file://{folder}/{job.__name__}-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    write(job(rank, world_size, folder), folder, job.__name__, world_size, rank)
    dist.barrier()
    dist.destroy_process_group()


def write(seen: Any, folder: Path, name: str, world_size: int, rank: int) -> None:
    (folder / f"{name}-{world_size}-{rank}.json").write_text(json.dumps(seen))


def fork_all(folder: Path) -> None:
    jobs = (validated, too_few, changed, fitted, shared, reshuffled, missing, skipping, mixing, probed, lacking)
    for job in jobs:
        fork_ranks(
            work, job, 3, folder, SECONDS
        )  # with samples that do not share out evenly, three have all that two have
    for world_size in (2, 3, 1):
        fork_ranks(work, continued, world_size, folder, SECONDS)


class Writer(pl.Callback):
    """Writes what its process has seen: where Lightning starts the processes, nothing else comes back from them."""

    def __init__(self, folder: Path, name: str, callback: CKACallback) -> None:
        self.folder = folder
        self.name = name
        self.callback = callback

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        start_method = getattr(trainer.strategy.launcher, "_start_method", "script")
        seen = {"history": self.callback.history, "logged": logged(trainer), "started by": start_method}
        write(seen, self.folder, f"{self.name}-{trainer.state.fn.value}", trainer.world_size, trainer.global_rank)


def launched(folder: Path, strategy: str) -> None:
    """A fit and a validation on two ranks that Lightning starts."""
    pl.seed_everything(0, verbose=False)
    callback = CKACallback()
    options: dict[str, Any] = {"strategy": strategy}
    run = trainer(folder, 2, callback, Writer(folder, strategy, callback), **options)
    run.fit(Classifier(), train_loader(), loader(NUM_UNEVEN))
    reference, module = models()
    callback = CKACallback(reference=reference)
    run = trainer(folder, 2, callback, Writer(folder, strategy, callback), precision="64-true", **options)
    run.validate(module, loader(NUM_UNEVEN), verbose=False)


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    if how == "forked":
        fork_all(folder)
    torch.set_num_threads(1)
    launched(folder, "ddp_fork" if how == "forked" else how)
