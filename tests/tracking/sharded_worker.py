"""A script for `test_sharded.py`: a model sharded over two processes under gloo, by `fully_shard`, on CPUs.

    python tests/tracking/sharded_worker.py FOLDER

writes what each rank has seen to `FOLDER/<rank>.pt`. The processes are forked after the imports, which take the most
time, and before the first tensor, so that no thread pool is forked with them.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lit_cka import LinearCKA
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.reference.reference import make_reference
from lit_cka.reference.snapshot import snapshot
from lit_cka.tracking.tracker import Tracker
from tests.tracking.helpers import WIDTH, Classifier, Net, hooks_of

WORLD_SIZE = 2
NUM_SAMPLES = 44
LAYERS = [f"blocks.{i}" for i in range(3)]


def inputs() -> Tensor:
    return torch.randn(NUM_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0)) + 2


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def sharded(seed: int) -> Net:
    """A network of which each process holds its part of the weights, in the blocks and at the root."""
    model, mesh = network(seed), init_device_mesh("cpu", (WORLD_SIZE,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def extracted(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with FeatureExtractor(model, pooling="mean") as extractor, torch.no_grad():
        model(x)
        return extractor.collect()


def message_of(error: type[BaseException], function: Any) -> str:
    try:
        function()
    except error as raised:
        return f"{type(raised).__name__}: {raised}"
    return "no error"


def tracked(live: Classifier, net: Net, x: Tensor) -> dict[str, float]:
    """What the callback does in a validation step, with a network of other weights for the reference."""
    names = [f"net.{layer}" for layer in LAYERS]
    tracker = Tracker(live, make_reference(live, Classifier(net), names, "mean"), names, "mean")
    tracker.open("validate", 1, torch.device("cpu"))
    try:
        tracker.begin(0, 0)
        with torch.no_grad():
            live(x)
        tracker.end()
        return {name: score.cka for name, score in tracker.scores(0).items()}
    finally:
        tracker.close()


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    x = inputs()
    mine = x[rank * NUM_SAMPLES // WORLD_SIZE : (rank + 1) * NUM_SAMPLES // WORLD_SIZE]
    model = sharded(0)
    seen: dict[str, Any] = {
        "is sharded": [isinstance(part, FSDPModule) for part in (model, *model.blocks)],
        "local": [weight.to_local().numel() for weight in model.parameters() if isinstance(weight, DTensor)],
        "hooks": [hooks_of(model)],
    }
    with torch.no_grad():
        seen["before"] = model(x)
    seen["features"] = extracted(model, x)
    seen["hooks"].append(hooks_of(model))
    with torch.no_grad():
        seen["after"] = model(x)
    seen["features of mine"] = extracted(model, mine)

    # Each rank has its half of the samples, and the features of both networks are those of a sharded run.
    other = extracted(sharded(1), mine)
    for name, debiased in (("cka", False), ("debiased", True)):
        metrics = {layer: LinearCKA(debiased=debiased) for layer in LAYERS}
        for layer, metric in metrics.items():
            metric.update(seen["features of mine"][layer], other[layer])
        seen[name] = {layer: metric.compute() for layer, metric in metrics.items()}
    seen["others of mine"] = other

    # A sharded model can't be copied; a module that is passed may be sharded, or whole.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen["snapshot"] = message_of(ValueError, lambda: snapshot(model))
    seen["warnings"] = [str(warning.message) for warning in caught]
    live = Classifier(model)
    seen["initial"] = message_of(
        ValueError, lambda: make_reference(live, "initial", [f"net.{layer}" for layer in LAYERS], "mean")
    )
    for kind, net in (("whole", network(1)), ("sharded", sharded(1))):
        try:
            seen[f"tracked, {kind}"] = tracked(live, net, mine)
        except Exception as error:  # for the test to show; the other rank has the same
            seen[f"tracked, {kind}"] = f"{type(error).__name__}: {error}"
        seen["hooks"].append(hooks_of(model))
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(Path(sys.argv[1]), rank)) for rank in range(WORLD_SIZE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
