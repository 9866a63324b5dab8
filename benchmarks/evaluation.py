"""What does it cost to evaluate five variants, with CKA of each, against five bare test passes?

A ViT-Tiny on random images of 64 pixels. A bare pass is `trainer.test` of the classifier itself; the editor runs all
five variants in one pass. Random weights; the edit itself is done before.
"""

from __future__ import annotations

import time
import warnings

import lightning.pytorch as pl
import torch
from common import Result, new_parser, parse, ratios, report, spread
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import MonoSoupEditor
from lit_cka.models import ImageClassifier


def model(seed: int) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier("vit_tiny_patch16_224", 10, model_kwargs={"img_size": 64})


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parse(parser, {"samples": 64, "batch_size": 32, "repetitions": 1})
    warnings.filterwarnings("ignore")

    generator = torch.Generator().manual_seed(2)
    images = torch.randn(args.samples, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 10, (args.samples,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), args.batch_size)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    finetuned = model(1)
    editors = {
        "five variants": MonoSoupEditor(model(0), finetuned, max_cka_batches=0),
        "five variants, with CKA": MonoSoupEditor(model(0), finetuned),
    }
    for editor in editors.values():
        trainer.test(editor, loader, verbose=False)
    times: dict[str, list[float]] = {"five bare passes": [], **{name: [] for name in editors}}
    for _ in range(args.repetitions):
        start = time.perf_counter()
        for _ in range(5):
            trainer.test(finetuned, loader, verbose=False)
        times["five bare passes"].append(time.perf_counter() - start)
        for name, editor in editors.items():
            start = time.perf_counter()
            trainer.test(editor, loader, verbose=False)
            times[name].append(time.perf_counter() - start)
    bare = times["five bare passes"]
    targets = {"five variants, with CKA": "<= 1.1"}
    rows = [[name, spread(values), ratios(values, bare), targets.get(name)] for name, values in times.items()]
    table = Result(
        f"ViT-Tiny, {args.samples} images in batches of {args.batch_size}",
        ["evaluation", "seconds", "time / five bare passes", "target"],
        rows,
        "Median (min - max; repetitions).",
    )
    report("evaluation", args, [table])


if __name__ == "__main__":
    main()
