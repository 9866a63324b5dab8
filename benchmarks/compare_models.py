"""What does the matrix of all blocks of two models cost, next to the models' bare forward passes?

Two ViT-Tiny of other seeds on random images: 12 x 12 blocks. At every batch, the bare model runs next to the one that
is watched, in turns before and after it, so that a machine whose speed drifts is as fast for both.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import timm
import torch
from common import Result, new_parser, parse, report, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka.analysis import Settings, compare


class Turns:
    """A loader that runs a bare copy of a model on each of its batches, another model's at every pass.

    Attributes:
        bare: seconds of loading and bare forward passes.
        extra: seconds of bare forward passes alone, which only this benchmark takes.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], models: list[nn.Module]) -> None:
        self.loader, self.models = loader, copy.deepcopy(models)
        self.bare = self.extra = 0.0

    def __iter__(self) -> Iterator[list[Tensor]]:
        model = self.models.pop(0)
        start = time.perf_counter()
        for index, batch in enumerate(self.loader):
            self.bare += time.perf_counter() - start
            if index % 2:
                self._forward(model, batch)
            yield batch
            if not index % 2:
                self._forward(model, batch)
            start = time.perf_counter()

    def _forward(self, model: nn.Module, batch: list[Tensor]) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            model(batch[0])
        seconds = time.perf_counter() - start
        self.bare, self.extra = self.bare + seconds, self.extra + seconds


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 64], help="in pixels; 16 a token")
    parser.add_argument("--repetitions", type=int, nargs="+", default=[2, 9], help="for each size of images")
    args = parse(parser, {"samples": 64, "batch_size": 32, "image_sizes": [32], "repetitions": [1]})
    sizes = zip(args.image_sizes, args.repetitions, strict=True)
    tables = [measure(args.samples, args.batch_size, image_size, number) for image_size, number in sizes]
    report("compare_models", args, tables)


def measure(samples: int, batch_size: int, image_size: int, repetitions: int) -> Result:
    models: list[nn.Module] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=image_size).eval())
    images = torch.randn(samples, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(images), batch_size)

    def bare(turns: Turns) -> None:
        with torch.no_grad():
            for model in models:
                for (batch,) in turns:
                    model(batch)

    def exact(turns: Turns) -> None:
        compare(*models, turns, progress=False)

    def minibatch(turns: Turns) -> None:
        compare(*models, turns, settings=Settings(measure="minibatch_cka", batch_size=batch_size), progress=False)

    runs: dict[str, Callable[[Turns], None]] = {
        "both forward passes, again: the noise": bare,
        "compare, exact, debiased": exact,
        "compare, minibatch": minibatch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(Turns(DataLoader(TensorDataset(images[:batch_size]), batch_size), models))
    for _ in range(repetitions):
        for name, run in runs.items():
            turns = Turns(loader, models)
            start = time.perf_counter()
            run(turns)
            seconds[name].append(time.perf_counter() - start - turns.extra)
            ratios[name].append(seconds[name][-1] / turns.bare)
    rows = [
        [name, spread(seconds[name]), spread(ratios[name]), "<= 1.05" if name.startswith("compare") else None]
        for name in runs
    ]
    return Result(
        f"Two ViT-Tiny, {samples} images of {image_size} pixels in batches of {batch_size}",
        ["run", "seconds", "time / forward passes", "target"],
        rows,
        "Median (min - max; repetitions).",
    )


if __name__ == "__main__":
    main()
