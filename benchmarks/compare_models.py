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


def clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns:
    """A loader that runs a bare copy of a model on each of its batches, another model's at every pass.

    Attributes:
        bare: seconds of loading and bare forward passes.
        extra: seconds of bare forward passes alone, which only this benchmark takes.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]], models: list[nn.Module], device: str) -> None:
        self.loader, self.models, self.device = loader, copy.deepcopy(models), device
        self.bare = self.extra = 0.0

    def __iter__(self) -> Iterator[list[Tensor]]:
        model = self.models.pop(0)
        start = clock(self.device)
        for index, batch in enumerate(self.loader):
            batch = [tensor.to(self.device) for tensor in batch]
            self.bare += clock(self.device) - start
            if index % 2:
                self._forward(model, batch)
            yield batch
            if not index % 2:
                self._forward(model, batch)
            start = clock(self.device)

    def _forward(self, model: nn.Module, batch: list[Tensor]) -> None:
        start = clock(self.device)
        with torch.no_grad():
            model(batch[0])
        seconds = clock(self.device) - start
        self.bare, self.extra = self.bare + seconds, self.extra + seconds


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 64], help="in pixels; 16 a token")
    parser.add_argument("--repetitions", type=int, nargs="+", default=[2, 9], help="for each size of images")
    args = parse(parser, {"samples": 64, "batch_size": 32, "image_sizes": [32], "repetitions": [1]})
    sizes = zip(args.image_sizes, args.repetitions, strict=True)
    name = "vit_tiny_patch16_224"
    tables = [measure(name, args.samples, args.batch_size, image_size, number) for image_size, number in sizes]
    report("compare_models", args, tables)


def measure(name: str, samples: int, batch_size: int, image_size: int, repetitions: int, device: str = "cpu") -> Result:
    """Compare two of timm's models of this name, on random images."""
    models: list[nn.Module] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model(name, num_classes=10, img_size=image_size).eval().to(device))
    images = torch.randn(samples, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(images), batch_size)

    def bare(turns: Turns) -> None:
        with torch.no_grad():
            for model in models:
                for (batch,) in turns:
                    model(batch)

    def exact(turns: Turns) -> None:
        compare(*models, turns, settings=Settings(intervals=False), device=device, progress=False)

    def with_intervals(turns: Turns) -> None:
        compare(*models, turns, device=device, progress=False)

    def minibatch(turns: Turns) -> None:
        settings = Settings(measure="minibatch_cka", batch_size=batch_size)
        compare(*models, turns, settings=settings, device=device, progress=False)

    runs: dict[str, Callable[[Turns], None]] = {
        "both forward passes, again: the noise": bare,
        "compare, exact, debiased": exact,
        "compare, exact, debiased, with intervals": with_intervals,
        "compare, minibatch": minibatch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(Turns(DataLoader(TensorDataset(images[:batch_size]), batch_size), models, device))
    for _ in range(repetitions):
        for kind, run in runs.items():
            turns = Turns(loader, models, device)
            start = clock(device)
            run(turns)
            seconds[kind].append(clock(device) - start - turns.extra)
            ratios[kind].append(seconds[kind][-1] / turns.bare)
    rows = [
        [kind, spread(seconds[kind]), spread(ratios[kind]), "<= 1.05" if kind.startswith("compare") else None]
        for kind in runs
    ]
    return Result(
        f"Two {name}, {device}, {samples} images of {image_size} pixels in batches of {batch_size}",
        ["run", "seconds", "time / forward passes", "target"],
        rows,
        "Median (min - max; repetitions).",
    )


if __name__ == "__main__":
    main()
