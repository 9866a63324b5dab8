"""What does tracking cost a training whose network is compiled?

Tracked validation steps run as they are written, since compiled code does not notice hooks; the training stays
compiled. So a tracked validation next to a bare compiled one, and next to a bare one that isn't compiled. Whole
validations take turns; the first of each fit, in which code is compiled, is not counted.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Result, new_parser, parse, ratios, report, spread
from workload import MODELS, fit, new_callbacks, new_loader, new_network

WAYS = {"bare, compiled": "bare", "bare, compiled, again: the noise": "bare", "bare, not compiled": "bare",
        "tracked, compiled": "tracked"}  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit_tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    args = parse(parser, {"samples": 32, "batch_size": 16, "fits": 1, "epochs": 3})

    torch.manual_seed(0)
    network = new_network(args.model).to(args.device)
    compiled = torch.compile(network)
    loader = new_loader(args.model, args.samples, args.batch_size)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.fits + 1):
        for way, found in seconds.items():
            passes: list[float] = []

            def around_pass(run: Callable[[], Any], passes: list[float] = passes) -> None:
                start = time.perf_counter()
                run()
                passes.append(time.perf_counter() - start)

            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                fit(network if "not" in way else compiled, loader, new_callbacks(WAYS[way]), args.epochs,
                    Path(folder), around_pass, device=args.device)  # fmt: skip
            if number:  # not the first, which compiles
                found.extend(passes[-(args.epochs - 1) :])
    bare, eager = seconds["bare, compiled"], seconds["bare, not compiled"]
    rows = [[way, spread(found), ratios(found, bare), ratios(found, eager)] for way, found in seconds.items()]
    columns = ["later validations", "seconds", "time / bare, compiled", "time / bare, not compiled"]
    title = f"{args.model}, {args.device}, {args.samples} samples in batches of {args.batch_size}"
    report("compiled", args, [Result(title, columns, rows, "Median (min - max; repetitions).")])


if __name__ == "__main__":
    main()
