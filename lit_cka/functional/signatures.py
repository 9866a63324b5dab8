"""Signatures: one unit vector per set of features, whose inner products are linear CKA, and a map of them.

Every layer of every model on the same samples becomes one point: the inner products of the signatures are a kernel, and
kernel PCA (Schoelkopf et al. 1998) draws all of them in one space. Shapes: `m` sets of features, `n` samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred, double_centred, is_rounding
from lit_cka.functional.cka import min_num_samples
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.moments import check_features
from lit_cka.functional.units import in_usual_unit


@takes_arrays
def signature(X: Tensor, *, debiased: bool = False) -> Tensor:
    """Returns the unit-norm centred linear Gram matrix of features (n, d), flattened: float64 (n (n + 1) / 2,).

    The upper triangle, with what is off the diagonal multiplied by sqrt(2), has the inner products of the whole
    matrices in half the memory: `signature(X) @ signature(Y)` is `linear_cka(X, Y)`, the plain estimator, or the
    debiased one with the U-centred matrix (Szekely & Rizzo 2014), whose diagonal is 0:

        U_ij = K_ij - sum_l K_il / (n - 2) - sum_k K_kj / (n - 2) + sum_kl K_kl / ((n - 1) (n - 2))      K_ii = 0

    NaN for constant and non-finite features. Raises as `signature_gram`.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import linear_cka
        >>> torch.allclose(signature(X) @ signature(Y), linear_cka(X, Y))
        True
    """
    check_features(X, X, min_num_samples=min_num_samples(debiased))
    Xc = centred(in_usual_unit(X))
    gram = Xc @ Xc.T
    n = len(gram)
    if debiased:
        gram.fill_diagonal_(0)
        sums = gram.sum(dim=0)
        gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        gram.fill_diagonal_(0)
    rows, columns = torch.triu_indices(n, n, device=Xc.device)
    flat = gram[rows, columns] * (1 + (rows != columns).to(gram)).sqrt()
    unit: Tensor = flat / flat.norm()
    return unit


@takes_arrays
def signature_gram(features: Sequence[Tensor], *, debiased: bool = False) -> Tensor:
    """Returns the inner products of the signatures of `m` sets of features (n, d_i): float64 (m, m), their linear CKA.

    It is `cka_matrix` of the features with themselves: of the signatures' products and the features', the cheaper.

    Raises:
        ValueError: on no features, integer features, wrong shapes, unequal `n`, or fewer than 2 samples (4 if
            debiased).

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import linear_cka
        >>> torch.allclose(signature_gram([X, Y])[0, 1], linear_cka(X, Y))
        True
    """
    return cka_matrix(features, features, debiased=debiased)


@takes_arrays
def kernel_pca(K: Tensor, num_components: int = 3, *, centre: bool = True) -> tuple[Tensor, Tensor]:
    """Returns coordinates of `m` points from their inner products, along the directions in which they spread most.

        H K H = V diag(l) V'        coordinates = V_c sqrt(l_c)        explained = l_c / sum l        H = I - 11'/m

    Args:
        K: symmetric kernel matrix (m, m); points with a NaN on the diagonal are left out, and are NaN in the result.
        num_components: c, the number of columns; those beyond what the points span are 0.
        centre: measure the points from their mean. Without it H = I: the first component then is about where the mean
            lies, and the others what points are told apart by.

    Returns:
        coordinates: float64 (m, c). The entry of largest size in each column is positive, so that runs compare.
        explained: float64 (c,), each component's share of the total variance (about the origin without `centre`); NaN
            where the points do not differ (are all 0).

    Raises:
        ValueError: unless `K` is square and `num_components` at least 1.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # on a line
        >>> coordinates, explained = kernel_pca(points @ points.T, num_components=1)
        >>> [abs(round(value, 6)) for value in coordinates[:, 0].tolist()], round(explained[0].item(), 6)
        ([2.0, 0.0, 2.0], 1.0)
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"Expected `K` to be a square matrix, but got {tuple(K.shape)}.")
    if num_components < 1:
        raise ValueError(f"Expected `num_components` to be at least 1, but got {num_components}.")
    K = K.detach().to(torch.float64)
    defined = ~K.diagonal().isnan()
    coordinates = K.new_full((len(K), num_components), torch.nan)
    explained = K.new_zeros(num_components)
    if not defined.any():
        return coordinates, explained.fill_(torch.nan)
    kept = K[defined][:, defined]
    HKH = double_centred(kept) if centre else kept
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh((HKH + HKH.T) / 2))
    # What rounding leaves of directions that the points do not span would become noise of size 1e-8.
    values = values.masked_fill(is_rounding(values, len(kept) * kept.abs().max()), 0.0)
    count = min(num_components, len(kept))
    scores = vectors[:, :count] * values[:count].sqrt()
    sizes = scores.abs()
    largest = (sizes >= (1 - 1e-9) * sizes.amax(0)).to(torch.int8).argmax(0)  # the first among equals
    scores = scores * scores.gather(0, largest[None]).sign()
    coordinates[defined] = torch.nn.functional.pad(scores, (0, num_components - count))
    explained[:count] = values[:count]
    return coordinates, explained / values.sum()


@takes_arrays
def component_label_correlation(coordinates: Tensor, labels: Sequence[Hashable]) -> Tensor:
    """Returns how much of each component of `coordinates` (m, c) a categorical label explains: float64 (c,), in [0, 1].

        eta = sqrt(sum_g m_g (mean_g - mean)^2 / sum_i (x_i - mean)^2)

    the correlation ratio (Fisher 1925). For two labels it is the absolute Pearson correlation with a 0 / 1 label
    (point-biserial). Points with a NaN coordinate are left out; NaN for a component that is the same for all points.

    Raises:
        ValueError: unless there is one label a point and at least two different labels.
    """
    if coordinates.ndim != 2 or len(coordinates) != len(labels):
        raise ValueError(
            "Expected `coordinates` to be of shape (points, components) with one label a point, "
            f"but got {tuple(coordinates.shape)} and {len(labels)} labels."
        )
    defined = ~coordinates.isnan().any(dim=1)
    names = [label for label, keep in zip(labels, defined.tolist(), strict=True) if keep]
    codes = {label: code for code, label in enumerate(dict.fromkeys(names))}
    if len(codes) < 2:
        raise ValueError(f"Expected at least two different labels, but got {list(codes)}.")
    x = coordinates[defined].detach().to(torch.float64)
    largest = x.abs().amax(0)
    x = x - x.mean(0)
    groups = torch.nn.functional.one_hot(torch.tensor([codes[label] for label in names], device=x.device)).to(x)
    between = ((groups.T @ x).square() / groups.sum(0)[:, None]).sum(0)
    constant = is_rounding(x.abs().amax(0), largest)
    return (between / x.square().sum(0)).clamp(0, 1).sqrt().masked_fill(constant, torch.nan)
