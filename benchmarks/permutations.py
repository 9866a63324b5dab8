"""What does calibrating take, next to a loop that computes the measure again? And how good are the moments of the null?

Unrelated normal features, every layer with every layer. The loop is over `similarity`, which computes all pairs at
once, of features whose samples are permuted: already faster than a loop over pairs. Both take turns, and the ratio is
that of the times per permutation within a round. Measures that decompose matrices are timed at a smaller width, in
the table.

The second table asks how often permutations are above what the closed form's moments say is exceeded by 5, 1 and 0.1 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Result, new_parser, parse, ratios, report, spread
from scipy.stats import pearson3
from torch import Tensor

from lit_cka.analysis.calibration import calibrate
from lit_cka.analysis.measures import centred_grams, similarity
from lit_cka.analysis.settings import Settings
from lit_cka.functional.permutation_moments import permutation_moments
from lit_cka.functional.permutations import draw_orders, permuted_products

DECOMPOSING = ("procrustes", "svcca", "pwcca")


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def layers(n: int, width: int, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, dtype=torch.float64, generator=generator) + 3 for _ in range(count)]


def timed(settings: Settings, args: Any, width: int, rounds: int, looped: int) -> list[Any]:
    """A row of the first table."""
    Xs, Ys = layers(args.n, width, args.layers, 0), layers(args.n, width, args.layers, 1)
    values = similarity(Xs, Ys, settings)
    orders = draw_orders(args.n, looped, seed=1)
    ours, loops = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: calibrate(Xs, Ys, values, settings)))
        loops.append(
            seconds(lambda: [similarity(Xs, [Y[order] for Y in Ys], settings) for order in orders])
            * args.permutations
            / looped
        )
    name = "cka, by moments" if settings.null == "moments" else settings.measure
    return [name, width, spread(ours), f"{looped}", spread(loops), ratios(loops, ours)]


def speed(args: Any) -> Result:
    rows = []
    options: list[dict[str, Any]] = [
        {"measure": "cka"}, {"measure": "cka", "null": "moments"}, {"measure": "rbf_cka"},
        {"measure": "sampled_features_cka"}, {"measure": "rsa"}, {"measure": "mutual_knn"}, {"measure": "cknna"},
        {"measure": "svcca"}, {"measure": "pwcca"}, {"measure": "procrustes"},
    ]  # fmt: skip
    for chosen in options:
        settings = Settings(num_permutations=args.permutations, **chosen)
        is_first = chosen == {"measure": "cka"}
        width = args.narrow if settings.measure in DECOMPOSING else args.width
        rounds, looped = (args.rounds, args.looped) if is_first else (min(args.rounds, 2), max(1, args.looped // 10))
        rows.append(timed(settings, args, width, rounds, looped))
        print(rows[-1])
    columns = ["measure", "width", "calibrate, s", "looped", "loop, s", "loop / calibrate"]
    caption = (
        f"Seconds for {args.permutations} permutations, median (min - max; repetitions); the loop ran over so many as "
        "its column says, and is scaled up to all. Target: 20 times as fast for the linear CKA."
    )
    title = f"{args.layers} x {args.layers} layers, {args.n} samples, {args.permutations} permutations"
    return Result(title, columns, rows, caption)


def kinds(n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of unrelated features that make the null of CKA as different as may be."""
    rng = np.random.default_rng(0)
    tailed = rng.standard_t(3, (2, n, 20))
    outlier = rng.standard_normal((2, n, 20))
    outlier[:, 0] *= 10
    narrow, wide = rng.standard_normal((2, n, 3)), rng.standard_normal((2, n, 768))
    made = {"width 3": narrow, "width 768": wide, "tails of t(3)": tailed, "one sample 10 times as far": outlier}
    return {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in made.items()}


def accuracy(args: Any) -> Result:
    """How often permutations exceed the quantiles of the Pearson type III distribution."""
    rows = []
    for n in args.sizes:
        orders = draw_orders(n, args.draws if n <= 100 else args.draws // 5, seed=0)
        for name, (X, Y) in kinds(n).items():
            for debiased in (True, False):
                settings = Settings(debiased=debiased)
                A, B = centred_grams([X], settings), centred_grams([Y], settings)
                found = permutation_moments(A, B)
                size = (A.norm() * B.norm()).item()
                null = pearson3(found.skewness.item(), found.mean.item() / size, found.variance.sqrt().item() / size)
                values = permuted_products(A, B, orders).flatten().numpy()
                shares = [f"{100 * np.mean(values >= null.isf(share)):.3g} %" for share in (0.05, 0.01, 0.001)]
                rows.append([n, name, "debiased" if debiased else "plain", f"{found.skewness.item():.2f}", *shares])
                print(rows[-1])
    columns = ["samples", "features", "estimator", "skewness", "above 5 %", "above 1 %", "above 0.1 %"]
    caption = f"Of {args.draws} permutations, a fifth of them with more than 100 samples."
    return Result("Permutations above the quantiles of the moments", columns, rows, caption)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of each model")
    parser.add_argument("--n", type=int, default=1000, help="samples")
    parser.add_argument("--width", type=int, default=768, help="features of a layer")
    parser.add_argument("--narrow", type=int, default=64, help="the same for measures that decompose matrices")
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--looped", type=int, default=10, help="permutations of the loop, a tenth but for linear CKA")
    parser.add_argument("--rounds", type=int, default=3, help="of linear CKA; at most 2 of the others")
    parser.add_argument("--draws", type=int, default=50_000, help="permutations of the second table")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 50, 200], help="samples of the second table")
    tiny = {"layers": 2, "n": 20, "width": 8, "narrow": 4, "permutations": 19, "looped": 3, "rounds": 1, "draws": 100}
    args = parse(parser, {**tiny, "sizes": [10]})
    report("permutations", args, [speed(args), accuracy(args)])


if __name__ == "__main__":
    main()
