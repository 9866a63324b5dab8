"""Does the value depend on the batch size, or on the number of ranks?

A small ViT learns scikit-learn's digits for a few steps. The token means of two of its blocks, before and after, are
what every package gets, batch by batch: the same numbers for all. Ranks are shares of the samples, uneven where they
don't divide. `LinearCKA` and `MinibatchCKA` merge the shares' states; the other packages leave ranks to the user, and
here the ranks' values are averaged.

"all n" is one batch of all n samples. Where a package fails, its message is in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from common import Result, new_parser, parse, report
from peers import PEERS, missing
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import LinearCKA, MinibatchCKA
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.functional import linear_cka

# From the ranks' features, (x, y) each, and a batch size.
Measure = Callable[[Sequence[tuple[Tensor, Tensor]], int], float]


class Recorded(nn.Module):
    """A model whose only layer returns columns of its input: recorded features, for packages that hook models."""

    def __init__(self, columns: slice, add_axis: bool) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.columns, self.add_axis = columns, add_axis

    def forward(self, x: Tensor) -> Tensor:
        features = x[:, self.columns]
        return self.layer(features[None] if self.add_axis else features)


def merged(new_metric: Callable[[], LinearCKA | MinibatchCKA]) -> Measure:
    """Ours: a metric on each rank, merged."""

    def measure(ranks: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> float:
        metrics = [new_metric() for _ in ranks]
        for metric, (X, Y) in zip(metrics, ranks, strict=True):
            for x, y in zip(X.split(batch_size), Y.split(batch_size), strict=True):
                metric.update(x, y) if isinstance(metric, LinearCKA) else metric.update([x], [y])
        for metric in metrics[1:]:
            metrics[0].merge_state(metric)
        return metrics[0].compute().item()

    return measure


def averaged(name: str) -> Measure:
    """Another package: its value on each rank, averaged."""
    compare = PEERS[name][1]

    def measure(ranks: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> float:
        values = []
        for X, Y in ranks:
            width = X.shape[1]
            add_axis = name == "ckatorch"  # it takes the second axis for samples, of three
            models = [Recorded(columns, add_axis) for columns in (slice(0, width), slice(width, None))]
            loader = DataLoader(TensorDataset(torch.cat([X, Y], dim=1)), batch_size)
            values.append(compare(*models, loader, ["layer"]).item())
        return sum(values) / len(values)

    return measure


def learned_features(num_samples: int, steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Token means of two blocks before and after `steps` of training, float32: (n, 64) each."""
    torch.manual_seed(0)
    images, labels = (torch.tensor(values[:num_samples]) for values in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 8 - 1
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    features = []
    for network in (before.eval(), model.eval()):
        with FeatureExtractor(network, layers=["blocks.1", "blocks.5"]) as extractor, torch.no_grad():
            network(images)
            features.append({name: value.float() for name, value in extractor.collect().items()})
    return {name: (features[0][name], features[1][name]) for name in features[0]}


def row(name: str, measure: Measure, settings: Sequence[tuple[Sequence[tuple[Tensor, Tensor]], int]]) -> list[Any]:
    """A package's value in each setting (ranks, batch size), and how far apart they are."""
    cells: list[Any] = []
    for ranks, batch_size in settings:
        try:
            cells.append(measure(ranks, batch_size))
        except Exception as error:  # another package's, whatever it is
            cells.append(f"{type(error).__name__}: {error}")
    values = [cell for cell in cells if isinstance(cell, float)]
    return [name, *cells, max(values) - min(values) if len(values) > 1 else None]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1792, help="a multiple of the batch sizes leaves no tiny batch")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rank-batch-size", type=int, default=64, help="batch size where the ranks vary")
    args = parse(parser, {"samples": 256, "steps": 5})

    measures: dict[str, Measure] = {
        "LinearCKA": merged(LinearCKA),
        "LinearCKA, debiased": merged(lambda: LinearCKA(debiased=True)),
        "MinibatchCKA": merged(MinibatchCKA),
    }
    problems = {name: missing(name) for name in PEERS}
    measures |= {name: averaged(name) for name, problem in problems.items() if problem is None}

    results = []
    for layer, (X, Y) in learned_features(args.samples, args.steps).items():
        n = len(X)
        exact = [linear_cka(X, Y, debiased=debiased).item() for debiased in (False, True)]
        caption = f"linear_cka on all samples at once: {exact[0]:.6f}, debiased {exact[1]:.6f}."
        by_batch = [([(X, Y)], size) for size in (*args.batch_sizes, n)]
        by_ranks = [
            (list(zip(X.tensor_split(count), Y.tensor_split(count), strict=True)), args.rank_batch_size)
            for count in args.ranks
        ]
        for title, names, settings in (
            ("value by batch size", [*map(str, args.batch_sizes), f"all {n}"], by_batch),
            (f"value by number of ranks, batches of {args.rank_batch_size}", [*map(str, args.ranks)], by_ranks),
        ):
            rows = [row(name, measure, settings) for name, measure in measures.items()]
            rows += [[name, problem, *[None] * len(names)] for name, problem in problems.items() if problem is not None]
            results.append(Result(f"{layer}: {title}", ["", *names, "max - min"], rows, caption))
    report("values", args, results)


if __name__ == "__main__":
    main()
