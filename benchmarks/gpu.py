"""What tracking, comparing and editing take on one GPU: everything in one run of under 8 minutes, one JSON, one page.

ViT-B/32, ViT-L/14 and a language model of a billion parameters in bf16, bare against tracked, batch by batch in turns;
`compare` next to bare forward passes; the edit of ViT-L/14 against a loop of SVDs; and the tests that need a GPU.
Random weights and random data. `gpu_wheels.txt` lists what a machine needs that has torch, but no network:

```bash
pip download --no-deps -r benchmarks/gpu_wheels.txt -d wheels                        # where there is a network
pip install --no-index --no-deps wheels/* && python benchmarks/gpu.py                # there
python benchmarks/gpu.py --device cpu --tiny                                         # anywhere: does the script work?
```
"""

from __future__ import annotations

import contextlib
import gc
import io
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_models
import monosoup_edit
import torch
import validation_overhead
from common import MIB, Result, new_parser, parse, peak_memory, report, spread
from workload import fit, new_callbacks, new_loader, new_network

# Model: samples, size of a batch.
TRACKED = {"vit_b32": (2048, 128), "vit_l14": (512, 64), "llama_1b": (256, 16)}
TRACKED_TINY = {"vit_tiny": (32, 8), "llama_tiny": (16, 4)}
ROOT = Path(__file__).parent.parent


def tracking(model: str, samples: int, batch_size: int, device: str, fits: int, epochs: int) -> list[list[Any]]:
    """Rows: passes of a tracked training and of a second bare one, relative to a bare one's of the same round."""
    args = Namespace(model=model, samples=samples, batch_size=batch_size, device=device, precision="bf16-true")
    with contextlib.redirect_stdout(io.StringIO()):
        validation_overhead.measure(args, ["control", "bare", "tracked"], 2)  # first allocations, choice of kernels
        rounds = [validation_overhead.measure(args, ["control", "bare", "tracked"], epochs) for _ in range(fits)]
    later = [turn for run in rounds for turn in run[1:]]

    def relative(turns: list[Any], variant: str) -> Any:
        return spread([turn[variant].wall / turn["bare"].wall for turn in turns])

    seconds = spread([turn["bare"].wall for turn in later])
    memory = {way: peak(args, way) for way in ("bare", "tracked")}
    above = memory["tracked"] - memory["bare"]
    return [
        [model, "bare, again: the noise", seconds, relative(later, "control"), memory["bare"], None],
        [model, "tracked, recording pass", None, relative([run[0] for run in rounds], "tracked"), None, None],
        [model, "tracked, later", None, relative(later, "tracked"), memory["tracked"], above],
    ]


def peak(args: Namespace, variant: str) -> float:
    """MiB that are allocated at the highest (on a CPU: that are resident) while a pass runs."""
    torch.manual_seed(0)
    network = new_network(args.model).eval().to(args.device)
    loader = new_loader(args.model, args.samples, args.batch_size)
    peaks = []

    def around_pass(run: Callable[[], Any]) -> None:
        if args.device == "cpu":
            peaks.append(peak_memory(run)[1])
            return
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit(network, loader, new_callbacks(variant), 2, Path(folder), around_pass, device=args.device,
            precision=args.precision)  # fmt: skip
    del network
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return max(peaks) / MIB


def tests() -> Result:
    """What the tests say that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "--import-mode=importlib",
               "-p", "no:cacheprovider", "-rfE", "tests"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Result("Tests marked gpu", ["pytest"], [[line] for line in [*failed, lines[-1]]])


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, once each")
    parser.add_argument("--without-tests", action="store_true")
    args = parse(parser, {})
    args.quick = args.quick or args.tiny
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a CUDA device, but torch sees none. `--device cpu --tiny` tries the script without one.")
    tiny, device, start = args.quick, args.device, time.perf_counter()
    fits, epochs = (1, 2) if tiny else (2, 6)

    results = []

    def measured(result: Result) -> None:  # written as it comes, so that a run that is stopped leaves what it has
        results.append(result)
        report("gpu", args, results)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)

    columns = ["model", "validation", "seconds", "time / bare", "memory, MiB", "above bare, MiB"]
    rows: list[list[Any]] = []
    for model, (samples, batch_size) in (TRACKED_TINY if tiny else TRACKED).items():
        rows += tracking(model, samples, batch_size, device, fits, epochs)
    measured(Result(f"Tracking in bf16, {device}", columns, rows, "Median (min - max; repetitions)."))
    sizes = ("vit_tiny_patch16_224", 32, 16, 32, 1) if tiny else ("vit_base_patch32_224", 2048, 128, 224, 3)
    measured(compare_models.measure(*sizes, device=device))
    measured(monosoup_edit.measure("RN50" if tiny else "ViT-L-14", device, 1 if tiny else 2))
    if not args.without_tests:
        measured(tests())


if __name__ == "__main__":
    main()
