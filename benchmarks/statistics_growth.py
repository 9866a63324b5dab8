"""How do time and memory of one layer's statistics grow with the samples n and the features d?

A pass adds n samples of d features to each side in batches, float64 as the extractor gives them, and scores them. Two
ways take turns: `ExactStatistics`, which keeps the smaller of rows and moments, and moments alone, to which rows are
added once there are as many as features.

- time: of the whole pass, with one copy of each batch.
- memory: growth of a fresh process's resident memory at its highest during a pass.
- 2 ranks: a pass with half of the samples on each, over gloo on this machine with one thread a process. The slower
  rank's time; bytes that cross the loopback interface, over the number of ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from common import MIB, Result, new_parser, parse, peak_memory, ratios, report, return_freed_memory, spread
from synchronisation import loopback_bytes, on_all_ranks
from torch import Tensor

from lit_cka.functional import PairedMoments, add_samples, cka_from_moments, empty_moments
from lit_cka.parallel.collectives import all_reduce_moments
from lit_cka.statistics.layer import ExactStatistics

CPU = torch.device("cpu")
BATCH = 64
POOL = 8  # different batches


class MomentsAlone:
    """Moments whatever n is, of rows that are gathered until there are as many as features."""

    space = "features"

    def __init__(self, products: Any = None) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.moments: PairedMoments | None = None
        self.products = products

    def add(self, X: Tensor, Y: Tensor) -> None:
        self.rows.append((X, Y))
        if sum(len(x) for x, _ in self.rows) >= max(1024, X.shape[1]):
            self.flush()

    def flush(self) -> None:
        if self.rows:
            X, Y = (torch.cat(rows) for rows in zip(*self.rows, strict=True))
            self.rows = []
            moments = self.moments or empty_moments(X.shape[1], Y.shape[1])
            self.moments = add_samples(moments, X, Y, products=self.products)

    def score(self, device: torch.device, *, debiased: bool) -> Any:
        self.flush()
        assert self.moments is not None
        moments = all_reduce_moments(self.moments) if dist.is_initialized() else self.moments
        return cka_from_moments(moments, debiased=debiased)


WAYS = {"moments alone": MomentsAlone, "ExactStatistics": ExactStatistics}


def batches(d: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, BATCH, d, dtype=torch.float64, generator=generator) + 3) for _ in range(POOL)]


def added(way: str, n: int, pool: list[tuple[Tensor, Tensor]], products: Any = None) -> Any:
    statistics = WAYS[way](products=products)
    for start in range(0, n, BATCH):
        X, Y = pool[start // BATCH % POOL]
        rows = min(BATCH, n - start)
        statistics.add(X[:rows].clone(), Y[:rows].clone())
    return statistics


def run_pass(way: str, n: int, pool: list[tuple[Tensor, Tensor]]) -> str:
    statistics = added(way, n, pool)
    statistics.score(CPU, debiased=True)
    return str(statistics.space)


def seconds(way: str, n: int, pool: list[tuple[Tensor, Tensor]]) -> float:
    start = time.perf_counter()
    run_pass(way, n, pool)
    return time.perf_counter() - start


def measure_memory(job: str) -> float:
    """MiB on top of what this process has before the pass."""
    way, n, d = json.loads(job)
    return_freed_memory()
    pool = batches(d)
    run_pass(way, BATCH, batches(8))  # what is loaded and kept once
    before, peak = peak_memory(lambda: run_pass(way, n, pool))
    return (peak - before) / MIB


def measure_ranks(args: Any, n: int, d: int) -> dict[str, Any]:
    pool = batches(d, seed=dist.get_rank())
    share = n // dist.get_world_size()
    seen: dict[str, Any] = {way: {"seconds": [], "sent": []} for way in WAYS}
    for way in WAYS:  # also the first collectives, which connect the ranks
        run_pass(way, share, pool)
    for _ in range(args.repetitions):
        for way, values in seen.items():
            dist.barrier()
            before = loopback_bytes()
            values["seconds"].append(seconds(way, share, pool))
            dist.barrier()
            values["sent"].append((loopback_bytes() - before) / dist.get_world_size() / MIB)
    return seen


def table_of_ranks(args: Any) -> Result:
    rows: list[list[Any]] = []
    for d in args.features:
        for n in [n for n in args.samples if n <= 3 * d]:
            ranks = on_all_ranks(2, measure_ranks, args, n, d)
            slowest = {
                way: [1000 * max(each) for each in zip(*(rank[way]["seconds"] for rank in ranks), strict=True)]
                for way in WAYS
            }
            before, now = slowest.values()
            sent = [spread([mib for rank in ranks for mib in rank[way]["sent"]]).median for way in WAYS]
            rows.append([f"{n} x {d}", spread(before), spread(now), ratios(now, before), *sent])
    columns = ["n x d", "moments alone, ms", "ExactStatistics, ms", "time, now / before", "sent, MiB", "now, MiB"]
    return Result(
        "One layer, one pass on 2 ranks, scored in sample space", columns, rows, "Median (min - max; repetitions)."
    )


def table_of_passes(args: Any) -> Result:
    rows: list[list[Any]] = []
    for d in args.features:
        pool = batches(d)
        for n in args.samples:
            space = run_pass("ExactStatistics", n, pool)
            times = [[1000 * seconds(way, n, pool) for way in WAYS] for _ in range(args.repetitions)]
            before, now = zip(*times, strict=True)
            memory = []
            for way in WAYS:
                command = [sys.executable, __file__, "--threads", str(args.threads), "--child", json.dumps([way, n, d])]
                memory.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1]))
            rows.append(
                [f"{n} x {d}", space, spread(before), spread(now), ratios(now, before), *memory, memory[1] / memory[0]]
            )
    columns = ["n x d", "space", "moments alone, ms", "ExactStatistics, ms", "time, now / before",
               "memory, MiB", "now, MiB", "memory, now / before"]  # fmt: skip
    return Result("One layer, one pass: added and scored", columns, rows, "Median (min - max; repetitions).")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 128, 512, 2048, 8192])
    parser.add_argument("--features", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", help="print the memory of this pass; used by the script")
    args = parse(parser, {"samples": [64, 512], "features": [64, 256], "repetitions": 2})
    if args.child is not None:
        print(measure_memory(args.child))
        return
    ranks = table_of_ranks(args)  # first, before this process has threads that would be forked
    report("statistics_growth", args, [table_of_passes(args), ranks])


if __name__ == "__main__":
    main()
