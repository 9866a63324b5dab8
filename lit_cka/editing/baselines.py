"""The best known other ways from checkpoints to one model, state dicts in and out; all edits are in `edits.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_cka.checkpoints.quantised import quantised_tensors
from lit_cka.editing.depths import depths_of
from lit_cka.editing.edits import Edit, edit_weights
from lit_cka.functional import edits as functions


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
    return edit_weights(W0, W1, Edit("wise_ft", {"alpha": alpha}))


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
            soup[name] = functions.uniform_soup(value, value, others=[other[name] for other in checkpoints[1:]])
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
    edit = Edit("lines", {"alpha": alpha, "beta": beta})
    return edit_weights(W0, W1, edit, depths=depths_of(list(W1), layer_names))


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
