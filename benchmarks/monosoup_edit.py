"""How long does an edit take, next to a full SVD of every parameter?

A fine-tuned open_clip CLIP in the form of model-soups: the visual tower, the token embedding that its files still hold,
and a head. Random weights, and for each matrix an update of low rank plus noise. The loop does what published scripts
do: `torch.linalg.svd` of each update in float32, then three variants from U, S and V.
"""

from __future__ import annotations

import time

import torch
from common import Result, new_parser, parse, ratios, report, spread
from torch import Tensor

from lit_cka.editing.settings import EditSettings
from lit_cka.editing.weights import edit_state_dicts
from lit_cka.functional.rank_rules import split_rank
from lit_cka.functional.spectral import coefficients

EDITED = ("monosoup", "highonly", "lowonly")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(model_name: str) -> dict[str, Tensor]:
    """Shapes of a model-soups checkpoint, with random values."""
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.create_model(model_name)
    held = {name: value for name, value in clip.state_dict().items() if not name.startswith("transformer.")}
    held = {f"model.{name}": value for name, value in held.items() if value.is_floating_point()}
    width = open_clip.get_model_config(model_name)["embed_dim"]
    held["classification_head.weight"], held["classification_head.bias"] = torch.randn(1000, width), torch.zeros(1000)
    return held


def update(W0: Tensor) -> Tensor:
    """A fine-tuned weight: an update of rank 8 and noise."""
    if W0.ndim < 2:
        return W0 + 1e-3 * torch.randn_like(W0)
    flat = W0.flatten(1)
    low_rank = torch.randn(len(flat), 8) @ torch.randn(8, flat.shape[1]) / 8**0.5
    return (flat + 1e-3 * low_rank + 3e-4 * torch.randn_like(flat)).view(W0.shape)


def svd_loop(W0: dict[str, Tensor], W1: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The three variants by a full SVD of each parameter."""
    variants: dict[str, dict[str, Tensor]] = {name: {} for name in EDITED}
    for name, end in W1.items():
        start = W0[name]
        dtype, start = end.dtype, start.float()
        update = end.float() - start
        if end.ndim < 2 or update.norm() / start.norm().clamp_min(1e-12) < 1e-6:
            for made in variants.values():
                made[name] = end.clone()
            continue
        delta = update.flatten(1)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        k = split_rank(S)
        _, _, high, low = coefficients(S, k)
        delta_high = (U[:, :k] * S[:k]) @ Vh[:k]
        delta_low = (U[:, k:] * S[k:]) @ Vh[k:]
        for variant, (a, b) in zip(EDITED, ((high, low), (1, 0), (0, 1)), strict=True):
            edited = start + (a * delta_high + b * delta_low).view(end.shape)
            variants[variant][name] = edited.to(dtype)
    return variants


def difference(first: Tensor, second: Tensor) -> float:
    return ((first.float() - second.float()).norm() / first.float().norm()).item()


def measure(model_name: str, device: str, repetitions: int, dtype: torch.dtype = torch.float32) -> Result:
    """Edit by a loop and by `edit_state_dicts`, in turns."""
    values = weights(model_name)
    W0 = {name: value.to(device, dtype) for name, value in values.items()}
    W1 = {name: update(value).to(device, dtype) for name, value in values.items()}
    times: dict[str, list[float]] = {"full SVD of each parameter": [], "edit_state_dicts": []}
    worst = 0.0
    for _ in range(repetitions):
        made = []
        for name in times:
            start = time.perf_counter()
            made.append(
                svd_loop(W0, W1) if name.startswith("full") else edit_state_dicts(W0, W1, EditSettings()).variants
            )
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        for variant in EDITED:
            worst = max(
                worst,
                *(difference(made[0][variant][name], made[1][variant][name]) for name in W1 if W1[name].ndim > 1),
            )
    loop = times["full SVD of each parameter"]
    rows = [[name, spread(values), ratios(loop, values)] for name, values in times.items()]
    num_parameters = sum(value.numel() for value in W1.values()) / 1e6
    return Result(
        f"MonoSoup of {model_name} with a head, {num_parameters:.0f} M parameters in {str(dtype)[6:]}, {device}",
        ["three variants by", "seconds", "times as fast as the loop"],
        rows,
        f"Median (min - max; repetitions). Largest relative difference of a weight between the two: {worst:.1e}.",
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repetitions", type=int, default=5)
    args = parse(parser, {"model": "RN50", "repetitions": 1})
    tables = [measure(args.model, args.device, args.repetitions, DTYPES[name]) for name in args.dtypes]
    report("monosoup_edit", args, tables)


if __name__ == "__main__":
    main()
