"""What LAPACK and BLAS can do for symmetric float32 matrices that torch has no function for.

Eigenvectors, those that are asked for alone (`SymmetricEigen`): `torch.linalg.eigh` has all or none, and a fifth of its
time turns the eigenvectors of the tridiagonal matrix, to which LAPACK reduces the given one, back into those of the
latter. And products with a transpose (`lower_gram`), in half of the work of a product of any two matrices.

The routines are those that SciPy is built with, by the pointers that it gives out (`scipy.linalg.cython_lapack`, as
Numba takes them), and not its functions for Python: most of these hold Python's lock all the while.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64  # columns that LAPACK works on at a time, at most


class SymmetricEigen:
    """Eigenvalues and eigenvectors of one symmetric matrix.

    Args:
        A: (m, m) in float32, symmetric and finite. On a CPU it is contiguous, overwritten, and kept.

    Attributes:
        values: (m,), ascending.

    Raises:
        ValueError: if LAPACK finds no eigenvalues.

    Example:
        >>> eigen = SymmetricEigen(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> [round(value, 5) for value in eigen.values.tolist()]
        [1.0, 3.0]
        >>> [round(value, 5) for value in eigen.vectors(1, 2).abs().flatten().tolist()]
        [0.70711, 0.70711]
    """

    def __init__(self, A: Tensor) -> None:
        self._on_cpu, size = A.device.type == "cpu", len(A)
        self._vectors: Tensor  # on a CPU those of the tridiagonal matrix, one in a row
        if not self._on_cpu:
            self.values, self._vectors = torch.linalg.eigh(A)
            return
        self.values, off_diagonal, self._scales = _empty(size), _empty(size), _empty(size)
        work = _empty(size * _BLOCK)
        _call("lapack", "ssytrd", "U", size, A, size, self.values, off_diagonal, self._scales, work, len(work))
        self._reflectors, self._vectors = A, _empty(size, size)
        work, whole = _empty(1 + 4 * size + size**2), _empty(3 + 5 * size, dtype=torch.int64)
        arguments = (self.values, off_diagonal, self._vectors, size, work, len(work), whole, len(whole))
        _call("lapack", "sstedc", "I", size, *arguments)

    def vectors(self, first: int, last: int) -> Tensor:
        """Returns eigenvectors (m, last - first), of the eigenvalues from `first` to before `last` in their order."""
        if not self._on_cpu:
            return self._vectors[:, first:last].clone()
        size, turned = len(self._vectors), self._vectors[first:last].clone()
        if len(turned):
            work = _empty((len(turned) + _BLOCK + 1) * _BLOCK)
            shape, reflectors = (size, len(turned)), (self._reflectors, size, self._scales)
            _call("lapack", "sormtr", "L", "U", "N", *shape, *reflectors, turned, size, work, len(work))
        return turned.T


def lower_gram(columns: Tensor, out: Tensor) -> None:
    """Write `columns' columns` into the lower triangle of a matrix; what is above it stays as it is.

    Args:
        columns: (n, m) in float32, on a CPU, of which one or the other dimension lies in memory without gaps.
        out: (m, m) in float32, contiguous.
    """
    (n, m), by_rows = columns.shape, columns.is_contiguous()
    held = columns if by_rows else columns.T.contiguous()  # as BLAS sees it: (m, n), or (n, m)
    one, zero = _empty(1).fill_(1), _empty(1).zero_()
    shape = (m, n, one, held, m if by_rows else n, zero, out, m)
    _call("blas", "ssyrk", "U", "N" if by_rows else "T", *shape, returns_info=False)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns memory for a routine, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _call(library: str, name: str, *arguments: str | int | Tensor, returns_info: bool = True) -> None:
    """Call a routine, the last argument of which, `info`, is not among those given."""
    info = ctypes.c_int64(0)
    held = [*map(_address_of, arguments), *([ctypes.byref(info)] if returns_info else [])]
    with in_one_thread():
        _routine(library, name, len(held))(*held)
    says = ctypes.c_int32.from_buffer(info).value
    if says:
        raise ValueError(f"Expected a matrix that LAPACK can decompose, but its routine {name} says {says}.")


def _address_of(value: str | int | Tensor) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.int64) or not value.is_contiguous():
            raise ValueError(
                f"Expected float32 numbers without gaps, on a CPU, but got {value.dtype} on {value.device}."
            )
        return ctypes.c_void_p(value.data_ptr())
    # A whole number of 64 bits is one of 32 bits, too, where the lower ones come first.
    return ctypes.byref(ctypes.c_char(value.encode()) if isinstance(value, str) else ctypes.c_int64(value))


@cache
def _routine(library: str, name: str, num_arguments: int) -> Any:
    from scipy.linalg import cython_blas, cython_lapack

    capsule = {"blas": cython_blas, "lapack": cython_lapack}[library].__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.argtypes, get_name.restype = [ctypes.py_object], ctypes.c_char_p
    get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * num_arguments)
    return signature(get_pointer(capsule, get_name(capsule)))


def in_one_thread() -> Any:
    """Returns a context in which SciPy's BLAS and LAPACK use one thread each time they are called, in any thread.

    They have threads of their own, which wait for each other where several callers have work for them.
    """
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> Any:
    import scipy.linalg  # noqa: F401 - its libraries are to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
