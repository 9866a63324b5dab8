"""A script for `test_sharded.py`: trainings of one model as a whole, and in parts on 2 and on 4 processes.

    python tests/tracking/sharded_worker.py FOLDER

writes what each process has seen to `FOLDER/<way>-<rank>.json`. The processes are forked after the imports, which take
the most time, and before the first tensor, so that no thread pool is forked with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # once, rather than in every process
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lit_cka import CKACallback
from lit_cka.features import select_layers
from tests.sync_worker import fork_ranks
from tests.tracking.helpers import WIDTH, dataset, hooks_of

SECONDS = 100
HIDDEN = 10  # by a whole layer; shared out unevenly by none of the ways
NUM_TRAIN, NUM_VAL, NUM_TEST = 64, 37, 23
BATCH_SIZE = 16  # of all processes together
LEARNING_RATE = 0.05
LAYERS = [f"net.blocks.{i}{part}" for i in range(2) for part in ("", ".norm", ".up", ".act", ".down")]


class Way(NamedTuple):
    """How many processes have different samples, how many share a model, and what shards it between the former."""

    name: str
    data: int = 1
    tensor: int = 1
    flat: bool = False

    @property
    def world_size(self) -> int:
        return self.data * self.tensor


WHOLE = Way("whole")
WAYS = [
    Way("FSDP2", data=2),
    Way("tensor", tensor=2),
    Way("both", data=2, tensor=2),
    Way("FSDP", data=2, flat=True),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


class Module(pl.LightningModule):
    """Shards its network when it is configured, once."""

    def __init__(self, way: Way, lr: float = LEARNING_RATE) -> None:
        super().__init__()
        self.net, self.lr = network(0), lr
        self._way = way

    def configure_model(self) -> None:
        way, net = self._way, self.net
        self._way = WHOLE
        if way.tensor > 1:
            for block in net.blocks:
                styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], styles)
        if way.data > 1 and not way.flat:
            for part in (*net.blocks, net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        if way.flat:
            net.blocks[0] = flat(net.blocks[0])
            self.net = flat(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def flat(module: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


class FlatStrategy(FSDPStrategy):
    """Lightning's FSDP asks for an accelerator, by its exact type, and wraps what has not been wrapped on it."""


def strategy(way: Way) -> Strategy | str:
    if way.world_size == 1:
        return "auto"
    if way.flat:
        return FlatStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(way.data, way.tensor, process_group_backend="gloo")


def trainer(way: Way, folder: Path, *callbacks: pl.Callback, max_epochs: int = 2) -> pl.Trainer:
    has_checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=way.world_size,
        strategy=strategy(way),
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=has_checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train_loader(way: Way, rank: int) -> DataLoader[Any]:
    """Batches that are the same on all processes together, however many they are."""
    data = dataset(NUM_TRAIN, 0)
    sampler = DistributedSampler(data, way.data, rank // way.tensor, shuffle=False)
    return DataLoader(data, BATCH_SIZE // way.data, sampler=sampler)


def loader(num_samples: int) -> DataLoader[Any]:
    return DataLoader(dataset(num_samples, num_samples), batch_size=8)


def weights_of(module: nn.Module) -> str:
    """A hash of what this process has of the weights."""
    digest = hashlib.sha256()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for name, tensor in module.named_parameters():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode() + local.detach().clone().numpy().tobytes())
    return digest.hexdigest()


def fitted(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """A fit and a test after it; and the same fit without the callback."""
    callback, module = CKACallback(LAYERS), Module(way)
    run = trainer(way, folder, callback)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    seen = {
        "logged": {key: value.item() for key, value in run.callback_metrics.items()},
        "weights": weights_of(module),
        "hooks": hooks_of(module),
    }
    run.test(module, loader(NUM_TEST), verbose=False)
    bare = Module(way)
    trainer(way, folder).fit(bare, train_loader(way, rank), loader(NUM_VAL))
    seen |= {"weights of bare": weights_of(bare), "hooks of bare": hooks_of(bare), "weights tested": weights_of(module)}
    return {**seen, "history": callback.history, "layers": select_layers(module)}


def still(way: Way, rank: int, folder: Path) -> Any:
    """A fit at a learning rate of 0."""
    callback, module = CKACallback(LAYERS), Module(way, lr=0.0)
    run = trainer(way, folder, callback, max_epochs=1)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    run.test(module, loader(NUM_TEST), verbose=False)
    return callback.history


def compared(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """Fits of one epoch against other weights of the same architecture: a state dict, its file, and a module."""
    other = network(1)
    path = folder / f"other-{way.name}-{rank}.safetensors"
    save_file(other.state_dict(), path)
    references = {"state dict": other.state_dict(), "path": path, "module": other}
    seen = {}
    for name, reference in references.items():
        callback, module = CKACallback(LAYERS, reference=reference), Module(way)
        run = trainer(way, folder, callback, max_epochs=1)
        run.fit(module, train_loader(way, rank), loader(NUM_VAL))
        seen[name] = callback.history
        seen[f"weights, {name}"] = weights_of(module)
    return seen


def resumed(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """A fit of one epoch, resumed in other objects for another, and a test of data that were not there before."""
    place = folder / f"resumed-{way.name}"
    checkpoints = ModelCheckpoint(place, filename="first")
    run, module = trainer(way, place, CKACallback(LAYERS), checkpoints, max_epochs=1), Module(way)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    weights = weights_of(module)
    callback, module = CKACallback(LAYERS), Module(way)
    run = trainer(way, place, callback)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL), ckpt_path=checkpoints.best_model_path)
    run.test(module, loader(NUM_TEST), verbose=False)
    return {"history": callback.history, "weights of one epoch": weights}


def probed(way: Way, rank: int, folder: Path) -> str:
    """What is said where a sharded model is to run on a probe."""
    try:
        callback = CKACallback(LAYERS, probe=loader(NUM_TEST))
        trainer(way, folder, callback, max_epochs=1).fit(Module(way), train_loader(way, rank), loader(NUM_VAL))
    except ValueError as error:
        return str(error)
    return "no error"


def work(way: Way, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world_size > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning: the processes have been started
        meeting = f"file://{folder}/{way.name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    seen = {}
    for job in (fitted, still, compared, resumed, probed):
        seen[job.__name__] = job(way, rank, folder)
        (folder / f"{way.name}-{rank}.json").write_text(json.dumps(seen))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    for way in (WHOLE, *WAYS):
        fork_ranks(work, way, way.world_size, Path(sys.argv[1]), SECONDS)
