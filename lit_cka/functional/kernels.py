"""Gram matrices of features: the linear and the RBF kernel, batched over leading dimensions, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import about_mean, is_constant


@takes_arrays
def linear_gram(X: Tensor) -> Tensor:
    """Returns the Gram matrix (..., n, n) of the centred features `X` (..., n, d): all zeros where they are constant
    but for rounding. HSIC and CKA ignore the centring.

    Example:
        >>> import torch
        >>> linear_gram(torch.tensor([[1.0, 0.0], [1.0, 2.0]])).tolist()  # about the mean
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    Xc = about_mean(X)
    mean = X[..., :1, :].detach().to(torch.float64) - Xc[..., :1, :]
    constant = is_constant(Xc.square().sum(dim=-2, keepdim=True), X.shape[-2], mean)
    Xc.mul_(~constant[..., None])
    return Xc @ Xc.mT


@takes_arrays
def rbf_gram(X: Tensor, *, bandwidth: float = 1.0) -> Tensor:
    """Returns the RBF Gram matrix `exp(-||x_i - x_j||^2 / (2 s^2))`, (..., n, n), of features `X` (..., n, d).

    `s` is `bandwidth` times the median distance between two different samples (Kornblith et al. 2019, section 3).
    Identical samples throughout have a median of 0; their Gram matrix is all ones.

    Example:
        >>> import torch
        >>> gram = rbf_gram(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> gram.diagonal().tolist(), bool(gram[0, 1] > gram[0, 2])  # the nearer, the more alike
        ([1.0, 1.0, 1.0], True)
    """
    if bandwidth <= 0:
        raise ValueError(f"Expected `bandwidth` to be positive, but got {bandwidth}.")
    gram = linear_gram(X)
    squared = gram.diagonal(dim1=-2, dim2=-1)
    distances = (squared.unsqueeze(-1) + squared.unsqueeze(-2) - 2 * gram).clamp(min=0)
    n = X.shape[-2]
    if n < 2:
        return torch.ones_like(gram)
    rows, columns = torch.triu_indices(n, n, offset=1, device=X.device)
    ordered = distances[..., rows, columns].sqrt().sort(dim=-1).values
    count = ordered.shape[-1]  # `torch.median` is the lower of the middle two
    median = ((ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2)[..., None, None]
    scale = (2 * (bandwidth * median).square()).masked_fill(median == 0, 1.0)
    return (-distances / scale).exp()
