"""What does it take to synchronise statistics over processes?

Of `LinearCKA`, against what torchmetrics does by default: it gathers every rank's states on every rank, where
`LinearCKA` adds them up by all-reduce. And of a layer with fewer samples than features, as `CKACallback` has it: the
samples' rows are exchanged in blocks, against moments that are added up. All run over gloo on this machine, in turns,
with one thread a process.

- handed over: bytes of the tensors that a rank hands to collectives, counted at the calls.
- sent: bytes that cross the loopback interface, over the number of ranks, as the kernel counts them. That includes
  gloo's protocol and whatever else uses the interface at the time.
- time: of `Metric.sync`, or of scoring, after a barrier; the slowest rank's.
- extra memory: growth of the resident memory of a fresh process at its highest during that, the highest of the ranks;
  for `sync` over the bytes of the state. Merging what was gathered, by `merge_state`, is part of it, as of the time.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import MIB, Result, new_parser, parse, peak_memory, ratios, report, return_freed_memory, spread
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_cka.functional import PairedMoments, add_samples, cka_from_moments, empty_moments
from lit_cka.metrics import LinearCKA
from lit_cka.parallel.collectives import all_reduce_moments
from lit_cka.statistics.layer import ExactStatistics

CPU = torch.device("cpu")


class GatheredCKA(LinearCKA):
    """`LinearCKA`, synchronised as torchmetrics does by default: all ranks' states on all ranks, merged there."""

    _copy_state_dict = Metric._copy_state_dict

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:
        Metric._sync_dist(self, dist_sync_fn or gather_all_tensors, process_group)
        first, *others = ({name: getattr(self, name)[rank] for name in self._defaults} for rank in range(world_size()))
        for name, value in first.items():
            setattr(self, name, value)
        for states in others:
            self.merge_state(states)


METHODS = {"all-reduce": LinearCKA, "gather": GatheredCKA}


class MomentsAlone:
    """Moments, whatever the number of samples is."""

    space = "features"

    def __init__(self) -> None:
        self.moments: PairedMoments | None = None

    def add(self, X: Tensor, Y: Tensor) -> None:
        self.moments = add_samples(self.moments or empty_moments(X.shape[1], Y.shape[1]), X, Y)

    def score(self, device: torch.device, *, debiased: bool) -> float:
        assert self.moments is not None
        return cka_from_moments(all_reduce_moments(self.moments), debiased=debiased).item()


WAYS: dict[str, Callable[[], Any]] = {"rows": ExactStatistics, "moments": MomentsAlone}


def world_size() -> int:
    return dist.get_world_size()


def count_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that `function` hands to collectives."""
    total = 0
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            tensor = args[1] if name == "all_gather" else args[0]
            total += tensor.nbytes
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        function()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return total


def loopback_bytes() -> int:
    """Bytes sent through the loopback interface so far, by everybody."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def new_metric(method: str, num_features: int) -> LinearCKA:
    """A metric with two batches, others on each rank."""
    metric = METHODS[method](sync_on_compute=False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        metric.update(*torch.randn(2, 256, num_features, generator=generator))
    return metric


def measure_time(args: Any) -> dict[str, Any]:
    metrics = {method: new_metric(method, args.features) for method in METHODS}
    seen: dict[str, Any] = {}
    for method, metric in metrics.items():  # also the first collectives, which connect the ranks
        seen[f"{method} handed"] = count_bytes(metric.sync)
        seen[f"{method} value"] = metric.compute().item()  # ends the synchronisation
        seen[f"{method} seconds"], seen[f"{method} sent"] = [], []
    for _ in range(args.repetitions):
        for method, metric in metrics.items():
            dist.barrier()
            before, start = loopback_bytes(), time.perf_counter()
            metric.sync()
            seen[f"{method} seconds"].append(time.perf_counter() - start)
            dist.barrier()
            seen[f"{method} sent"].append((loopback_bytes() - before) / world_size())
            metric.unsync()
    return seen


def measure_memory(args: Any, method: str) -> dict[str, Any]:
    return_freed_memory()
    metric = new_metric(method, args.features)
    dist.all_reduce(torch.zeros(10**6))  # connect the ranks
    before, peak = peak_memory(metric.sync)
    metric.unsync()
    return {"extra": (peak - before) / sum(getattr(metric, name).nbytes for name in metric._defaults)}


def share_of_samples(way: str, n: int, d: int) -> Any:
    """Statistics of this rank's share of n samples."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    statistics = WAYS[way]()
    statistics.add(*torch.randn(2, n // world_size(), d, dtype=torch.float64, generator=generator) + 3)
    return statistics


def measure_scores(args: Any, n: int, d: int) -> dict[str, Any]:
    statistics = {way: share_of_samples(way, n, d) for way in WAYS}
    seen: dict[str, Any] = {}
    for way, each in statistics.items():  # also the first collectives, which connect the ranks
        score = each.score(CPU, debiased=True)
        seen |= {way: {"seconds": [], "sent": [], "space": each.space, "cka": getattr(score, "cka", score)}}
    for _ in range(args.score_repetitions):
        for way, each in statistics.items():
            dist.barrier()
            before, start = loopback_bytes(), time.perf_counter()
            each.score(CPU, debiased=True)
            seen[way]["seconds"].append(time.perf_counter() - start)
            dist.barrier()
            seen[way]["sent"].append((loopback_bytes() - before) / world_size() / MIB)
    return seen


def measure_memory_of_scores(way: str, n: int, d: int) -> dict[str, Any]:
    return_freed_memory()
    share_of_samples(way, 8 * world_size(), 16).score(CPU, debiased=True)
    statistics = share_of_samples(way, n, d)
    before, peak = peak_memory(lambda: statistics.score(CPU, debiased=True))
    return {"extra": (peak - before) / MIB}


def table_of_scores(args: Any) -> Result:
    rows: list[list[Any]] = []
    for size in args.score_world_sizes:
        for shape in args.shapes:
            n, d = map(int, shape.split("x"))
            ranks = on_all_ranks(size, measure_scores, args, n, d)
            assert abs(ranks[0]["rows"]["cka"] - ranks[0]["moments"]["cka"]) < 1e-7  # rows are kept in float32
            assert {ranks[0][way]["space"] for way in WAYS} == {"samples", "features"}
            slowest = {
                way: [1000 * max(each) for each in zip(*(rank[way]["seconds"] for rank in ranks), strict=True)]
                for way in WAYS
            }
            for way in WAYS:
                sent = spread([mib for rank in ranks for mib in rank[way]["sent"]])
                memory = max(rank["extra"] for rank in on_all_ranks(size, measure_memory_of_scores, way, n, d))
                rows.append([str(size), f"{n} x {d}", way, sent.median, spread(slowest[way]),
                             ratios(slowest[way], slowest["moments"]), memory])  # fmt: skip
    columns = ["ranks", "n x d", "exchanged", "sent, MiB", "time, ms", "time / moments", "extra memory, MiB"]
    return Result("One layer of n samples and d features in all, scored", columns, rows,
                  "Median (min - max; repetitions).")  # fmt: skip


def worker(measure: Callable[..., dict[str, Any]], job: tuple[Any, ...], rank: int, size: int, init: str,
           queue: SimpleQueue[dict[str, Any]]) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    queue.put(measure(*job))
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(size: int, measure: Callable[..., dict[str, Any]], *job: Any) -> list[dict[str, Any]]:
    """What `measure(*job)` returns on each rank of a new process group, in no order."""
    context = multiprocessing.get_context("fork")  # before this process has used a tensor, so no threads are forked
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=worker, args=(measure, job, rank, size, f"file://{folder}/init", queue))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"A rank failed: exit codes {[process.exitcode for process in processes]}.")
        return [queue.get() for _ in processes]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--repetitions", type=int, default=15, help="of the times")
    parser.add_argument("--fresh-processes", type=int, default=3, help="repetitions of the memory")
    parser.add_argument("--score-world-sizes", type=int, nargs="+", default=[2, 4], help="of the second table")
    parser.add_argument("--shapes", nargs="+", default=["512x768", "2048x768", "128x4096"], help="n x d, with n < 3 d")
    parser.add_argument("--score-repetitions", type=int, default=5, help="of the second table's times")
    parser.set_defaults(threads=1)
    args = parse(parser, {
        "world_sizes": [2, 3], "features": 256, "repetitions": 3, "fresh_processes": 1, "score_world_sizes": [2],
        "shapes": ["64x256"], "score_repetitions": 2,
    })  # fmt: skip

    rows: list[list[Any]] = []
    for size in args.world_sizes:
        ranks = on_all_ranks(size, measure_time, args)
        assert abs(ranks[0]["all-reduce value"] - ranks[0]["gather value"]) < 1e-10
        seconds = {
            method: [max(slowest) for slowest in zip(*(rank[f"{method} seconds"] for rank in ranks), strict=True)]
            for method in METHODS
        }
        extra: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(args.fresh_processes):
            for method, values in extra.items():
                values.append(max(rank["extra"] for rank in on_all_ranks(size, measure_memory, args, method)))
        for method in METHODS:
            sent = spread([count / MIB for rank in ranks for count in rank[f"{method} sent"]])
            rows.append([
                str(size), method, ranks[0][f"{method} handed"] / MIB, sent.median,
                spread([1000 * value for value in seconds[method]]), ratios(seconds[method], seconds["all-reduce"]),
                spread(extra[method]),
            ])  # fmt: skip
    columns = [
        "ranks",
        "method",
        "handed over, MiB",
        "sent, MiB",
        "time, ms",
        "time / all-reduce",
        "extra memory / state",
    ]
    state = 3 * 8 * args.features**2 / MIB
    title = f"LinearCKA of {args.features} and {args.features} features, {state:.3g} MiB of state, on each rank"
    metrics = Result(title, columns, rows, "Median (min - max; repetitions).")
    report("synchronisation", args, [metrics, table_of_scores(args)])


if __name__ == "__main__":
    main()
