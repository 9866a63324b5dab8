"""How much memory does a validation take, at its highest?

Every measurement is a fresh process with one `Trainer.fit`, whose second and later validations are taken together
as "later". The resident memory's high-water mark is set back before each validation, and malloc returns what is freed,
so that the peak is what was in use. The processes of all variants take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MIB, Result, new_parser, parse, peak_memory, ratios, report, return_freed_memory, spread
from peers import missing
from workload import IMAGE_MODELS, VARIANTS, fit, new_callbacks, new_loader, new_network


def measure(args: Any) -> list[int]:
    """Peak bytes of each validation of the variant `args.child`, in this process."""
    return_freed_memory()
    torch.manual_seed(0)
    peaks = []

    def around_validation(validation: Callable[[], Any]) -> None:
        peaks.append(peak_memory(validation)[1])

    with tempfile.TemporaryDirectory() as folder:
        fit(
            new_network(args.model),
            new_loader(args.model, args.samples, args.batch_size),
            new_callbacks(args.child),
            args.epochs,
            Path(folder),
            around_validation,
        )
    return peaks


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=IMAGE_MODELS, default="vit_tiny")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3, help="validations in each process")
    parser.add_argument("--repetitions", type=int, default=5, help="processes of each variant")
    parser.add_argument(
        "--child", choices=VARIANTS, help="print the peaks of this variant, in bytes; used by the script"
    )
    args = parse(parser, {"samples": 64, "batch_size": 16, "epochs": 2, "repetitions": 1})
    if args.child is not None:
        print("\n" + json.dumps(measure(args)))
        return

    unavailable = missing("pytorch-cka")
    variants = [variant for variant in VARIANTS if variant != "peer" or unavailable is None]
    first: dict[str, list[float]] = {variant: [] for variant in variants}
    later: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(args.repetitions):
        for variant in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", variant]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks = json.loads(output.splitlines()[-1])
            first[variant].append(peaks[0] / MIB)
            later[variant].append(max(peaks[1:]) / MIB)

    rows: list[list[Any]] = []
    for variant in variants:
        for name, peaks in (("first", first), ("later", later)):
            added = [mine - bare for mine, bare in zip(peaks[variant], peaks["bare"], strict=True)]
            rows.append([f"{VARIANTS[variant]}, {name}", spread(peaks[variant]), spread(added),
                         ratios(peaks[variant], peaks["bare"])])  # fmt: skip
    if unavailable is not None:
        rows.append([VARIANTS["peer"], unavailable, None, None])
    weights = sum(parameter.nbytes for parameter in new_network(args.model).parameters()) / MIB
    title = f"{args.model}, {args.samples} samples in batches of {args.batch_size}: resident memory at its highest"
    caption = f"Median (min - max; repetitions). The weights are {weights:.3g} MiB; no copy of them is held."
    columns = ["validation", "peak, MiB", "over bare, MiB", "peak / bare"]
    report("peak_memory", args, [Result(title, columns, rows, caption)])


if __name__ == "__main__":
    main()
