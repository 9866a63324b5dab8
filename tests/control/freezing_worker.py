"""A script for `test_ranks.py`: `FreezeConverged` under DDP on two ranks.

    python tests/control/freezing_worker.py FOLDER JOB [JOB ...]

writes what each rank has seen to `FOLDER/<job>-<rank>.pt`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lit_cka import CKACallback
from tests.control.helpers import BATCH_SIZE, NUM_TRAIN, Adam, freezing, weights
from tests.sync_worker import fork_ranks
from tests.tracking.helpers import NUM_VAL, dataset

WORLD_SIZE, SECONDS = 2, 60


class EachRanksOwn(Adam):
    """Logs a value that turns on the second rank alone, and the names of gradients that come in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.graded: list[list[str]] = []

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("own", float(self.global_rank * self.current_epoch), rank_zero_only=False, sync_dist=False)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.graded.append([name for name, value in self.named_parameters() if value.grad is not None])


def shared(num_samples: int, seed: int, batch_size: int) -> DataLoader[Any]:
    """Batches that together are those of one process; Lightning's own sampler would shuffle the training data."""
    data = dataset(num_samples, seed)
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, shuffle=False))


def fitted(
    folder: Path, *numbers: int, ddp: Any = None, checkpoint: Any = None, others: Any = (), **options: Any
) -> Any:
    torch.manual_seed(0)
    module = EachRanksOwn()
    callback = freezing(*numbers, **{"monitor": "own", "patience": 1, **options.pop("freezing", {})})
    tracked = options.pop("tracked", None)
    run = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=DDPStrategy(**(ddp or {})),
        callbacks=[callback, *([CKACallback(log_figures=False)] if tracked is None else tracked), *others],
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 4, "enable_checkpointing": bool(others), **options},
    )
    run.fit(module, shared(NUM_TRAIN, 0, BATCH_SIZE // WORLD_SIZE), shared(NUM_VAL, 1, 16), ckpt_path=checkpoint)
    return {
        "weights": weights(module),
        "graded": module.graded,
        "history": callback.history,
        "steps": callback.savings.num_steps,
        "ddp": isinstance(run.strategy.model, DistributedDataParallel) or type(run.strategy.model).__name__,
    }


def plain(folder: Path) -> Any:
    return fitted(folder, 0, 1, 3)


def accumulated(folder: Path) -> Any:
    return fitted(folder, 0, 1, 3, accumulate_grad_batches=2)


def with_views(folder: Path) -> Any:
    return fitted(folder, 0, 1, 3, ddp={"gradient_as_bucket_view": True, "static_graph": True})


def cached(folder: Path) -> Any:
    return fitted(folder, 0, 1, 3, freezing={"cache": "memory"})


def turning(folder: Path) -> Any:
    """What turns on the second rank alone is no matter, and on the first it is for both."""
    return fitted(folder, 2)


def resumed(folder: Path) -> Any:
    place = folder / "resumed"
    saving = ModelCheckpoint(place, filename="{epoch}", save_top_k=-1)
    fitted(folder, 0, 1, 3, others=[saving], max_epochs=3)
    return fitted(folder, 0, 1, 3, others=[saving], checkpoint=place / "epoch=2.ckpt")


def measured(folder: Path) -> Any:
    """By what it measures itself; the share is so large that all has converged after one evaluation."""
    return fitted(folder, freezing={"policy": None, "share": 99.0, "max_frozen": 1}, tracked=())


JOBS = {job.__name__: job for job in (plain, accumulated, with_views, cached, turning, resumed, measured)}


def work(job: Callable[[Path], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning, which takes it that all ranks are started
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{job.__name__}-meeting", rank=rank, world_size=WORLD_SIZE
    )
    torch.save(job(folder), folder / f"{job.__name__}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def work_on(job: Callable[[Path], Any], rank: int, world_size: int, folder: Path) -> None:
    work(job, rank, folder)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        fork_ranks(work_on, JOBS[name], WORLD_SIZE, Path(sys.argv[1]), SECONDS)
