"""A script for `test_layer_statistics.py`: layers scored on ranks under gloo, uneven shards, ranks without samples.

    python tests/statistics/statistics_worker.py FOLDER

writes what each rank has seen to `FOLDER/<job>-<world size>-<rank>.pt`, as `tests/sync_worker.py` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.precision import Products
from lit_cka.parallel.exchange import Group
from lit_cka.statistics.layer import ExactStatistics, MinibatchStatistics, ReferenceTerms, score_layers
from lit_cka.statistics.sampled_layers import jackknives_of_all_ranks
from lit_cka.statistics.subsample import BatchHashes, Subsample, sample_hashes
from tests.oracles import paired_features
from tests.sync_worker import Seen, _peak_kilobytes, fork_ranks, work

CPU = torch.device("cpu")
SECONDS = 60


class Case(NamedTuple):
    """A layer's samples, and how they come to the ranks: any of them in any order, none to some ranks."""

    n: int
    d_x: int
    d_y: int
    batch_size: int = 16
    empty_ranks: int = 0  # the first so many, but never all
    dtype: torch.dtype = torch.float64
    offset: float = 3.0
    skewed: bool = False  # four of five samples to the last rank


CASES = {
    "few": Case(30, 40, 50),
    "few, on the last rank": Case(30, 40, 50, empty_ranks=3),
    "few, far off, one by one": Case(30, 40, 50, batch_size=1, empty_ranks=1, offset=1e6),
    "several tiles": Case(600, 230, 210, dtype=torch.float32, offset=1e4),
    "several tiles on the last rank": Case(300, 130, 110, empty_ranks=3, dtype=torch.float32),
    "more than one collective": Case(280, 3700, 4000, empty_ranks=1, dtype=torch.bfloat16),
    "fewer than ranks": Case(3, 40, 50),
    "wide against narrow": Case(200, 3, 700, empty_ranks=2),
    "many": Case(500, 6, 5),
    "many, far off": Case(500, 6, 5, empty_ranks=1, offset=1e6),
    "moments on some ranks": Case(1400, 7, 9, batch_size=64, skewed=True),
    "moments on the last rank": Case(1100, 70, 60, batch_size=64, empty_ranks=3),
    "none": Case(0, 4, 5),
}


@cache
def features(case: Case) -> tuple[Tensor, Tensor]:
    """All samples of a case, of layers that have little in common."""
    n, d_x, d_y, _, _, dtype, offset, _ = case
    return paired_features(n, d_x, d_y, related=False, offset=offset, dtype=dtype, seed=n + d_x)


def shares(case: Case, world_size: int) -> list[list[Tensor]]:
    """The indices of each rank's batches."""
    generator = torch.Generator().manual_seed(case.n + world_size)
    owners = torch.randint(min(case.empty_ranks, world_size - 1), world_size, (case.n,), generator=generator)
    if case.skewed:
        owners[torch.rand(case.n, generator=generator) < 0.8] = world_size - 1
    order = torch.randperm(case.n, generator=generator)
    return [list(order[owners[order] == rank].split(case.batch_size)) for rank in range(world_size)]


def statistics(
    rank: int, world_size: int, products: Products | None = None, known: dict[str, ReferenceTerms | None] | None = None
) -> dict[str, ExactStatistics]:
    """Every case, with this rank's samples in it."""
    layers = {}
    for name, case in CASES.items():
        layers[name] = ExactStatistics(products, known[name] if known else None)
        X, Y = features(case)
        for rows in shares(case, world_size)[rank]:
            layers[name].add(X[rows], Y[rows])
    return layers


def scored(rank: int, world_size: int) -> Seen:
    """Every case, plain and debiased, all at once and one by one, in both precisions, and with the reference known."""
    layers, in_float32 = statistics(rank, world_size), statistics(rank, world_size, "float32")
    seen: Seen = {}
    for debiased in (False, True):
        together = score_layers(layers, CPU, debiased=debiased)
        alone = {name: each.score(CPU, debiased=debiased) for name, each in layers.items()}
        if not debiased:
            with_known = statistics(
                rank, world_size, None, {name: each.reference_terms for name, each in layers.items()}
            )
        others = [score_layers(each, CPU, debiased=debiased) for each in (in_float32, with_known)]
        for name in CASES:
            values = [*together[name], *(scores[name].cka for scores in (alone, *others))]
            seen[f"{name} {debiased}"] = torch.tensor(values, dtype=torch.float64)
    seen.update({f"{name} space": str(each.space) for name, each in layers.items()})
    return seen


def subsamples(rank: int, world_size: int) -> Seen:
    """What the drawn samples of every case say, with keys, and by arrival without."""
    known, unknown = {}, {}
    for name, case in CASES.items():
        known[name], unknown[name] = Subsample(), Subsample()
        X, Y = features(case)
        for rows in shares(case, world_size)[rank]:
            keys = torch.stack([rows, torch.full_like(rows, 7)], dim=1)
            known[name].add(
                BatchHashes(sample_hashes(keys)),
                X[rows],
                Y[rows].double() - 1,
                torch.ones(case.d_y, dtype=torch.float64),
            )
            unknown[name].add(None, X[rows], Y[rows])
    seen: Seen = {}
    for kind, layers in (("known", known), ("unknown", unknown)):
        for name, layer in jackknives_of_all_ranks(layers, CPU, Group.of()).items():
            seen[f"{name} {kind}"] = torch.cat([layer.samples.value[None], layer.samples.without])
            seen[f"{name} {kind} hashes"] = layer.hashes
    return seen


def degenerate(rank: int, world_size: int) -> Seen:
    """Constant and non-finite features, on one rank alone or on all, in rows and in moments."""
    layers = {}
    for width, count in ((50, 20), (3, 400)):
        X, Y = paired_features(count * world_size, width, width)
        rows = slice(rank * count, (rank + 1) * count)
        constant, broken = torch.full_like(X, 0.1), Y.clone()
        broken[-1, 1] = torch.nan  # the last rank's
        for name, x, y in (("constant", constant, Y), ("broken", X, broken), ("right", X, Y), ("tiny", X * 1e-120, Y)):
            layers[f"{name} {width}"] = ExactStatistics()
            layers[f"{name} {width}"].add(x[rows], y[rows])
    seen: Seen = {}
    for debiased in (False, True):
        for name, score in score_layers(layers, CPU, debiased=debiased).items():
            seen[f"{name} {debiased}"] = torch.tensor(score, dtype=torch.float64)
    return seen


def unequal(rank: int, world_size: int) -> Seen:
    """The last rank has other widths, or no reference; of three, one in the middle has no samples."""
    X, Y = paired_features(20, 6, 5)
    is_last = rank == world_size - 1
    seen: Seen = {}
    for count in (20, 0):
        layers = {"fine": ExactStatistics(), "odd": ExactStatistics()}
        if rank in (0, world_size - 1):
            layers["fine"].add(X[:count], Y[:count])
            layers["odd"].add(X[:count, int(is_last) :], Y[:count])
        seen[f"widths {count}"] = message(lambda layers=layers: score_layers(layers, CPU, debiased=False))
    seen["alone"] = message(lambda: layers["odd"].score(CPU, debiased=False))
    first = ExactStatistics()
    first.add(X, Y)
    first.score(CPU, debiased=False)
    second = ExactStatistics(reference=None if is_last else first.reference_terms)
    second.add(X, Y)
    seen["reference"] = message(lambda: second.score(CPU, debiased=False))
    others = ExactStatistics(reference=first.reference_terms)
    if not is_last:
        others.add(X, Y)
    seen["others"] = message(lambda: others.score(CPU, debiased=False))
    seen["after"] = first.score(CPU, debiased=False).cka
    return seen


def message(function: Callable[[], Any]) -> str:
    try:
        return f"no error but {function()}"
    except ValueError as error:
        return str(error)


def minibatches(rank: int, world_size: int) -> Seen:
    """Batches in turn, but none to the last of several."""
    X, Y = paired_features(80, 6, 5)
    layers = {"one": MinibatchStatistics(), "none": MinibatchStatistics()}
    for index, rows in enumerate(torch.arange(80).split(8)):
        if index % max(world_size - 1, 1) == rank:
            layers["one"].add(X[rows], Y[rows])
    scores = score_layers(layers, CPU, debiased=False)
    return {name: torch.tensor(score, dtype=torch.float64) for name, score in scores.items()}


def groups(rank: int, world_size: int) -> Seen:
    """The first rank by itself, and all others; what is asked of one group leaves the other alone."""
    members = [[0], list(range(1, world_size))]
    handles = [dist.new_group(ranks) for ranks in members]
    mine = min(rank, 1)
    X, Y = paired_features(20 * world_size, 30, 40)
    layer = ExactStatistics()
    layer.add(X[20 * rank : 20 * (rank + 1)], Y[20 * rank : 20 * (rank + 1)])
    return {"cka": layer.score(CPU, debiased=False, group=handles[mine]).cka}


def collectives(rank: int, world_size: int) -> Seen:
    """How many collectives many small layers take."""
    calls = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}
    for name, original in originals.items():
        setattr(dist, name, lambda *args, original=original, **kwargs: (calls.append(1), original(*args, **kwargs)))
    layers = {}
    for index in range(100):
        n, d = (10, 30) if index % 2 else (100, 4)
        layers[str(index)] = ExactStatistics()
        layers[str(index)].add(*paired_features(n, d, d, seed=index * world_size + rank))
    score_layers(layers, CPU, debiased=False)
    for name, original in originals.items():
        setattr(dist, name, original)
    return {"calls": float(len(calls))}


def memory(rank: int, world_size: int) -> Seen:
    """MiB that are taken on top while 4 layers of 4,096 features are scored, of which each rank has 128 rows."""
    generator = torch.Generator().manual_seed(rank)
    layers = {str(index): ExactStatistics() for index in range(4)}
    for each in layers.values():
        for _ in range(8):
            each.add(*torch.randn(2, 16, 4096, generator=generator))
    dist.all_reduce(torch.zeros(10**6))  # connects the ranks
    before = _peak_kilobytes(anew=True)
    score_layers(layers, CPU, debiased=True)
    return {"mebibytes": (_peak_kilobytes() - before) / 1024}


def main(folder: Path) -> None:
    world_sizes = {unequal: (2, 3), groups: (3,), memory: (2, 3), collectives: (1, 3)}
    for job in (scored, subsamples, degenerate, unequal, minibatches, groups, collectives, memory):
        for world_size in world_sizes.get(job, (1, 2, 3)):
            fork_ranks(work, job, world_size, folder, SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
