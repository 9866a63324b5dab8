"""Gram matrices in resamples of their samples: what the bootstrap of CKA sums over.

Szekely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities" (arXiv 1310.2926): U-centring.
Song et al. 2012, "Feature Selection via Dependence Maximization" (JMLR 13), section 2: HSIC as a U-statistic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.centring import double_centred
from lit_cka.functional.cka import is_hsic_rounding


class UCentredGram(NamedTuple):
    """A U-centred Gram matrix, and what the plain estimator has besides: `Kc_ij = A_ij - alpha_i - alpha_j`."""

    A: Tensor  # (n, n)
    alpha: Tensor  # (n,)
    diagonal: Tensor  # (n,) of Kc
    debiased: bool

    def diagonal_terms(self, other: UCentredGram) -> Tensor | None:
        """Returns what each sample adds (n,) to `sum Kc Lc` over `sum A B`, since the rows of A sum to 0; None for the
        debiased estimator, which is `sum A B`.
        """
        if self.debiased:
            return None
        n, alpha, beta = len(self.alpha), self.alpha, other.alpha
        return self.diagonal * other.diagonal + 2 * (n - 2) * alpha * beta + alpha * beta.sum() + beta * alpha.sum()


class Resamples:
    """How often each sample is in each resample, `W` (n, c), and what of it all Gram matrices share."""

    def __init__(self, W: Tensor) -> None:
        self.W, n, square = W, len(W), W * W
        self.p2, p3, p4 = square.sum(0), (square * W).sum(0), (square * square).sum(0)
        # The numbers of pairs, triples and quadruples of different samples.
        self.pairs = n**2 - self.p2
        self.triples = n**3 - 3 * n * self.p2 + 2 * p3
        self.quadruples = n**4 - 6 * n**2 * self.p2 + 3 * self.p2**2 + 8 * n * p3 - 6 * p4


class ResampledGram:
    """One U-centred Gram matrix in resamples of its samples."""

    def __init__(self, gram: UCentredGram, resamples: Resamples) -> None:
        self.gram, self.resamples = gram, resamples
        self.sums = gram.A @ resamples.W
        self.drawn_sums = resamples.W * self.sums
        self.total = self.drawn_sums.sum(0)
        self.square, part = self.inner(self)
        self.share = part / self.square

    def inner(self, other: ResampledGram) -> tuple[Tensor, Tensor]:
        """Returns the inner product (c,) with another matrix over a resample, and each sample's part in it (n, c).

        n (n - 3) times the mean of `A_ij B_ij - 2 A_ij B_iq + A_ij B_qr` over the different samples i, j, q, r of the
        resample: the U-statistic of Song et al. 2012. It takes one matrix product; the sums over tuples that hold a
        sample twice are taken off, but for the smallest, `sum w_i^2 w_j^2 A_ij B_ij`, for which its mean stands in.
        What a sample changes through the second and third term is left out of its part: it is of order 1 / n.
        """
        drawings, W, n = self.resamples, self.resamples.W, len(self.sums)
        part: Tensor = (self.gram.A * other.gram.A) @ W
        drawn, shared = W * part, self.drawn_sums * other.sums
        first = drawn.sum(0)
        second = shared.sum(0) - (W * drawn).sum(0)
        twice = first * (drawings.p2 / n).square()
        third = self.total * other.total - 4 * ((W * shared).sum(0) - twice) - 2 * twice
        mean = first / drawings.pairs - 2 * second / drawings.triples + third / drawings.quadruples
        total, part = n * (n - 3) * mean, part * ((n - 3) / (n - 1))
        terms = self.gram.diagonal_terms(other.gram)
        return (total, part) if terms is None else (total + terms @ W, part + terms[:, None] / 2)


def u_centred(gram: Tensor, debiased: bool) -> UCentredGram:
    """Returns the U-centring of one Gram matrix (n, n); zeros where nothing but rounding is left."""
    centred = double_centred(gram)
    n, diagonal = len(centred), centred.diagonal()
    alpha = (diagonal - diagonal.sum() / (2 * (n - 1))) / (n - 2)
    A = centred + alpha[:, None] + alpha
    A = A - torch.diag(A.diagonal())
    rounding = is_hsic_rounding(A.square().sum(), centred.square().sum() + diagonal.square().sum(), n)
    return UCentredGram(A.masked_fill(rounding, 0.0), alpha, diagonal, debiased)


def draw_counts(n: int, num_resamples: int, seed: int) -> Tensor:
    """Returns how often each of `n` samples is in each resample: (n, num_resamples)."""
    drawn = torch.randint(n, (n, num_resamples), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(n, num_resamples).scatter_add_(0, drawn, torch.ones(n, num_resamples))
