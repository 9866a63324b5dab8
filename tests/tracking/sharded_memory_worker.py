"""For `sharded_worker.py`: what a process takes in a training of a model that two share."""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import CKACallback
from tests.sync_worker import fork_ranks
from tests.tracking import sharded_worker
from tests.tracking.sharded_worker import WAYS, Way, module_of, trainer

SECONDS = 60
WIDTH, NUM_BLOCKS = 768, 8
LAYERS = [f"net.blocks.{i}" for i in range(NUM_BLOCKS)]
GROWTHS: list[int] = []
FULLY_SHARDED = [way for way in WAYS if way.name in ("FSDP2", "FSDP, wrapped")]


class Block(sharded_worker.Block):
    """Of two layers, and 4.5 MiB."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(sharded_worker.Net):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, 2)


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation gives."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return output


class Growth(pl.Callback):
    """Notes how much more memory there is taken in the validation before the training than before it.

    That is the reference's recording, which leaves no trace on a callback, or a sanity check.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()  # what the training before has left would be freed at any time
        self.before = anonymous_bytes()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            GROWTHS.append(anonymous_bytes() - self.before)


def anonymous_bytes() -> int:
    """What this process has taken, without what it could read from files again."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def data(num_samples: int) -> DataLoader[Any]:
    x = torch.randn(num_samples, WIDTH, generator=torch.Generator().manual_seed(num_samples))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def taken(way: Way, folder: Path, *callbacks: pl.Callback) -> dict[str, int]:
    """The largest tensor, and the most memory, of a fit of one step with a validation."""
    module = module_of(way, lr=0.0)
    module.net = network(0)
    GROWTHS.clear()
    run = trainer(way, folder, *callbacks, Growth(), max_epochs=1, limit_train_batches=1)
    with Largest() as largest:
        run.fit(module, data(8), data(16))
    return {"largest": largest.nbytes, "growth": max(GROWTHS)}


def work(way: Way, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning: the processes have been started
    dist.init_process_group("gloo", init_method=f"file://{folder}/memory-{way.name}", rank=rank, world_size=world_size)
    path = folder / f"memory-{way.name}-{rank}.safetensors"
    save_file(network(1).state_dict(), path)
    initial, other = CKACallback(LAYERS), CKACallback(LAYERS, reference=path)
    seen: dict[str, Any] = {
        "bare": taken(way, folder),
        "initial": taken(way, folder, initial),
        "path": taken(way, folder, other),
        "scores": [initial.history[0]["scores"], other.history[0]["scores"]],
        "whole": sum(weight.nbytes for weight in network(0).parameters()),
    }
    (folder / f"memory-{way.name}-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Write what each process has seen to `FOLDER/memory-<way>-<rank>.json`."""
    for way in FULLY_SHARDED:
        fork_ranks(work, way, way.world_size, folder, SECONDS)
