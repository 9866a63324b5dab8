"""A script for `test_metrics.py`: both metrics under 2 and 3 gloo processes, uneven shards, a rank without data.

    python tests/sync_worker.py FOLDER

writes what each rank has seen to `FOLDER/<job>-<world size>-<rank>.pt`. The processes are forked after the imports,
which take the most time, and before the first tensor, so that no thread pool is forked with them.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.metrics import LinearCKA, MinibatchCKA

# The sizes of each rank's batches, by number of ranks. In the first round one rank has none.
ROUNDS = {2: [[[13, 1, 30], []], [[2], [9]]], 3: [[[20, 7], [], [5, 2, 1]], [[4, 5], [6], [1]]]}
NUM_SAMPLES = 80
LAYERS_X, LAYERS_Y = (5, 3), (4, 6, 2)
BATCH_SIZE = 8  # of MinibatchCKA; its batches go to the ranks in turn, but none to the last
SECONDS = 20

Seen = dict[str, "Tensor | bool"]


def features() -> tuple[list[Tensor], list[Tensor]]:
    """The features of all samples, by layer, with means a million times their spread."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    X = [randn(NUM_SAMPLES, d) + 1e6 * randn(d) for d in LAYERS_X]
    Y = [X[0] @ randn(LAYERS_X[0], d) + randn(NUM_SAMPLES, d) + 1e6 * randn(d) for d in LAYERS_Y]
    return X, Y


def num_samples(batches: list[list[int]]) -> int:
    return sum(map(sum, batches))


def shard(batches: list[list[int]], rank: int, start: int) -> list[slice]:
    """The rows of this rank's batches, when every rank takes what follows the ranks before it."""
    start += num_samples(batches[:rank])
    return [
        slice(start + sum(batches[rank][:i]), start + sum(batches[rank][: i + 1])) for i in range(len(batches[rank]))
    ]


def synchronised(rank: int, world_size: int) -> Seen:
    X, Y = features()
    seen: Seen = {}
    linear = {
        "lazy": LinearCKA(),
        "debiased": LinearCKA(debiased=True),
        "declared": LinearCKA(LAYERS_X[0], LAYERS_Y[0]),
    }
    for name, metric in linear.items():
        start = 0
        for number, batches in enumerate(ROUNDS[world_size]):
            for rows in shard(batches, rank, start):
                metric.update(X[0][rows], Y[0][rows])
            start += num_samples(batches)
            own = metric.moments
            seen[f"{name} {number}"] = metric.compute()
            # Each rank must get its own samples back, or they would count twice in the next round.
            seen[f"{name} {number} restored"] = all(map(torch.equal, own, metric.moments))
    seen["nothing"] = LinearCKA().compute()

    for kernel in ("linear", "rbf"):
        minibatch = MinibatchCKA(kernel)
        for index, start in enumerate(range(0, NUM_SAMPLES, BATCH_SIZE)):
            if index % (world_size - 1) == rank:
                rows = slice(start, start + BATCH_SIZE)
                minibatch.update([x[rows] for x in X], [y[rows] for y in Y])
        seen[kernel] = minibatch.compute()
    seen["no layers"] = MinibatchCKA().compute()
    return seen


def nothing_new(rank: int, world_size: int) -> Seen:
    """`compute` again, after a batch that came to one rank alone."""
    X, Y = features()
    metric = LinearCKA()
    metric.update(X[0][10 * rank : 10 * rank + 10], Y[0][10 * rank : 10 * rank + 10])
    metric.compute()
    if rank == 0:
        start = 10 * world_size
        metric.update(X[0][start : start + 10], Y[0][start : start + 10])
    return {"value": metric.compute()}


def work(job: Callable[[int, int], Seen], rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/{job.__name__}-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    torch.save(job(rank, world_size), folder / f"{job.__name__}-{world_size}-{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for job, world_size in ((synchronised, 2), (synchronised, 3), (nothing_new, 2)):
        workers = [fork.Process(target=work, args=(job, rank, world_size, folder)) for rank in range(world_size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            worker.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
