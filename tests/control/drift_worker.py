"""A script for `test_drift_ranks.py`: `DriftBudget` on two ranks, under DDP and with parameters that FSDP2 shards.

    python tests/control/drift_worker.py FOLDER JOB [JOB ...]

writes what each rank has seen to `FOLDER/<job>-<rank>.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_cka import CKACallback, DriftBudget
from tests.control.freezing_worker import SECONDS, WORLD_SIZE, shared, work_on
from tests.control.helpers import BATCH_SIZE, NUM_TRAIN, Adam, Chain
from tests.sync_worker import fork_ranks
from tests.tracking.helpers import NUM_VAL, dataset
from tests.tracking.sharded_worker import FlatStrategy

BUDGET = 0.3
MAX_EPOCHS = 4


class Sharding(Adam):
    """Shards each block, and the rest, when it is configured."""

    def configure_model(self) -> None:
        if not isinstance(self.net.head.weight, DTensor):
            assert isinstance(self.net, Chain)
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Single(Adam):
    """In float32, to which Lightning's FSDP casts the module's tensors."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.float()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0].float()), batch[1])


def budget(action: Any, dtype: torch.dtype = torch.float64) -> DriftBudget:
    """A budget that is soon spent, on a probe of which the ranks' shares are uneven."""
    return DriftBudget(BUDGET, action, probe=[dataset(61, 7)[:][0].to(dtype)])


def fitted(folder: Path, action: Any, *others: pl.Callback, kind: type[Adam] = Adam, **options: Any) -> Any:
    """Train on the batches of one process; return what was done, and what came out."""
    torch.manual_seed(0)
    module = kind(lr=0.1)
    callback = budget(action, next(module.parameters()).dtype)
    ways = {"process_group_backend": "gloo"}
    strategy = ModelParallelStrategy(WORLD_SIZE, 1, **ways) if kind is Sharding else DDPStrategy(**ways)  # type: ignore[arg-type]
    checkpoint = options.pop("checkpoint", None)
    run = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=WORLD_SIZE,
        callbacks=[CKACallback(log_figures=False), callback, *others],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=MAX_EPOCHS,
        enable_checkpointing=bool(others),
        **{"strategy": strategy, "logger": False, **options},
    )
    run.fit(module, shared(NUM_TRAIN, 0, BATCH_SIZE // WORLD_SIZE), shared(NUM_VAL, 1, 16), ckpt_path=checkpoint)
    weights = module.state_dict()
    return {
        "weights": {name: value.full_tensor() if isinstance(value, DTensor) else value
                    for name, value in weights.items()},
        "is_sharded": any(isinstance(value, DTensor) for value in weights.values()),
        "history": callback.history,
        "epochs": run.current_epoch,
    }  # fmt: skip


def stop(folder: Path) -> Any:
    return fitted(folder, "stop")


def slow(folder: Path) -> Any:
    """With a logger that has one of TensorBoard's writers."""
    return fitted(folder, "slow", logger=TensorBoardLogger(folder, name="events", version=""))


def roll_back(folder: Path) -> Any:
    return fitted(folder, "roll_back")


def _resumed(folder: Path, action: str) -> Any:
    place = folder / f"resumed-{action}"
    fitted(folder, action, ModelCheckpoint(place, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    again = ModelCheckpoint(place / "again", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    return fitted(folder, action, again, checkpoint=place / "epoch=2.ckpt")


def resumed_slow(folder: Path) -> Any:
    return _resumed(folder, "slow")


def resumed_roll_back(folder: Path) -> Any:
    return _resumed(folder, "roll_back")


def sharded_slow(folder: Path) -> Any:
    return fitted(folder, "slow", kind=Sharding)


def sharded_stop(folder: Path) -> Any:
    return fitted(folder, "stop", kind=Sharding)


def _refused(folder: Path, action: str, **options: Any) -> Any:
    try:
        fitted(folder, action, **options)
    except ValueError as error:
        return {"error": str(error)}
    return {}


def sharded_roll_back(folder: Path) -> Any:
    return _refused(folder, "roll_back", kind=Sharding)


def flat_slow(folder: Path) -> Any:
    return fitted(folder, "slow", kind=Single, strategy=FlatStrategy(process_group_backend="gloo"))


def merged_slow(folder: Path) -> Any:
    """Each layer's parameters are in one with those of all others."""
    strategy = FlatStrategy(process_group_backend="gloo", use_orig_params=False)
    return _refused(folder, "slow", kind=Single, strategy=strategy)


JOBS = {
    job.__name__: job
    for job in (
        stop, slow, roll_back, resumed_slow, resumed_roll_back, sharded_slow, sharded_stop, sharded_roll_back,
        flat_slow, merged_slow,
    )
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[2:]:
        fork_ranks(work_on, JOBS[name], WORLD_SIZE, Path(sys.argv[1]), SECONDS)
