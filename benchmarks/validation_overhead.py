"""What does tracking add to the time of a validation, and what does the recording take?

Every variant is a `Trainer.fit` of its own, all in one process, and all advance in turns, batch by batch (`turns.py`):
in the first round the recording pass of those that record next to the first validation of the others, then the
validations. Timed is the whole of Lightning's validation loop: data loading, steps, hooks and the logging to
TensorBoard. Of the recording pass, all that happens between the start of the training and its first batch.

A ratio is taken of passes that ran in turns. "Bare, again" is a second bare training: how far the median of its ratios
is from 1 is the noise of the instrument.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Result, Spread, new_parser, parse, report, spread
from peers import missing
from torch import nn
from turns import PacedFit, Seconds, in_turns, steady_malloc
from workload import MODELS, RECORDING, VARIANTS, new_callbacks, new_loader, new_network

Round = dict[str, Seconds]
TARGETS = {"recording": "<= 1.02", "later": "<= 1.01", "intervals": "<= 1.01"}


def shared_copy(network: nn.Module) -> nn.Module:
    """A copy with the same weights in memory, so that a CPU's cache holds as much of them as of one network's."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})


def measure(args: Any, variants: Sequence[str], epochs: int) -> list[Round]:
    """One fit of each variant: what each pass took, in turns with the others."""
    torch.manual_seed(0)
    network = new_network(args.model).eval().to(args.device)
    loader = new_loader(args.model, args.samples, args.batch_size)
    fits = {
        variant: PacedFit(
            args.device,
            network=shared_copy(network),
            loader=loader,
            epochs=epochs,
            callbacks=new_callbacks(variant),
            precision=args.precision,
        )
        for variant in variants
    }
    order = random.Random(0)
    rounds = [in_turns(fits, order) for _ in range(epochs)]
    in_turns({variant: fits[variant] for variant in variants if variant in RECORDING}, order)  # they have one more
    for each in fits.values():
        each.advance()
    return rounds


def interval(values: Sequence[float]) -> str:
    """Where the median lies, with a probability of 95 %, whatever the values' distribution."""
    cut = max(math.floor(len(values) / 2 - 0.98 * math.sqrt(len(values))), 0)
    ordered = sorted(values)
    return f"{ordered[cut]:.4f} - {ordered[len(values) - 1 - cut]:.4f}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit_tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true", help="of the trainer, such as bf16-true")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fits", type=int, default=5, help="each has one recording")
    parser.add_argument("--epochs", type=int, default=8, help="passes of each fit")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="bare is always there")
    parser.set_defaults(threads=1)  # what other threads do for torch is not counted
    args = parse(parser, {"samples": 64, "batch_size": 16, "fits": 2, "epochs": 3})
    steady_malloc()

    unavailable = missing("pytorch-cka")
    chosen = [name for name in VARIANTS if name in args.variants and name != "bare"]
    variants = ["control", "bare", *(name for name in chosen if name != "peer" or unavailable is None)]
    with contextlib.redirect_stdout(io.StringIO()):  # the table that a tracked fit ends with
        measure(args, variants, epochs=2)  # imports and first allocations
        fits = [measure(args, variants, args.epochs) for _ in range(args.fits)]
    first, later = [rounds[0] for rounds in fits], [turn for rounds in fits for turn in rounds[1:]]

    def row(
        name: str,
        rounds: Sequence[Round],
        variant: str,
        target: str | None = None,
        more: float = 0.0,
        base: str = "bare",
    ) -> list[Any]:
        """Ratios of a variant to as much as a pass of another one, and `more` times that, in the same round."""

        def compared(clock: Callable[[Seconds], float]) -> list[float]:
            return [clock(each[variant]) / clock(each[base]) / (1 + more) for each in rounds]

        cpu = compared(lambda seconds: seconds.cpu)
        cells: list[Spread | str | None] = [spread(cpu), interval(cpu)] if args.device == "cpu" else [None, None]
        wall = compared(lambda seconds: seconds.wall)
        relative = VARIANTS[base] if not more else "bare and one batch"
        return [name, relative, *cells, spread(wall), *([interval(wall)] if args.device != "cpu" else [None]), target]

    one_batch = args.batch_size / args.samples
    rows = [row("bare, again: the noise", later, "control")]
    for variant in variants[2:]:
        name, is_target = VARIANTS[variant], variant == "tracked"
        if variant in RECORDING:
            rows.append(row(f"{name}, recording pass", first, variant, TARGETS["recording"] if is_target else None))
            rows.append(row(f"{name}, recording pass", first, variant, more=one_batch))
        else:
            rows.append(row(f"{name}, first", first, variant))
        rows.append(row(f"{name}, later", later, variant, TARGETS["later"] if is_target else None))
    if {"tracked", "no_intervals"} <= set(variants):
        rows.append(row("intervals", later, "tracked", TARGETS["intervals"], base="no_intervals"))
    if "peer" in chosen and unavailable is not None:
        rows.append([VARIANTS["peer"], unavailable, None, None, None, None, None])
    columns = ["validation", "relative to", "CPU time", "95 %", "wall time", "95 %", "target"]
    seconds = spread([turn["bare"].cpu if args.device == "cpu" else turn["bare"].wall for turn in later])
    noise = abs(spread([turn["control"].cpu / turn["bare"].cpu for turn in later]).median - 1)
    caption = (
        "Median (min - max; repetitions), and where the median lies with a probability of 95 %. "
        f"A bare validation takes {seconds.median:.3g} s. The noise is {100 * noise:.2f} %. The recording pass repeats "
        "its first batch, to see whether the model is a function of its inputs."
    )
    title = f"{args.model}, {args.device}, {args.samples} samples in batches of {args.batch_size}"
    report("validation_overhead", args, [Result(title, columns, rows, caption)])


if __name__ == "__main__":
    main()
