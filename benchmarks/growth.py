"""How do time and memory of tracking, above a bare training's, grow with layers, samples, features and ranks?

A chain of linear layers on random features. One of the four numbers is varied at a time, the others stay at `BASE`.

- time: of a later validation, and of the recording pass, less that of a bare validation. On one process tracked and
  bare run in turns, batch by batch (`turns.py`), and the seconds that the thread was on the CPU count; on several,
  validations take turns as a whole, and the slowest rank's seconds on the CPU count.
- memory: resident memory at its highest, of all validations, less that of a bare training: fresh processes, on one
  rank. `features` is what the recorded features take, n x d x 8 bytes a layer (float32 beyond 256 MiB).

`growth.png` beside the JSON shows all of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import MIB, RESULTS, Result, new_parser, parse, peak_memory, report, return_freed_memory
from lightning.pytorch.strategies import DDPStrategy
from synchronisation import on_all_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import PacedFit, in_turns, steady_malloc
from workload import NUM_CLASSES, fit, new_callbacks

BATCH = 64
BASE = {"layers": 8, "n": 512, "d": 512, "ranks": 1}
SWEEPS = {
    "layers": [2, 4, 8, 16, 32],
    "n": [128, 512, 2048, 8192],
    "d": [128, 512, 2048, 4096],
    "ranks": [1, 2, 4],
}
QUICK_BASE = {"layers": 1, "n": 64, "d": 16, "ranks": 1}
QUICK = {"layers": [1, 2], "n": [64, 128], "d": [16, 32], "ranks": [1, 2]}
WAYS = ("bare", "tracked")
Point = Mapping[str, int]


def network(point: Point) -> nn.Module:
    torch.manual_seed(0)
    d = point["d"]
    blocks = [nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(point["layers"])]
    return nn.Sequential(*blocks, nn.Linear(d, NUM_CLASSES)).eval()


def loader(point: Point) -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(point["n"], point["d"], generator=generator) + 1
    labels = torch.randint(NUM_CLASSES, (point["n"],), generator=generator)
    return DataLoader(TensorDataset(features, labels), max(BATCH // point["ranks"], 1))


def options(point: Point, way: str, epochs: int) -> dict[str, Any]:
    return {"network": network(point), "loader": loader(point), "callbacks": new_callbacks(way), "epochs": epochs}


def seconds_on_one(point: Point, epochs: int, rounds: int) -> dict[str, float]:
    """What a later validation and the recording take above a bare validation."""
    runs = [in_turns_on_one(point, epochs) for _ in range(rounds)]
    later = [turn for run in runs for turn in run[1:]]
    bare = statistics.median(turn["bare"] for turn in later)
    return {
        "recording": statistics.median(run[0]["tracked"] for run in runs) - bare,
        "later": statistics.median(turn["tracked"] - turn["bare"] for turn in later),
        "bare": bare,
    }


def in_turns_on_one(point: Point, epochs: int) -> list[dict[str, float]]:
    """Seconds on the CPU of each pass of a training without and one with tracking; the latter's first records."""
    fits = {way: PacedFit("cpu", **options(point, way, epochs)) for way in WAYS}
    order = random.Random(0)
    rounds = [in_turns(fits, order) for _ in range(epochs)]
    in_turns({"tracked": fits["tracked"]}, order)  # the recording is one more
    for each in fits.values():
        each.advance()
    return [{way: seconds.cpu for way, seconds in turn.items()} for turn in rounds]


def seconds_on_ranks(point: Point, epochs: int, rounds: int) -> dict[str, Any]:
    """On each rank: seconds on the CPU of all passes of each way, in turns."""
    size = dist.get_world_size()
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    seen: dict[str, Any] = {way: [] for way in WAYS}

    for _ in range(rounds):
        for way, found in seen.items():
            passes: list[float] = []
            found.append(passes)

            def around_pass(run: Callable[[], Any], passes: list[float] = passes) -> None:
                dist.barrier()
                start = time.process_time()
                run()
                passes.append(time.process_time() - start)

            strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo") if size > 1 else "auto"
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                fit(**options(point, way, epochs), folder=Path(folder), around_pass=around_pass,
                    devices=size, strategy=strategy)  # fmt: skip
    return seen


def of_slowest(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def median(way: str, passes: slice) -> float:
        slowest = [
            max(each)
            for turn in zip(*(rank[way] for rank in ranks), strict=True)
            for each in list(zip(*turn, strict=True))[passes]
        ]
        return statistics.median(slowest)

    bare = median("bare", slice(1, None))
    recording, later = median("tracked", slice(0, 1)), median("tracked", slice(2, None))
    return {"recording": recording - bare, "later": later - bare, "bare": bare}


def peak(point: Point, way: str) -> float:
    """MiB of this process at its highest during a pass, above what it had before the training."""
    return_freed_memory()
    given = options(point, way, 2)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        fit(**given, folder=Path(folder), around_pass=lambda run: peaks.append(peak_memory(run)[1]))
    return max(peaks) / MIB


def memory(point: Point, threads: int) -> float:
    peaks = []
    for way in reversed(WAYS):
        command = [sys.executable, __file__, "--threads", str(threads), "--child", json.dumps([dict(point), way])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks.append(float(output.split()[-1]))
    return peaks[0] - peaks[1]


def points(base: Point, sweeps: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Point]]:
    for name, values in sweeps.items():
        yield from ((name, {**base, name: value}) for value in values)


def draw(
    base: Point,
    sweeps: Mapping[str, Sequence[int]],
    measured: Sequence[tuple[str, Point, dict[str, float]]],
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    labels = {"layers": "layers", "n": "samples n", "d": "features d", "ranks": "ranks"}
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, len(sweeps), sharey="row", squeeze=False)
    for column, name in enumerate(sweeps):
        here = [(point[name], found) for swept, point, found in measured if swept == name]
        x = [value for value, _ in here]
        upper, lower = axes[:, column]
        for key, label in (("later", "later validation"), ("recording", "recording pass")):
            upper.plot(x, [max(1000 * found[key], 0.1) for _, found in here], "o-", label=f"{label}, above bare")
        upper.plot(x, [1000 * found["bare"] for _, found in here], ":", color="grey", label="a bare validation")
        lower.plot(x, [found["memory"] for _, found in here], "o-", label="above bare")
        lower.plot(x, [found["features"] for _, found in here], ":", color="grey", label="the features themselves")
        fixed = ", ".join(f"{other} = {value}" for other, value in base.items() if other != name)
        upper.set_title(fixed, fontsize=9)
        for each in (upper, lower):
            each.set(xscale="log", yscale="log", xlabel=labels[name])
            each.set_xticks(x, [f"{value:,}" for value in x])
            each.minorticks_off()
            each.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("MiB")
    for row in axes[:, 0]:
        row.legend(fontsize=8)
    axes[1, -1].axis("off") if "ranks" in sweeps else None  # memory was taken on one rank
    figure.savefig(path, dpi=110)
    print(f"Drawn to {path}")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each point")
    parser.add_argument("--child", help="print the memory of this point; used by the script")
    parser.set_defaults(threads=1)
    args = parse(parser, {"epochs": 3, "rounds": 1})
    if args.child is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            found = peak(*json.loads(args.child))
        print(found)
        return
    base, sweeps = (QUICK_BASE, QUICK) if args.quick else (BASE, SWEEPS)
    rank_times = {  # first, before this process has threads that would be forked
        size: of_slowest(on_all_ranks(size, seconds_on_ranks, {**base, "ranks": size}, args.epochs, args.rounds))
        for size in sweeps["ranks"]
    }
    steady_malloc()
    measured, rows, known = [], [], {}
    with contextlib.redirect_stdout(io.StringIO()):
        seconds_on_one(QUICK_BASE, 2, 1)  # what the first training of a process loads
    for name, point in points(base, sweeps):
        if name == "ranks":
            times, above = rank_times[point["ranks"]], float("nan")
        else:
            key = tuple(point.values())
            if key not in known:
                with contextlib.redirect_stdout(io.StringIO()):
                    known[key] = seconds_on_one(point, args.epochs, args.rounds), memory(point, args.threads)
            times, above = known[key]
        features = point["layers"] * point["n"] * point["d"] * 8 / MIB
        found = {**times, "memory": above, "features": features}
        measured.append((name, point, found))
        milliseconds = [1000 * found[key] for key in ("bare", "recording", "later")]
        rows.append([f"{name} = {point[name]}", *milliseconds, features, above, above / features])
    columns = ["varied", "bare validation, ms", "recording above bare, ms", "later above bare, ms", "features, MiB",
               "memory above bare, MiB", "memory / features"]  # fmt: skip
    caption = "Medians. All else as at the base. On several ranks the seconds are those of the slowest rank's CPU."
    title = "Growth from " + ", ".join(f"{name} = {value}" for name, value in base.items())
    report("growth", args, [Result(title, columns, rows, caption)])
    draw(base, sweeps, measured, RESULTS / ("quick" if args.quick else "") / "growth.png")


if __name__ == "__main__":
    main()
