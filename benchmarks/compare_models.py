"""What does the matrix of all blocks of two models cost, next to the models' bare forward passes?

Two ViT-Tiny of other seeds on random images of 64 pixels: 12 x 12 blocks. Bare is both models over the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch
from common import Result, new_parser, parse, ratios, report, spread
from torch.utils.data import DataLoader, TensorDataset

from lit_cka.analysis import Settings, compare


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parse(parser, {"samples": 64, "batch_size": 32, "repetitions": 1})

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64).eval())
    images = torch.randn(args.samples, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(images), args.batch_size)

    def bare() -> None:
        with torch.no_grad():
            for model in models:
                for (batch,) in loader:
                    model(batch)

    def matrix(settings: Settings) -> None:
        compare(models[0], models[1], loader, settings=settings, progress=False)

    runs: dict[str, Callable[[], None]] = {
        "both forward passes alone": bare,
        "both forward passes, again: the noise": bare,
        "compare, exact, debiased": lambda: matrix(Settings()),
        "compare, minibatch": lambda: matrix(Settings(measure="minibatch_cka", batch_size=args.batch_size)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    alone = times["both forward passes alone"]
    rows = [
        [name, spread(values), ratios(values, alone), "<= 1.05" if name.startswith("compare") else None]
        for name, values in times.items()
    ]
    table = Result(
        f"Two ViT-Tiny, {args.samples} images in batches of {args.batch_size}",
        ["run", "seconds", "time / forward passes", "target"],
        rows,
        "Median (min - max; repetitions).",
    )
    report("compare_models", args, [table])


if __name__ == "__main__":
    main()
