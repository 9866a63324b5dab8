"""What does tracking add to the time of a validation?

Every variant is a `Trainer.fit` of its own, all in one process, and takes turns with the others: one validation of
each, then the next of each, in reversed order every other round. Timed is the whole validation loop: data loading,
steps, hooks and the logging to TensorBoard. The reference's copy is made at the start of the fit, before that.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Result, Spread, new_parser, parse, ratios, report, spread
from peers import missing
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workload import MODELS, VARIANTS, fit, new_callbacks, new_loader, new_network

TARGETS = {"tracked": ("<= 1.05", "<= 1.02")}


class Seconds(NamedTuple):
    """Of the clock on the wall, and of all threads on the CPU."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any], device: str) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


class PacedFit(threading.Thread):
    """A `fit` in a thread that runs only while another waits in `next_validation` or `finish`."""

    def __init__(self, device: str, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._device, self._kwargs = device, kwargs
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._seconds: Seconds | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            with tempfile.TemporaryDirectory() as folder:
                fit(folder=Path(folder), around_validation=self._time, device=self._device, **self._kwargs)
        except BaseException as error:
            self._error = error
        self._paused.release()

    def _time(self, validation: Callable[[], Any]) -> None:
        self._seconds = timed(validation, self._device)
        self._paused.release()
        self._go.acquire()

    def next_validation(self) -> Seconds:
        """Run up to the end of the next validation; the time that it took."""
        self._seconds = None
        self.finish()
        assert self._seconds is not None
        return self._seconds

    def finish(self) -> None:
        """Run up to the next pause: after the last validation, that is the end."""
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error


def forward_pass(network: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: str) -> None:
    with torch.no_grad():
        for inputs, _ in loader:
            network(inputs.to(device))


def measure(args: Any, variants: list[str], epochs: int) -> list[dict[str, Seconds]]:
    """One fit of each variant: what each round of validations, and one pass of the reference, took."""
    torch.manual_seed(0)
    network = new_network(args.model).eval()
    loader = new_loader(args.model, args.samples, args.batch_size)
    reference = copy.deepcopy(network).to(args.device)
    fits = {
        variant: PacedFit(
            device=args.device, network=copy.deepcopy(network), loader=loader, epochs=epochs,
            callbacks=new_callbacks(variant),
        )
        for variant in variants
    }  # fmt: skip
    turns: dict[str, Callable[[], Seconds]] = {variant: paced.next_validation for variant, paced in fits.items()}
    turns["reference"] = lambda: timed(lambda: forward_pass(reference, loader, args.device), args.device)
    rounds = []
    for epoch in range(epochs):
        order = list(turns) if epoch % 2 == 0 else list(turns)[::-1]
        rounds.append({name: turns[name]() for name in order})
    for paced in fits.values():
        paced.finish()
    return rounds


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit_tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fits", type=int, default=5, help="each has one first validation")
    parser.add_argument("--epochs", type=int, default=6, help="validations of each fit")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="bare is always there")
    args = parse(parser, {"samples": 64, "batch_size": 16, "fits": 2, "epochs": 3})

    unavailable = missing("pytorch-cka")
    chosen = [name for name in VARIANTS if name in args.variants and name != "bare"]
    variants = ["control", "bare", *(name for name in chosen if name != "peer" or unavailable is None)]
    with contextlib.redirect_stdout(io.StringIO()):  # the table that a tracked fit ends with
        measure(args, variants, epochs=2)  # imports and first allocations
        fits = [measure(args, variants, args.epochs) for _ in range(args.fits)]
    first, later = [rounds[0] for rounds in fits], [turn for rounds in fits for turn in rounds[1:]]

    def compared(rounds: list[dict[str, Seconds]], variant: str, *bases: str) -> list[Spread]:
        """Ratios by wall and by CPU time of a variant to the sum of others in the same round."""
        return [
            ratios([seconds[variant][clock] for seconds in rounds],
                   [sum(seconds[base][clock] for base in bases) for seconds in rounds])
            for clock in (0, 1)
        ]  # fmt: skip

    rows: list[list[Any]] = [
        ["bare, again: the noise", "bare", *compared(later, "control", "bare"), None],
        ["one pass of the reference alone", "bare", *compared(later, "reference", "bare"), None],
    ]
    for variant in variants[2:]:
        name, targets = VARIANTS[variant], TARGETS.get(variant, (None, None))
        if variant != "peer":
            sums = compared(first, variant, "bare", "reference")
            rows.append([f"{name}, first", "bare + one reference pass", *sums, targets[0]])
        rows.append([f"{name}, first", "bare", *compared(first, variant, "bare"), None])
        rows.append([f"{name}, later", "bare", *compared(later, variant, "bare"), targets[1]])
    if "peer" in chosen and unavailable is not None:
        rows.append([VARIANTS["peer"], unavailable, None, None, None])
    columns = ["validation", "relative to", "wall time", "CPU time", "target"]
    seconds = spread([turn["bare"].wall for turn in later])
    caption = f"Median (min - max; repetitions). A bare validation takes {seconds.median:.3g} s."
    title = f"{args.model}, {args.device}, {args.samples} samples in batches of {args.batch_size}"
    report("validation_overhead", args, [Result(title, columns, rows, caption)])


if __name__ == "__main__":
    main()
