"""Which layer of another network is the counterpart? Kornblith's sanity check, for every measure of `compare`.

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), section 6.1:
networks of one architecture are trained from different seeds, and each layer of one is matched to the most similar
layer of the other. The architecture says which one is right. A measure that tells what a layer is finds it.

Small convolutional networks on the digits of scikit-learn, pairs of which no two share a network. Features are those of
test images, one row a sample: all numbers of a layer ("flat", as in that paper), or the mean over space ("pooled").
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Result, new_parser, parse, report
from torch import Tensor, nn

from lit_cka.analysis.calibration import calibrate
from lit_cka.analysis.measures import similarity
from lit_cka.analysis.settings import Settings
from lit_cka.data import DigitsDataModule

MEASURES: list[dict[str, Any]] = [
    {"measure": "cka"}, {"measure": "cka", "debiased": False}, {"measure": "minibatch_cka"}, {"measure": "rbf_cka"},
    {"measure": "sampled_features_cka"}, {"measure": "rsa"}, {"measure": "procrustes"}, {"measure": "svcca"},
    {"measure": "pwcca"}, {"measure": "mutual_knn"}, {"measure": "cknna"},
]  # fmt: skip

# Channels, kernel and stride of the convolutions.
TINY_10 = [(16, 3, 1), (16, 3, 1), (32, 3, 2), (32, 3, 1), (32, 3, 1), (64, 3, 2), (64, 3, 1), (64, 1, 1)]


class Network(nn.Module):
    """The "Tiny-10" of that paper, all of it padded: convolutions with BatchNorm and ReLU, then the mean over space."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        blocks, before = [], 1
        for width, kernel, stride in TINY_10[:num_layers]:
            convolution = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2, bias=False)
            blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(before, 10)

    def layers(self, images: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            images = block(images)
            outputs.append(images)
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images)[-1].mean(dim=(2, 3)))
        return logits


class Trained(NamedTuple):
    """The layers of a network on the test images, and how many of these it gets right."""

    flat: list[Tensor]
    pooled: list[Tensor]
    accuracy: float


def train(seed: int, args: Any, data: dict[str, tuple[Tensor, Tensor]]) -> Trained:
    torch.manual_seed(seed)
    network = Network(args.layers)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, weight_decay=1e-4)
    images, labels = data["train"]
    for _ in range(args.epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        images, labels = data["test"]
        outputs = [layer.double() for layer in network.layers(images)]
        accuracy = (network(images).argmax(dim=1) == labels).double().mean().item()
    return Trained([layer.flatten(1) for layer in outputs], [layer.mean(dim=(2, 3)) for layer in outputs], accuracy)


def found(scores: np.ndarray, *, off: int = 0) -> float:
    """The share of layers, of both networks, whose most similar layer is their counterpart, or so many beside it."""
    scores = np.nan_to_num(scores, nan=-np.inf)
    places = np.arange(len(scores))
    return float(np.mean([np.abs(scores.argmax(axis=axis) - places) <= off for axis in (0, 1)]))


def with_error(shares: list[float]) -> str:
    return f"{100 * np.mean(shares):.1f} ± {100 * np.std(shares, ddof=1) / np.sqrt(len(shares)):.1f} %"


def row(options: dict[str, Any], pairs: list[tuple[Trained, Trained]], args: Any) -> dict[str, Any]:
    settings = Settings(**options, num_permutations=args.permutations)
    start, shares = time.perf_counter(), defaultdict(list)
    sign = -1 if options["measure"] == "procrustes" else 1
    for one, other in pairs:
        for kind in ("flat", "pooled"):
            values = similarity(getattr(one, kind), getattr(other, kind), settings)
            shares[kind].append(found(sign * values.numpy()))
            shares[f"{kind}, or one off"].append(found(sign * values.numpy(), off=1))
            if kind == "pooled":
                scores = calibrate(one.pooled, other.pooled, values, settings)
                shares["pooled, by the excess over chance"].append(found(scores.excess))
    name = f"{options['measure']}, plain" if options.get("debiased") is False else options["measure"]
    result = {"measure": name, **{kind: with_error(held) for kind, held in shares.items()}}
    print(result, f"{time.perf_counter() - start:.0f} s")
    return result


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="of networks")
    parser.add_argument("--layers", type=int, default=8, help="convolutions of a network, at most 8")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=360, help="test images")
    parser.add_argument("--permutations", type=int, default=39)
    args = parse(parser, {"pairs": 2, "layers": 3, "epochs": 1, "samples": 40, "permutations": 19})
    module = DigitsDataModule()
    module.setup("fit")
    parts = {part: module.loader(part).dataset[:] for part in ("train", "test")}  # type: ignore[index]
    parts["test"] = tuple(each[torch.randperm(len(each), generator=torch.Generator().manual_seed(0))[: args.samples]]
                          for each in parts["test"])  # fmt: skip
    trained = [train(seed, args, parts) for seed in range(2 * args.pairs)]
    accuracies = [network.accuracy for network in trained]
    print(f"Networks answer {min(accuracies):.3f} to {max(accuracies):.3f} of the test images right.")
    pairs = list(zip(trained[::2], trained[1::2], strict=True))
    rows = [row(options, pairs, args) for options in MEASURES]
    caption = (
        "Layers of both networks whose most similar layer is their counterpart, mean over pairs ± standard error; by "
        f"chance {100 / args.layers:.3g} %. The networks answer {100 * min(accuracies):.1f} to "
        f"{100 * max(accuracies):.1f} % of the test images right. {args.permutations} permutations."
    )
    title = f"{args.pairs} pairs of networks of {args.layers} convolutions, {args.samples} images"
    columns, cells = list(rows[0]), [list(each.values()) for each in rows]
    report("same_layer", args, [Result(title, columns, cells, caption)])


if __name__ == "__main__":
    main()
