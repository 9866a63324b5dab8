"""How long does it take to compare two models, and what comes out?

Two ViTs of different seeds on the same random images, block by block. The packages take turns; each time is set
against `LinearCKA` of the same round. The other packages only do the whole matrix of all layers with all layers, on
all tokens of a sample in one long row; `MinibatchCKA` on flattened features is that same quantity.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from common import Result, new_parser, parse, ratios, report, spread
from peers import PEERS, missing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import LinearCKA, MinibatchCKA
from lit_cka.features.extractor import FeatureExtractor

Loader = DataLoader[tuple[Tensor, ...]]
Models = tuple[nn.Module, nn.Module]
OURS = "LinearCKA"


def forward_passes(models: Models, loader: Loader) -> None:
    """What no comparison can do without."""
    with torch.no_grad():
        for (images,) in loader:
            for model in models:
                model(images)


def same_layers(models: Models, loader: Loader, *, debiased: bool) -> Tensor:
    """CKA of each block with its counterpart (layers,), by `LinearCKA`."""
    first, second = (FeatureExtractor(model) for model in models)
    metrics = {name: LinearCKA(debiased=debiased) for name in first.layer_names}
    with first, second, torch.no_grad():
        for (images,) in loader:
            first.model(images)
            second.model(images)
            X, Y = first.collect(), second.collect()
            for name, metric in metrics.items():
                metric.update(X[name], Y[name])
    return torch.stack([metric.compute() for metric in metrics.values()])


def all_layers(models: Models, loader: Loader, *, pooling: str) -> Tensor:
    """CKA of all blocks with all blocks (layers, layers), by `MinibatchCKA`."""
    first, second = (FeatureExtractor(model, pooling=pooling) for model in models)
    metric = MinibatchCKA()
    with first, second, torch.no_grad():
        for (images,) in loader:
            first.model(images)
            second.model(images)
            metric.update(first.collect(), second.collect())
    return metric.compute()


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parse(parser, {"samples": 64, "batch_size": 32, "repetitions": 2})

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64).eval())
    images = torch.randn(args.samples, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(images), args.batch_size)
    layers = FeatureExtractor(models[0]).layer_names

    runs: dict[str, Callable[[Models, Loader], Tensor | None]] = {
        "both forward passes alone": forward_passes,
        OURS: partial(same_layers, debiased=False),
        "LinearCKA, debiased": partial(same_layers, debiased=True),
        "MinibatchCKA": partial(all_layers, pooling="mean"),
        "MinibatchCKA, flattened": partial(all_layers, pooling="flatten"),
    }
    scope = {name: "same layers, token mean" for name in runs}
    scope.update({
        "both forward passes alone": "", "MinibatchCKA": "all pairs, token mean",
        "MinibatchCKA, flattened": "all pairs, all tokens",
    })  # fmt: skip
    problems = {}
    for name, (_, compare) in PEERS.items():
        problem = missing(name)
        if problem is None:
            runs[name] = lambda pair, loader, compare=compare: compare(*pair, loader, layers)
        else:
            problems[name] = problem
        scope[name] = "all pairs, tokens of one image" if name == "ckatorch" else "all pairs, all tokens"

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, Tensor | None] = {}
    for repetition in range(-1, args.repetitions):  # the first is for imports and first allocations
        for name, run in runs.items():
            pair = (copy.deepcopy(models[0]), copy.deepcopy(models[1]))  # some leave their hooks in the models
            start = time.perf_counter()
            values[name] = run(pair, loader)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)

    rows: list[list[Any]] = []
    for name in runs:
        value = values[name]
        same = None if value is None else value.diagonal() if value.ndim == 2 else value
        shown = [None] * 3 if same is None else [float(same[index]) for index in (0, len(layers) // 2, -1)]
        rows.append([name, scope[name], spread(seconds[name]), ratios(seconds[name], seconds[OURS]), *shown])
    rows += [[name, problem] + [None] * 5 for name, problem in problems.items()]
    middle = layers[len(layers) // 2]
    columns = ["", "compares", "seconds", f"time / {OURS}", layers[0], middle, layers[-1]]
    title = f"Two ViT-Tiny, {args.samples} images in batches of {args.batch_size}: time, and CKA of three blocks"
    caption = "Median (min - max; repetitions). ckatorch's value is that of the last batch alone."
    report("offline_comparison", args, [Result(title, columns, rows, caption)])


if __name__ == "__main__":
    main()
