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
from collections.abc import Callable, Sequence
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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, Subset

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
    """How many processes have different samples, how many share a model, and what shards it between the former.

    That is FSDP2 by default; "flat" is FSDP around parts, as the module wraps them, and "wrapped" is FSDP as Lightning
    wraps it around the LightningModule. Some ways can't do all, without the callback either: test a module that they
    have fitted, load a checkpoint for a test, or save one.
    """

    name: str
    data: int = 1
    tensor: int = 1
    kind: str = ""
    tests_again: bool = True
    tests_checkpoints: bool = True
    saves: bool = True
    variant: str = ""
    tolerance: float = 1e-6  # of scores

    @property
    def world_size(self) -> int:
        return self.data * self.tensor

    @property
    def whole(self) -> Way:
        """The same model in one process."""
        shown = self.variant if self.variant in ("tied", "frozen") else ""
        return Way(f"whole{shown}", variant=shown)


WHOLE = Way("whole")
FSDP2, TENSOR = Way("FSDP2", data=2), Way("tensor", tensor=2)
GROWN = Way("FSDP2 of 3", data=3)
WAYS = [
    FSDP2,
    TENSOR,
    Way("FSDP", data=2, kind="flat"),
    Way("FSDP, wrapped", data=2, kind="wrapped", tests_again=False),
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


def network(seed: int, variant: str = "") -> Net:
    torch.manual_seed(seed)
    net = Net()
    if variant == "tied":
        net.blocks[1].norm.weight = net.blocks[0].norm.weight
    if variant == "frozen":
        net.blocks[0].requires_grad_(False)
    return net


class Module(pl.LightningModule):
    """Leaves it to the strategy to shard its network, if it is to be sharded."""

    def __init__(self, way: Way, lr: float = LEARNING_RATE) -> None:
        super().__init__()
        self.net, self.lr = network(0, way.variant), lr
        self._way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.trainer.model.parameters() if self._way.variant == "without names" else self.parameters()
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)


FSDP2_VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept": {"reshard_after_forward": False},
}
FSDP_VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    "gradients": {"sharding_strategy": "SHARD_GRAD_OP"},
    "not sharded": {"sharding_strategy": "NO_SHARD"},
    "checkpointing": {"activation_checkpointing_policy": {Block}},
    "without names": {"use_orig_params": False},
}


class Sharding(Module):
    """Shards its network when it is configured, once."""

    def configure_model(self) -> None:
        way, net = self._way, self.net
        self._way = WHOLE
        if way.tensor > 1:
            for block in net.blocks:
                styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], styles)
        if way.kind == "flat":
            net.blocks[0] = flat(net.blocks[0])
            self.net = flat(net)
        elif way.data > 1:
            self._shard(way, net)

    def _shard(self, way: Way, net: Net) -> None:
        options = FSDP2_VARIANTS.get(way.variant, {})
        if way.variant == "ignored":
            options = {"ignored_params": set(net.head.parameters())}
        for index, block in enumerate(net.blocks):
            if way.variant == "checkpointing":
                net.blocks[index] = checkpoint_wrapper(block)
            if way.variant == "compile":
                block.compile()
        for part in (*net.blocks, net) if way.variant != "tied" else (net,):
            fully_shard(part, mesh=self.device_mesh["data_parallel"], **options)


def module_of(way: Way, lr: float = LEARNING_RATE) -> Module:
    return (Module if way.kind.startswith(("wrapped", "zero")) else Sharding)(way, lr)


def predicting(module: Module) -> Module:
    """The same module of a class that has a `predict_step`."""

    class Predicting(type(module)):  # type: ignore[misc]
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0] * (batch_idx + 1))

    module.__class__ = Predicting
    return module


def flat(module: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


class FlatStrategy(FSDPStrategy):
    """Lightning's FSDP asks for an accelerator, by its exact type, and wraps what has not been wrapped on it."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return super()._setup_model(model)
        options = {"mixed_precision": self.mixed_precision, "sharding_strategy": self.sharding_strategy, **self.kwargs}
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        if self._activation_checkpointing_kwargs:
            apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
        return wrapped


def strategy(way: Way) -> Strategy | str:
    if way.world_size == 1:
        return "auto"
    if way.kind == "wrapped":
        policy = {} if way.variant == "tied" else {"auto_wrap_policy": {Block}}
        return FlatStrategy(process_group_backend="gloo", **policy, **FSDP_VARIANTS.get(way.variant, {}))
    if way.kind == "flat":
        return FlatStrategy(process_group_backend="gloo")
    if way.kind.startswith("zero"):
        from tests.tracking.deepspeed_worker import zero_strategy

        return zero_strategy(way)
    return ModelParallelStrategy(way.data, way.tensor, process_group_backend="gloo")


def trainer(way: Way, folder: Path, *callbacks: pl.Callback, max_epochs: int = 2, **options: Any) -> pl.Trainer:
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
        **options,
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
        local = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        digest.update(name.encode() + local.detach().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def message_of(function: Callable[[], object]) -> str:
    """What a function says that fails."""
    try:
        function()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "no error"


def fitted(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """A fit and a test after it; and the same fit without the callback."""
    callback, module = CKACallback(LAYERS), module_of(way)
    run = trainer(way, folder, callback)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    seen = {
        "logged": {key: value.item() for key, value in run.callback_metrics.items()},
        "weights": weights_of(module),
        "hooks": hooks_of(module),
    }
    if way.tests_again:
        run.test(module, loader(NUM_TEST), verbose=False)
    bare = module_of(way)
    trainer(way, folder).fit(bare, train_loader(way, rank), loader(NUM_VAL))
    seen |= {"weights of bare": weights_of(bare), "hooks of bare": hooks_of(bare), "weights tested": weights_of(module)}
    return {**seen, "history": callback.history, "layers": select_layers(module)}


def still(way: Way, rank: int, folder: Path) -> Any:
    """A fit at a learning rate of 0."""
    callback, module = CKACallback(LAYERS), module_of(way, lr=0.0)
    run = trainer(way, folder, callback, max_epochs=1)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    if way.tests_again:
        run.test(module, loader(NUM_TEST), verbose=False)
    return callback.history


def compared(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """Fits of one epoch against other weights of the same architecture: a state dict, its file, and a module."""
    other = network(1, way.variant)
    path = folder / f"other-{way.name}-{rank}.safetensors"
    save_file({name: weight.clone() for name, weight in other.state_dict().items()}, path)
    references = {"state dict": other.state_dict(), "path": path, "module": other}
    bare = module_of(way)
    trainer(way, folder, max_epochs=1).fit(bare, train_loader(way, rank), loader(NUM_VAL))
    seen: dict[str, Any] = {"weights of bare": weights_of(bare)}
    for name, reference in references.items():
        callback, module = CKACallback(LAYERS, reference=reference), module_of(way)
        run = trainer(way, folder, callback, max_epochs=1)
        data = train_loader(way, rank), loader(NUM_VAL)
        seen[f"message, {name}"] = message_of(lambda run=run, module=module, data=data: run.fit(module, *data))
        seen[name] = callback.history
        seen[f"weights, {name}"] = weights_of(module)
        model = callback._recorder.model
        seen[f"beside, {name}"] = model is not None and model.tracker.running is not None
    return seen


def resumed(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """A fit of one epoch, resumed in other objects for another, and tests of data that were not there before."""
    place = folder / f"resumed-{way.name}"
    checkpoints = ModelCheckpoint(place, filename="first")
    run, module = trainer(way, place, CKACallback(LAYERS), checkpoints, max_epochs=1), module_of(way)
    run.fit(module, train_loader(way, rank), loader(NUM_VAL))
    first = checkpoints.best_model_path

    def resume(callback: CKACallback, way: Way = way) -> None:
        module, run = module_of(way), trainer(way, place, callback)
        run.fit(module, train_loader(way, rank), loader(NUM_VAL), ckpt_path=first)
        if way.tests_again:
            run.test(module, loader(NUM_TEST), verbose=False)

    def test(callback: CKACallback) -> None:
        trainer(way, place, callback).test(module_of(way), loader(NUM_TEST), ckpt_path=first, verbose=False)

    callback, alone = CKACallback(LAYERS), CKACallback(LAYERS)
    resume(callback)
    if way.tests_checkpoints:
        test(alone)
    seen = {"history": callback.history, "history of a test": alone.history}
    if way == FSDP2:  # on as many processes, which have other shards
        seen["shared out again"] = message_of(lambda: resume(CKACallback(LAYERS), TENSOR))
    if way.world_size > 1:
        dist.barrier()
    if rank == way.world_size - 1:  # of one process alone, if each has a file
        file = max(place.glob("cka_reference_*"))
        file.write_bytes(file.read_bytes()[:-8] + b"8 others")
    if way.world_size > 1:
        dist.barrier()
    if way.tests_checkpoints:
        seen["damaged"] = message_of(lambda: test(CKACallback(LAYERS)))
    return seen


def probed(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """Fits with probes of three batches, and of one, which not every process has one of."""
    several, one = loader(NUM_TEST), list(loader(8))
    seen = {}
    for name, probe, every in (("several", several, 3), ("one", one, None)):
        callback = CKACallback(LAYERS, probe=probe, probe_every_n_steps=every)
        module = module_of(way) if name == "several" else predicting(module_of(way))
        trainer(way, folder, callback, max_epochs=1).fit(module, train_loader(way, rank), loader(NUM_VAL))
        seen[name] = callback.history
        seen[f"weights, {name}"] = weights_of(module)
    own = several if rank == 0 else []
    callback = CKACallback(LAYERS, probe=own)
    run = trainer(way, folder, callback, max_epochs=1)
    seen["empty"] = message_of(lambda: run.fit(module_of(way), train_loader(way, rank), loader(NUM_VAL)))
    return seen


def without(way: Way, rank: int, folder: Path) -> str:
    """What is said where a process has no batch to validate on."""
    module = module_of(way)
    module.allow_zero_length_dataloader_with_multiple_devices = True
    data = DataLoader(Subset(dataset(NUM_VAL, 0), range(0 if rank else NUM_VAL)), batch_size=8)
    run = trainer(way, folder, CKACallback(LAYERS), use_distributed_sampler=False)
    return message_of(lambda: run.fit(module, train_loader(way, rank), data))


def work(way: Way, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world_size > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning: the processes have been started
        meeting = f"file://{folder}/{way.name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    seen = {}
    jobs = (fitted, still, compared, probed, without, *((resumed,) if way.saves else ()))
    for job in jobs if way != GROWN else (grown,):
        seen[job.__name__] = job(way, rank, folder)
        (folder / f"{way.name}-{rank}.json").write_text(json.dumps(seen))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def grown(way: Way, rank: int, folder: Path) -> dict[str, Any]:
    """The training that FSDP2 has begun on 2 processes in `resumed`, validated, and tested, on more."""
    place = folder / f"resumed-{FSDP2.name}"
    first, callback = place / "first.ckpt", CKACallback(LAYERS)
    run = trainer(way, place, callback)
    run.validate(module_of(way), loader(NUM_VAL), ckpt_path=first, verbose=False)
    return {
        "history": callback.history,
        "tested": message_of(lambda: run.test(module_of(way), loader(NUM_TEST), ckpt_path=first, verbose=False)),
    }


def main(ways: Sequence[Way], folder: Path) -> None:
    for way in ways:
        fork_ranks(work, way, way.world_size, folder, SECONDS)


if __name__ == "__main__":
    from tests.tracking import sharded_memory_worker  # which imports this module

    main((WHOLE, *WAYS, GROWN), Path(sys.argv[1]))
    sharded_memory_worker.main(Path(sys.argv[1]))
