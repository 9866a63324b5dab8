"""What does `FreezeConverged` save of the time of a fine-tuning, and what does it cost in accuracy?

Two small fine-tunings (`finetuning_tasks.py`), each over several seeds, side by side: everything trained; gradual
unfreezing (Howard & Ruder 2018, arXiv 1801.06146: the head and the last block at first, one more block at a time); the
first blocks frozen from the start, as many as take the FLOPs that FreezeConverged takes for this seed; FreezeConverged;
and FreezeConverged with cached activations.

Times are of the CPU, in one thread, of the whole of `Trainer.fit`: with validations and, for FreezeConverged, with all
that CKA takes, the recording before the first step included. A ratio is taken between fits of the same seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from common import RESULTS, Result, new_parser, parse, ratios, report
from finetuning_tasks import Encoder, FineTuning, Task, digit_data, kept, pretrained_digits, pretrained_text, text_data

from lit_cka import FreezeConverged

METHODS = {
    "full": "everything trained",
    "gradual": "gradual unfreezing",
    "fixed": "first blocks frozen from the start, of the same FLOPs",
    "freeze": "FreezeConverged",
    "early": "FreezeConverged, after one evaluation",
    "cache": "FreezeConverged, activations cached",
}
_SIZES = {"text": "six blocks of width {width} over 16 words", "image": "six blocks of width {width} over 16 patches"}


class Fit(NamedTuple):
    """What one fit took and gave."""

    seconds: float
    accuracy: float
    flops_saved: float
    num_frozen: int
    history: list[Any]


class GradualUnfreezing(pl.Callback):
    """Trains the head and the last block at first, and one block more after each so many epochs."""

    def __init__(self, num_epochs: int) -> None:
        self._num_epochs = num_epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        depth = len(pl_module.network.blocks)
        freeze(pl_module, max(0, depth - 1 - trainer.current_epoch * depth // max(self._num_epochs - 1, 1)))


def freeze(module: FineTuning, num_frozen: int) -> None:
    """Have the first blocks frozen, with what comes before them, and no others."""
    network = module.network
    assert isinstance(network, Encoder)
    frozen = [network.stem, *network.blocks[:num_frozen]] if num_frozen else []
    network.requires_grad_(True)
    network.position.requires_grad_(not num_frozen)
    network.train()
    for part in frozen:
        part.requires_grad_(False)
        part.eval()


def fitted(task: Task, seed: int, args: Any, callback: pl.Callback | None = None, num_frozen: int = 0) -> Fit:
    """Fine-tune once."""
    module, loaders = task.module(seed), task.loaders(seed)
    pl.seed_everything(seed, verbose=False)
    if num_frozen:
        freeze(module, num_frozen)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = pl.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=args.epochs,
            val_check_interval=1 / args.validations,
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.process_time()
        trainer.fit(module, *loaders[:2])
        seconds = time.process_time() - start
        accuracy = trainer.validate(module, loaders[2], verbose=False)[0]["val_acc"]
    if not isinstance(callback, FreezeConverged):
        return Fit(seconds, accuracy, 0.0, num_frozen, [])
    return Fit(seconds, accuracy, callback.flops_saved, callback.num_frozen, callback.history)


def compared(task: Task, seed: int, args: Any) -> dict[str, Fit]:
    """Fine-tune in every way from the same start."""
    options = {"limit": args.limit, "num_evaluations": args.evaluations, "patience": args.patience}
    new: dict[str, Callable[[], pl.Callback | None]] = {
        "freeze": lambda: FreezeConverged(**options),
        "full": lambda: None,
        "early": lambda: FreezeConverged(**{**options, "num_evaluations": 1}),
        "cache": lambda: FreezeConverged(**options, cache="memory"),
        "gradual": lambda: GradualUnfreezing(args.epochs),
    }
    chosen = {"full", "freeze", *args.methods}
    fits = {name: fitted(task, seed, args, make()) for name, make in new.items() if name in chosen}
    if "fixed" in chosen:
        # A backward takes twice a forward, of blocks that take as much each.
        depth = len(task.pretrained.blocks)  # type: ignore[arg-type]
        num_fixed = min(round(1.5 * depth * fits["freeze"].flops_saved), depth - 1)
        fits["fixed"] = fitted(task, seed, args, num_frozen=num_fixed)
    return fits


def mean_and_error(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(name: str, fits: Sequence[dict[str, Fit]], args: Any) -> Result:
    """One row for each way."""
    full = [each["full"] for each in fits]
    rows = []
    for method, title in METHODS.items():
        if method not in fits[0]:
            continue
        ours = [each[method] for each in fits]
        speed = ratios([fit.seconds for fit in full], [fit.seconds for fit in ours])
        accuracy = mean_and_error([fit.accuracy for fit in ours])
        gained = mean_and_error([a.accuracy - b.accuracy for a, b in zip(ours, full, strict=True)])
        saved = statistics.mean(fit.flops_saved for fit in ours) if method in ("freeze", "early", "cache") else None
        frozen = statistics.mean(fit.num_frozen for fit in ours)
        rows.append([title, speed, accuracy, "" if method == "full" else gained, saved, frozen])
    first = [fit["freeze"].history[0]["step"] for fit in fits if fit["freeze"].history]
    caption = (
        f"Median (min - max; repetitions) of the times as fast, and means with their standard errors over {len(fits)} "
        f"seeds. The first blocks were frozen after {statistics.mean(first) if first else float('nan'):.0f} steps in "
        f"the mean. Limit {args.limit:g} of the change 1 - CKA, for {args.evaluations} evaluations in a row, of "
        f"{args.validations} in an epoch; {args.epochs} epochs. The accuracy is that on 1,000 test samples."
    )
    columns = ["training", "times as fast", "accuracy", "minus everything trained", "FLOPs saved", "blocks frozen, end"]
    size = _SIZES[name].format(width=args.width)
    return Result(f"Fine-tuning of {size}", columns, rows, caption)


def tasks(args: Any) -> dict[str, Callable[[], Task]]:
    """Each makes the fine-tuning of this name."""
    width, steps = args.width, args.pretraining
    folder = RESULTS / "pretrained"

    def text() -> Task:
        path = folder / f"text-{width}-{steps}.pt"
        network = kept(path, lambda: pretrained_text(steps, width, 6))
        return Task(network, lambda seed: text_data(seed, args.samples), args.learning_rate, 32)

    def image() -> Task:
        path = folder / f"image-{width}-{steps}.pt"
        network = kept(path, lambda: pretrained_digits(steps, width, 6))
        return Task(network, lambda seed: digit_data(seed, args.samples), args.learning_rate, 32)

    return {"text": text, "image": image}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--validations", type=int, default=2, help="in an epoch")
    parser.add_argument("--samples", type=int, default=1600, help="to train on")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--pretraining", type=int, default=700, help="steps")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=float, default=0.05)
    parser.add_argument("--evaluations", type=int, default=2, help="in a row below the limit")
    parser.add_argument("--patience", type=int, default=4, help="evaluations until a worse loss has all trained again")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside full and freeze")
    parser.add_argument("--tasks", nargs="+", choices=("text", "image"), default=["text", "image"])
    parser.set_defaults(threads=1)
    quick = {"seeds": 1, "epochs": 2, "samples": 64, "width": 8, "pretraining": 2, "limit": 0.5}
    args = parse(parser, quick)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    for name in args.tasks:
        task = tasks(args)[name]()
        fitted(task, 0, argparse.Namespace(**{**vars(args), "epochs": 1}), FreezeConverged())  # imports
        results.append(table(name, [compared(task, seed, args) for seed in range(args.seeds)], args))
    report("freezing", args, results)


if __name__ == "__main__":
    main()
