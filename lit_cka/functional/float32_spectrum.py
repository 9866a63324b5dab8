"""Eigenvectors of an update's Gram matrix in float32, where they are as good as those in float64: `float32_spectrum`.

LAPACK's error is about `eps` times the largest eigenvalue, whatever the others are, and a fine-tuned weight has a few
directions with hundreds of times the energy of the rest. So these are found first, in float64, by subspace iteration
(Halko et al. 2011), and their eigenvalues are lowered to the next one. That changes neither the eigenvectors nor the
order, and leaves float32 all its digits for the rest. What could still be wrong is estimated, and where it matters
there is no result: float64 is to be asked then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.lapack import SymmetricEigen

EPS = torch.finfo(torch.float32).eps
SMALLEST = 128  # rows: below, float64 takes no longer
_BLOCK = 24  # directions that are looked for
_STEPS = 3
_ALIKE = 2.0  # eigenvalues within this factor don't stand out from each other
_WINDOW = 64  # directions on either side of a cut that are told apart in float64
_NO_NEED = (
    0.2  # of the tolerance: then neighbours that are nearly one cannot matter, which differ by more than expected
)
_CONVERGED = 3e-8  # of a direction's residual, relative to the first eigenvalue that stays as it is


class Spectrum(NamedTuple):
    """Singular values of an update, and the eigenvectors of its Gram matrix."""

    singular_values: Tensor  # (m,), descending, float64
    eigen: SymmetricEigen  # of `gram`
    leading: Tensor  # (m, l), float64, descending: eigenvectors whose eigenvalues were lowered
    gram: Tensor  # (m, m), float64, with the eigenvectors of the update's, and the large eigenvalues lowered
    errors: Tensor  # (m,), how far each singular value may be off
    mixing: tuple[float, float]  # entries of an error of the Gram matrix: LAPACK's, and that of its sums

    @property
    def energy_errors(self) -> Tensor:
        """(m,), how far each squared singular value may be off."""
        return (2 * self.singular_values + self.errors) * self.errors

    def vectors(self, first: int, last: int) -> Tensor:
        """Returns eigenvectors (m, last - first) in float32: from `first` to before `last`, in ascending order."""
        num_others = len(self.singular_values) - self.leading.shape[1]
        leading = self.leading.flip(1)[:, max(first - num_others, 0) : max(last - num_others, 0)]
        others = self.eigen.vectors(min(first, num_others), min(last, num_others))
        return torch.cat([others.T, leading.T.to(torch.float32)]).T


def float32_spectrum(gram: Tensor) -> Spectrum | None:
    """Returns the spectrum of a Gram matrix; None where its large eigenvalues could not be told from the rest.

    Args:
        gram: (m, m), float64, of which the lower triangle counts; it is overwritten.
    """
    symmetric = gram.tril_()
    symmetric.diagonal().div_(2)
    symmetric += symmetric.T.contiguous()
    values, vectors, level = _leading(symmetric)
    number = len(values)
    ceiling = 2 * level  # above all that stays as it is, of which `level` is an estimate from below
    if number:
        symmetric.addmm_(vectors * (ceiling - values), vectors.T)
    scale = level.clamp_min(torch.finfo(torch.float64).tiny)
    rounded = torch.empty_like(symmetric, dtype=torch.float32)
    torch.div(symmetric, scale, out=rounded)
    eigen = SymmetricEigen(rounded)
    rest = eigen.values.flip(0)[number:].to(torch.float64).clamp_min(0) * scale
    if number and not float(rest[0]) < 1.5 * float(level):
        return None
    squares = torch.cat([values, rest])
    largest, next_one = float(squares[0]), float(rest[0])
    # Of LAPACK, and of the sums in the Gram matrix. All factors are by trials, on spectra of many kinds, with a margin.
    noise, mixing = EPS * (3 * next_one + 0.05 * largest), (EPS * 0.4 * next_one, EPS * 0.004 * largest)
    s = squares.sqrt()
    errors = errors_by(noise, s)
    # Those of most values cancel out, but for a fifth at most; those of values below the noise don't.
    errors = torch.where(squares > 10 * noise, errors / 5, errors)
    errors = torch.maximum(errors, s * (1.5 * EPS))  # of the sums, in the large ones
    return Spectrum(s, eigen, vectors, symmetric, errors, mixing)


def errors_by(noise: float, singular_values: Tensor) -> Tensor:
    """Returns how far off singular values may be if their squares are off by `noise`."""
    return torch.minimum(noise / (2 * singular_values.clamp_min(1e-300)), singular_values.new_tensor(noise).sqrt())


def _leading(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues and eigenvectors that stand out, descending, and the eigenvalue that follows them."""
    size = len(gram)
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(size, _BLOCK, generator=generator, dtype=torch.float64, device="cpu")
    image = gram @ torch.linalg.qr(start.to(gram.device)).Q
    for step in range(1, _STEPS + 1):
        basis = torch.linalg.qr(gram @ image).Q
        image = gram @ basis
        if step == 1:
            continue
        values, turn = torch.linalg.eigh(basis.T @ image)
        values, turn = values.flip(0), turn.flip(1)
        basis, image = basis @ turn, image @ turn
        residuals = torch.linalg.vector_norm(image - basis * values, dim=0)
        # The eigenvalue that follows is known about as well as it has to be.
        is_found = (residuals[:-1] <= _CONVERGED * values[1:].clamp_min(0)).to(torch.int64).cumprod(0)
        number = int(is_found.sum())
        if values[number] <= _ALIKE * values[-1]:
            break  # none of the others stands out
    return values[:number], basis[:, :number], values[number].clamp_min(0)


def first_directions(spectrum: Spectrum, k: int, tolerance: float) -> tuple[Tensor, bool] | None:
    """Returns a basis of the first `k` directions, or of all the others if these are fewer, and whether it is that.

    Those around the `k`-th are told apart in float64, by their Rayleigh quotients, where that matters.

    Args:
        spectrum: of an update.
        k: where it is cut.
        tolerance: how far the part of the update in its first `k` directions may be off, relative to all of it.

    Returns:
        (m, j) in float32, and whether it spans the others; None if it may be off by more. A perturbation of the Gram
        matrix turns a direction towards another by its entry for the two over the difference of their eigenvalues
        (Davis & Kahan 1970), which is for directions farther apart.
    """
    squares, num_lowered = spectrum.singular_values.square(), spectrum.leading.shape[1]
    size = len(squares)
    complement = 2 * k > size
    ends = (0, size - k) if complement else (size - k, size)
    if k == size:
        return spectrum.vectors(*ends), complement
    first, last = max(k - _WINDOW, num_lowered), min(k + _WINDOW, size)
    of_lapack, of_sums = spectrum.mixing
    energies = squares[:k, None] + squares[None, k:]
    weights = energies / (squares[:k, None] - squares[None, k:]).clamp_min_(1e-150).square_()
    allowed = tolerance**2 * squares.sum()

    def error(entries: Tensor | float) -> Tensor:
        return torch.minimum(weights * entries**2, energies).sum()

    if k <= num_lowered or error(of_lapack + of_sums) <= _NO_NEED**2 * allowed:
        return (spectrum.vectors(*ends), complement) if error(of_sums) <= allowed else None
    entries = torch.full_like(energies, of_lapack + of_sums)
    entries[first:, : last - k] = of_sums
    if not error(entries) <= allowed:
        return None
    basis = _orthonormal(spectrum.vectors(size - last, size - first).to(torch.float64))
    turn = torch.linalg.eigh(basis.T @ (spectrum.gram @ basis)).eigenvectors
    told_apart = (basis @ (turn[:, : last - k] if complement else turn[:, last - k :])).T.to(torch.float32)
    if complement:
        return torch.cat([spectrum.vectors(0, size - last).T, told_apart]).T, complement
    return torch.cat([told_apart, spectrum.vectors(size - first, size).T]).T, complement


def _orthonormal(nearly: Tensor) -> Tensor:
    """Returns columns that are orthonormal in float64, for some that are in float32: by Cholesky's decomposition."""
    orthonormal: Tensor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(nearly.T @ nearly).T, nearly, upper=True, left=False
    )
    return orthonormal
