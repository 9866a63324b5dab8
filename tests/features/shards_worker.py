"""A script for `test_sharded_outputs.py`: outputs of which each process has a part.

    python tests/features/shards_worker.py FOLDER

writes what each process has seen to `FOLDER/<job>-<world size>-<rank>.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.sharded_pooling import pool_shards
from tests.sync_worker import Seen, fork_ranks, work

SECONDS = 60
SIZES = {"N": 4, "T": 5, "H": 3, "W": 2, "C": 7}
METHODS = ("mean", "last", "cls", "flatten")
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
WIDTH, HIDDEN, VOCABULARY, LENGTH = 8, 12, 11, 6


class Case(NamedTuple):
    """An output with these axes, spread in one way over each dimension of a mesh, and how it is pooled."""

    layout: str
    placements: tuple[Placement, ...]
    method: str
    with_mask: bool


def cases(world_size: int) -> Iterator[Case]:
    """All axes and ways over 3 processes, and pairs of ways over 2 x 2."""
    layouts = ["NC", "CN", "NTC", "TNC", "NCT", "NHWC", "NCHW"] if world_size == 3 else ["NC", "NTC"]
    for layout in layouts:
        ways: list[Placement] = [Replicate(), Partial(), *map(Shard, range(len(layout)))]
        if world_size == 3:
            ways.append(Partial("max"))
        for placements in product(ways, repeat=1 if world_size == 3 else 2):
            for method, with_mask in product(METHODS, (False, True) if "T" in layout else (False,)):
                yield Case(layout, placements, method, with_mask)


def values(layout: str) -> Tensor:
    return torch.randn([SIZES[letter] for letter in layout], generator=torch.Generator().manual_seed(0)) + 3


class _Largest(TorchDispatchMode):
    """Notes the largest number of values that a collective gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and isinstance(output, Tensor):
            self.numel = max(self.numel, output.numel())
        return output


def pooling(rank: int, world_size: int) -> Seen:
    """What each case gives, and the largest number of values that had to be gathered or added up."""
    mesh = init_device_mesh("cpu", (3,) if world_size == 3 else (2, 2))
    seen: Seen = {}
    for number, case in enumerate(cases(world_size)):
        output = distribute_tensor(values(case.layout), mesh, case.placements, src_data_rank=None)
        with _Largest() as largest:
            seen[str(number)] = pool_shards(output, case.method, case.layout, MASK if case.with_mask else None)
        seen[f"{number} sent"] = float(largest.numel)
    return seen


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Net(nn.Module):
    """A network of tokens, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


LAYERS = [
    "embed",
    *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".norm", ".ffn", ".ffn.up", ".ffn.act", ".ffn.down")),
    "norm",
    "head",
]
PLANS: dict[str, dict[str, ParallelStyle]] = {
    "tensor": {
        "embed": ColwiseParallel(output_layouts=Replicate()),
        "blocks.*.ffn.up": ColwiseParallel(),
        "blocks.*.ffn.down": RowwiseParallel(),
        "head": ColwiseParallel(),
    },
    "tensor, DTensors": {
        "blocks.*.ffn.up": ColwiseParallel(use_local_output=False),
        "blocks.*.ffn.down": RowwiseParallel(),
        "head": ColwiseParallel(use_local_output=False),
    },
    "sequence": {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.ffn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "blocks.*.ffn.up": ColwiseParallel(),
        "blocks.*.ffn.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))


def attention_mask() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([6, 1, 4, 3])[:, None]).long()


def network() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def extracted(model: nn.Module, pooling: Any, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    pooling = pooling if callable(pooling) else f"{pooling}:NTC"
    with FeatureExtractor(model, LAYERS, pooling) as extractor, torch.no_grad():
        extractor.watch_replicas(mesh)
        for _ in range(2):  # what was found out in the first step holds in the second
            model(ids(), attention_mask=attention_mask())
            features = extractor.collect()
    return features


class Opaque(nn.Module):
    """Gives each process something else, of which nothing tells what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(len(x), 5, -1) + torch.distributed.get_rank())


def message_of(model: nn.Module, layer: str, x: Tensor, mesh: DeviceMesh) -> str:
    with FeatureExtractor(model, layer, "mean:NTC") as extractor, torch.no_grad():
        extractor.watch_replicas(mesh)
        model(x)
        _, problems = extractor.drain()
    return problems.get(layer, "no problem")


def layers(rank: int, world_size: int) -> Seen:
    """The features of every layer under every plan and pooling, and what is said where a layer can't be used."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tensor_parallel",))
    seen: Seen = {}
    for plan, styles in PLANS.items():
        model = parallelize_module(network(), mesh, styles)
        for pooling in METHODS:
            for name, features in extracted(model, pooling, mesh).items():
                seen[f"{plan} {pooling} {name}"] = features
    # A layer that is known by its weight needs nobody who compares.
    model = parallelize_module(network(), mesh, PLANS["tensor"])
    seen["alone"] = extracted(model, "mean")["blocks.0.ffn.up"]
    model = parallelize_module(network(), mesh, PLANS["tensor, DTensors"])
    seen["callable"] = extracted(model, first_token, mesh)["blocks.1.ffn.up"]
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    seen["opaque"] = message_of(Opaque(), "inner", x.flatten(1), mesh)
    seen["two axes"] = message_of(nn.Sequential(Cropped()), "0", x, mesh)
    seen["dead"] = message_of(nn.Sequential(nn.Identity()), "0", torch.zeros(4, 5, 6), mesh)
    return seen


class ChannelNorm(nn.Module):
    """A norm of whose class nothing is known but its name, and so its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def flat(rank: int, world_size: int) -> Seen:
    """The features of a norm that FSDP holds a part of, and of the module that FSDP has wrapped, by default pooling."""
    inner = FullyShardedDataParallel(nn.Sequential(ChannelNorm(8)), device_id=torch.device("cpu"), use_orig_params=True)
    model = nn.Sequential(inner)
    seen: Seen = {}
    for name in ("0", "0.0"):
        with FeatureExtractor(model, name) as extractor, torch.no_grad():
            model(tokens())
            features, problems = extractor.drain()
        seen[name] = features.get(name, str(problems))
    return seen


def tokens() -> Tensor:
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Cropped(nn.Module):
    """Gives each process an output of another size."""

    def forward(self, x: Tensor) -> Tensor:
        rank = torch.distributed.get_rank()
        return x[:, rank:, rank:]


def first_token(output: Tensor) -> Tensor:
    return output[:, 0]


def main(folder: Path) -> None:
    for job, world_sizes in {pooling: (3, 4), layers: (2, 3), flat: (2,)}.items():
        for world_size in world_sizes:
            fork_ranks(work, job, world_size, folder, SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
