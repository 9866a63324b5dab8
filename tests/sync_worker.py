"""A script for `test_metrics.py` and the tests of `parallel`: ranks under gloo, uneven shards, a rank without data.

    python tests/sync_worker.py FOLDER JOB [JOB ...]

writes what each rank has seen to `FOLDER/<job>-<world size>-<rank>.pt`. The processes are forked after the imports,
which take the most time, and before the first tensor, so that no thread pool is forked with them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lit_cka
from lit_cka.functional.moments import PairedMoments, paired_moments
from lit_cka.metrics import LinearCKA, MinibatchCKA
from lit_cka.parallel.collectives import agree_on_sizes, all_reduce_moments
from lit_cka.parallel.ranks import Ranks, is_distributed, run_on_all_ranks

# The sizes of each rank's batches, by number of ranks. In the first round one rank has none.
ROUNDS = {2: [[[13, 1, 30], []], [[2], [9]]], 3: [[[20, 7], [], [5, 2, 1]], [[4, 5], [6], [1]]]}
NUM_SAMPLES = 80
LAYERS_X, LAYERS_Y = (5, 3), (4, 6, 2)
BATCH_SIZE = 8  # of MinibatchCKA; its batches go to the ranks in turn, but none to the last
SECONDS = 20

# What is shared out at random: numbers of samples, and sizes of the batches in which the ranks take their share.
CASES = list(itertools.product((1, 2, 3, 7, 13, 97, 101, 200), (1, 3, 16, 64)))
SIZES = [(5, 4), (0, 4), (5, 0), (0, 0)]  # that ranks may know of the same features; 0 is yet unknown
WIDE = 1440  # features of which the statistics take 50 MB

Seen = dict[str, "Tensor | bool | str | float"]


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


def shares(case: int, world_size: int) -> list[list[Tensor]]:
    """Each rank's batches of indices: any samples in any order. In every other case the first rank has none."""
    num_samples, batch_size = CASES[case]
    generator = torch.Generator().manual_seed(100 * case + world_size)
    first = case % 2 if world_size > 1 else 0
    owners = torch.randint(first, world_size, (num_samples,), generator=generator)
    order = torch.randperm(num_samples, generator=generator)
    return [list(order[owners[order] == rank].split(batch_size)) for rank in range(world_size)]


def case_features(case: int) -> tuple[Tensor, Tensor]:
    """All samples of a case (n, 5) and (n, 4), with means a thousand times their spread."""
    generator = torch.Generator().manual_seed(case)
    n = CASES[case][0]
    X, noise, offsets, mixing = (torch.randn(*shape, generator=generator) for shape in ((n, 5), (n, 4), (9,), (5, 4)))
    Y = (X @ mixing + noise).double()
    return X.double() + 1e3 * offsets[:5], Y + 1e3 * offsets[5:]


def synchronised(rank: int, world_size: int) -> Seen:
    X, Y = features()
    seen: Seen = {}
    linear = {
        "lazy": LinearCKA(),
        "debiased": LinearCKA(debiased=True),
        "declared": LinearCKA(LAYERS_X[0], LAYERS_Y[0]),
        "tiny": LinearCKA(),
        "huge": LinearCKA(debiased=True),
    }
    scales = {"tiny": 1e-100, "huge": 1e100}
    for name, metric in linear.items():
        start = 0
        for number, batches in enumerate(ROUNDS[world_size]):
            for rows in shard(batches, rank, start):
                metric.update(X[0][rows].double() * scales.get(name, 1), Y[0][rows])
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
                x = [layer[rows].double() * scale for layer, scale in zip(X, (1.0, 2.0**300), strict=True)]
                minibatch.update(x, [y[rows] for y in Y])
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


def shared_out(rank: int, world_size: int) -> Seen:
    """Every case, plain and debiased, and the number of samples that all ranks have together."""
    values = []
    for case in range(len(CASES)):
        X, Y = case_features(case)
        metric = LinearCKA()
        for rows in shares(case, world_size)[rank]:
            metric.update(X[rows], Y[rows])
        plain = metric.compute()
        metric.debiased = True
        debiased = metric.compute()
        with metric.sync_context():
            values.append(torch.stack([plain, debiased, metric.n]))
    return {"values": torch.stack(values)}


def unequal(rank: int, world_size: int) -> Seen:
    """The last rank has other widths; of three, one in the middle has no batch. What comes next is of use again."""
    X, Y = features()
    linear, minibatch = LinearCKA(), MinibatchCKA()
    is_last, has_batches = rank == world_size - 1, rank in (0, world_size - 1)
    if has_batches:
        linear.update(X[0], Y[int(is_last)])
        minibatch.update(X, Y[: 2 if is_last else 3])
    seen: Seen = {}
    for name, metric in {"linear": linear, "minibatch": minibatch}.items():
        for attempt in range(2):
            try:
                seen[f"{name} {attempt}"] = f"no error but {metric.compute()}"
            except ValueError as error:
                seen[f"{name} {attempt}"] = str(error)
        metric.reset()
        if has_batches:
            metric.update(*((X[0], Y[0]) if isinstance(metric, LinearCKA) else (X, Y)))
        seen[f"{name} after"] = metric.compute()
    return seen


def moments(rank: int, world_size: int) -> Seen:
    """The moments of all ranks, field by field, and that their own were left alone."""
    seen: Seen = {}
    for case in range(len(CASES)):
        X, Y = case_features(case)
        rows = torch.cat([torch.zeros(0, dtype=torch.int64), *shares(case, world_size)[rank]])
        own = paired_moments(X[rows], Y[rows])
        copies = [value.clone() for value in own]
        total = all_reduce_moments(own)
        seen[f"{case} alone"] = all(map(torch.equal, own, copies))
        seen.update({f"{case} {name}": value for name, value in zip(PairedMoments._fields, total, strict=True)})
    return seen


def sizes(rank: int, world_size: int) -> Seen:
    """What is agreed on where each rank knows some of the sizes, all of them, none, or other ones."""
    seen: Seen = {}
    for start in range(len(SIZES)):
        known = SIZES[(start + rank) % len(SIZES)]
        seen[f"agreed {start}"] = torch.tensor(agree_on_sizes(known, "sizes", torch.device("cpu"), None))
    seen["none"] = torch.tensor(agree_on_sizes((0, 0), "sizes", torch.device("cpu"), None))
    for position in range(2):
        known = [5, 4]
        known[position] += rank == world_size - 1
        try:
            agree_on_sizes(known, "sizes", torch.device("cpu"), None)
        except ValueError as error:
            seen[f"differ {position}"] = str(error)
    return seen


class UnpicklableError(Exception):
    """What cannot be pickled: it is made of two arguments, and knows of one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def together(rank: int, world_size: int) -> Seen:
    """What ranks get of a function that ends well on all, on all but the last, or on none; and that they can go on."""
    seen: Seen = {"distributed": is_distributed(), "ranks": str(run_on_all_ranks(lambda: {"rank": rank}))}
    errors = {
        "value": ValueError("NaN"),
        "os": OSError(28, "full"),
        "key": KeyError("x"),
        "odd": UnpicklableError("a", "b"),
    }
    for name, error in errors.items():

        def fail(error: Exception = error, name: str = name) -> int:
            if rank == world_size - 1:
                raise error
            return rank

        try:
            seen[name] = f"no error but {run_on_all_ranks(fail)}"
        except Exception as raised:
            seen[name] = f"{type(raised).__name__}: {raised}"
            seen[f"{name} is the very one"] = raised is error
    try:
        run_on_all_ranks(lambda: [][rank])
    except Exception as raised:
        seen["all"] = type(raised).__name__
    with Ranks() as ranks:
        seen["sizes"] = str((ranks.rank, ranks.size, ranks.gather(lambda: rank), ranks.agree(lambda: -rank)))
    seen["group is left"] = is_distributed()  # which was there before
    return seen


def memory(rank: int, world_size: int) -> Seen:
    """How much more memory the process takes while it synchronises than before, as a share of the state's."""
    metric = LinearCKA()  # the first in this process: what was freed before would be taken again unnoticed
    rows = torch.randn(8, 2 * WIDE, generator=torch.Generator().manual_seed(rank)).double()
    metric.update(rows[:, :WIDE], rows[:, WIDE:])
    num_bytes = sum(value.nbytes for value in metric.metric_state.values())
    before = _peak_kilobytes(anew=True)
    metric.compute()
    return {"share": (_peak_kilobytes() - before) * 1024 / num_bytes}


def _peak_kilobytes(anew: bool = False) -> int:
    """The most memory that this process has taken so far, or since it was last asked for anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def work(job: Callable[[int, int], Seen], rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/{job.__name__}-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    torch.save(job(rank, world_size), folder / f"{job.__name__}-{world_size}-{rank}.pt")
    dist.destroy_process_group()


def fork_ranks(work: Callable[..., None], job: Any, world_size: int, folder: Path, seconds: float) -> None:
    """Run `work(job, rank, world_size, folder)` in a process per rank, until all have ended or so many seconds."""
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(job, rank, world_size, folder)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0))
        worker.kill()


def main(folder: Path, jobs: list[str]) -> None:
    world_sizes = {synchronised: (2, 3), nothing_new: (2,), unequal: (2, 3), memory: (2, 3, 4)}
    for job in (synchronised, nothing_new, shared_out, unequal, moments, sizes, together, memory):
        for world_size in world_sizes.get(job, (1, 2, 3)) if job.__name__ in jobs else ():
            fork_ranks(work, job, world_size, folder, SECONDS)


def run_to_end(script: str, *args: object, seconds: float = 120) -> None:
    """Run a script until its end, or for so many seconds; then end all that it has started too."""
    # scikit-learn, once imported, leaves settings of OpenMP behind that change how much memory a forked process takes.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KMP_", "MALLOC_"))}
    # Every tensor in pages of its own, given back when it is freed: else the peak depends on glibc's thresholds, which
    # move with what was freed before.
    inherited["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    process = subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        env={**inherited, "PYTHONPATH": str(Path(lit_cka.__file__).parents[1])},
        start_new_session=True,  # a group of their own, that can be killed as one
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass  # what was not written by then is missed by the tests
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def seen_by_ranks(folder: Path, job: str, world_size: int) -> list[Seen]:
    """What the ranks have seen; all of them have to have come to the end."""
    files = [folder / f"{job}-{world_size}-{rank}.pt" for rank in range(world_size)]
    assert [file.name for file in files if not file.exists()] == []
    return [torch.load(file) for file in files]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
