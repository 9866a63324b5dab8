"""What MonoSoup is to be compared with: other ways from checkpoints to one model, state dicts in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lit_cka.checkpoints.quantised import quantised_tensors

Baseline: TypeAlias = Callable[[], dict[str, Tensor]]


def baselines(
    W0: Mapping[str, Tensor], W1: Mapping[str, Tensor], layer_names: Sequence[str], *,
    lines_scales: tuple[float, float] | None, soup: Sequence[Mapping[str, Tensor]], alphas: Sequence[float],
) -> dict[str, Baseline]:  # fmt: skip
    """Returns the baselines asked for, by name: functions that make their weights.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name.
        layer_names: the blocks, for LiNeS.
        lines_scales: `(alpha, beta)` for "lines"; None for none.
        soup: what "uniform_soup" takes the mean of with `W1`; empty for none.
        alphas: one "wise_ft_<alpha>" for each.
    """
    makers: dict[str, Baseline] = {}
    if lines_scales is not None:
        alpha, beta = lines_scales
        makers["lines"] = partial(lines, W0, W1, layer_names, alpha=alpha, beta=beta)
    if soup:
        makers["uniform_soup"] = partial(uniform_soup, [W1, *soup])
    for alpha in alphas:
        makers[f"wise_ft_{alpha:g}"] = partial(interpolate, W0, W1, alpha)
    return makers


def interpolate(W0: Mapping[str, Tensor], W1: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Returns WiSE-FT's weights, `(1 - alpha) W0 + alpha W1` (Wortsman et al. 2022, arXiv 2109.01903).

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name.
        alpha: 0 is pretrained, 1 fine-tuned; any number.

    Returns:
        Weights with the names and dtypes of `W1`; what `W0` lacks, has in another shape, or holds as whole numbers, and
        quantised weights with their scales, are fine-tuned.
    """
    return _scaled(W0, W1, lambda name: alpha)


def uniform_soup(checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean of the weights of several fine-tuned models (Wortsman et al. 2022, arXiv 2203.05482).

    Whole numbers, and quantised weights with their scales, are those of the first.

    Args:
        checkpoints: weights by name, of the same names and shapes.

    Raises:
        ValueError: if there is none, or they differ in names or shapes; the message names them.
    """
    if not checkpoints:
        raise ValueError("Expected `checkpoints` to hold at least one state dict, but it is empty.")
    first = checkpoints[0]
    for number, other in enumerate(checkpoints[1:], start=1):
        differing = {name for name in {*first, *other} if _shape(first, name) != _shape(other, name)}
        if differing:
            shown = ", ".join(sorted(differing)[:5])
            raise ValueError(f"Expected checkpoints of one architecture, but number {number} differs in {shown}.")
    soup = {}
    quantised = quantised_tensors(first)
    for name, value in first.items():
        if value.is_floating_point() and name not in quantised:
            total = torch.stack([checkpoint[name].to(torch.float64) for checkpoint in checkpoints]).mean(dim=0)
            soup[name] = total.to(value.dtype)
        else:
            soup[name] = value
    return soup


def lines(
    W0: Mapping[str, Tensor], W1: Mapping[str, Tensor], layer_names: Sequence[str], *, alpha: float, beta: float
) -> dict[str, Tensor]:
    """Returns LiNeS' weights, `W0 + (alpha + beta l / (L - 1)) (W1 - W0)` in block `l` of `L` (arXiv 2410.17146).

    Shallow blocks, which hold general features, keep less of the update than deep ones. Parameters outside the blocks
    are scaled by `alpha`, as in the authors' code.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name.
        layer_names: the blocks, in order ("model.blocks.0", ...).
        alpha: scale in the first block.
        beta: what it grows by up to the last block.

    Raises:
        ValueError: if there are no blocks, or one holds no parameter.
    """
    if not layer_names:
        raise ValueError("Expected `layer_names` to name the model's blocks, but it is empty.")
    last = max(len(layer_names) - 1, 1)
    scales = {f"{name}.": alpha + beta * depth / last for depth, name in enumerate(layer_names)}
    unused = [start[:-1] for start in scales if not any(name.startswith(start) for name in W1)]
    if unused:
        raise ValueError(f"Expected `layer_names` to be blocks of the model, but no parameter is in {unused[0]!r}.")
    return _scaled(W0, W1, lambda name: next((scales[start] for start in scales if name.startswith(start)), alpha))


def _scaled(W0: Mapping[str, Tensor], W1: Mapping[str, Tensor], scale: Callable[[str], float]) -> dict[str, Tensor]:
    scaled = {}
    quantised = quantised_tensors(W0) | quantised_tensors(W1)
    for name, value in W1.items():
        start = None if name in quantised else W0.get(name)
        if start is None or start.shape != value.shape or not (value.is_floating_point() and start.is_floating_point()):
            scaled[name] = value
        else:
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            start = start.to(dtype)
            scaled[name] = torch.add(start, value.to(dtype) - start, alpha=scale(name)).to(value.dtype)
    return scaled


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
