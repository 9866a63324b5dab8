"""In which precision features are multiplied: float64, or float32 with sums in float64 where float64 is slow.

A product of two float32 numbers that is summed over a few hundred terms keeps six digits. What costs more are features
far from 0, whose digits go to their mean. So features are centred in float64 first, rounded to float32 after that,
and the products of a few hundred terms at a time are added up in float64.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Products = Literal["float64", "float32"]

# Compute capabilities whose float64 rate is half that of float32; it is 1/32 or 1/64 on all others that torch supports.
_FAST_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_FAST_AMD = ("gfx906", "gfx908", "gfx90a", "gfx942", "gfx950")  # Radeon VII and the MI series
_TERMS = 512  # of a sum in float32
_BLOCK = 2**21  # elements of a product in float32 at a time: 8 MiB
_SQUARE = 96  # features, of a block of a symmetric product: smaller ones would take longer
_FULL = ("none", "ieee")  # the precisions in which float32 is float32
_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_HAS_SETTINGS = hasattr(torch._C, "_get_fp32_precision_getter")  # from torch 2.9 on


def has_fast_float64(device: torch.device | str) -> bool:
    """Returns whether `device` multiplies in float64 at more than an eighth of its float32 rate.

    CPUs do, and so do the GPUs for computing centres: NVIDIA's of compute capability 6.0 (P100), 7.0 (V100), 8.0
    (A100), 9.0 (H100) and 10.0 (B200), at one half, and AMD's MI series. All other NVIDIA GPUs, among them 7.5 (T4),
    8.6 (A10), 8.9 (L4), 10.3 (B300) and 12.x, have one float64 unit for 32 or 64 of float32 (NVIDIA, CUDA C++
    Programming Guide, "Throughput of Native Arithmetic Instructions"). Apple's MPS has no float64 at all, and of
    devices that are not known here it is not assumed.

    Example:
        >>> has_fast_float64("cpu")
        True
    """
    device = torch.device(device)
    if device.type != "cuda":
        return device.type == "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] in _FAST_AMD
    return capability_has_fast_float64(*torch.cuda.get_device_capability(device))


def capability_has_fast_float64(major: int, minor: int) -> bool:
    """Returns the same by NVIDIA's compute capability; one that is not known here counts as slow."""
    return (major, minor) in _FAST_CAPABILITIES


def chosen_products(products: Products | None, device: torch.device) -> Products:
    """Returns `products` as given; where it is None, "float64" if the device is fast at it, else "float32"."""
    if products not in (None, "float64", "float32"):
        raise ValueError(f'Expected `products` to be "float64", "float32" or None, but got {products!r}.')
    return products or ("float64" if has_fast_float64(device) else "float32")


def float64_device(device: torch.device) -> torch.device:
    """Returns where to sum up in float64 what is on `device`: there, or on the CPU if it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def as_float64(features: Tensor) -> Tensor:
    """Returns the features in float64 and without a graph, on their `float64_device`."""
    return features.detach().to(float64_device(features.device)).to(torch.float64)


def rounded(features: Tensor, products: Products, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns centred features (n, d), float64, as factors of `add_product`, and a power of two they were divided by.

    They stay as they are for `products` in float64; for float32 they are rounded and brought to `device`. Dividing by a
    power of two costs no digit, and without it float32 has no room for the squares of 1e20.
    """
    if products == "float64":
        return features, features.new_ones(())
    largest = torch.linalg.vector_norm(features, torch.inf) if features.numel() else features.sum()
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return (features / scale).to(torch.float32).to(device), scale


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
    """Add `left' right`, times `scale`, to `total`, in place.

    Products in float32 are computed in sums of a few hundred terms, whatever TF32, autocast or the matmul precision are
    set to, and added up in float64.

    Args:
        total: (p, q), float64.
        left: centred features (n, p), float64 or float32; float64 ones on the device of `total`.
        right: centred features (n, q), likewise.
        scale: a scalar on the device of `total`, of which products in float64 make no use.
    """
    if left.dtype == torch.float64:
        if left is right:
            _add_square(total, left)
        else:
            total.addmm_(left.T, right)
        return
    height = max(_BLOCK // max(right.shape[1], 1), 1)
    with FullFloat32(left.device.type):
        for some_left, some_right in zip(left.split(_TERMS), right.split(_TERMS), strict=True):
            for rows, part in zip(total.split(height), some_left.split(height, dim=1), strict=True):
                product = (part.T @ some_right).to(total.device)
                rows += product if scale is None else product.to(torch.float64) * scale


def _add_square(total: Tensor, features: Tensor) -> None:
    """Add `features' features` to a symmetric `total`, in place. Of two blocks across the diagonal one is computed."""
    width = features.shape[1]
    if width < 2 * _SQUARE or features.device.type != "cpu":
        total.addmm_(features.T, features)
        return
    half = width // 2
    first, second = features[:, :half], features[:, half:]
    _add_square(total[:half, :half], first)
    _add_square(total[half:, half:], second)
    total[:half, half:].addmm_(first.T, second)
    total[half:, :half] = total[:half, half:].T


class FullFloat32:
    """A context in which matrix products of float32 are computed in float32: no TF32, no bfloat16, no autocast.

    Where the user has set a lower precision, the setting is changed for the duration and put back as it was, also
    whether a backend followed that of all. It is one of the process: a product of another thread
    would be computed in full too. Several threads may be in it, and leave it in any order.
    """

    _lock = threading.Lock()
    _num_active = 0
    _before: ClassVar[list[tuple[str, str, str]]] = []
    _legacy: ClassVar[str] = "highest"  # before torch 2.9

    def __init__(self, device_type: str) -> None:
        self._autocast = torch.autocast(device_type, enabled=False)

    def __enter__(self) -> None:
        self._autocast.__enter__()
        with FullFloat32._lock:
            FullFloat32._num_active += 1
            if FullFloat32._num_active == 1:
                FullFloat32._start()

    def __exit__(self, *error: Any) -> None:
        with FullFloat32._lock:
            FullFloat32._num_active -= 1
            if FullFloat32._num_active == 0:
                FullFloat32._stop()
        self._autocast.__exit__(*error)

    @classmethod
    def _start(cls) -> None:
        if _HAS_SETTINGS:
            reduced = [matmul for matmul in _MATMULS if _effective(*matmul) not in _FULL]
            cls._before = [(*matmul, _setting(*matmul)) for matmul in reduced]
            for matmul in reduced:
                _set(*matmul, "ieee")
        else:
            cls._legacy = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")

    @classmethod
    def _stop(cls) -> None:
        for setting in cls._before:
            _set(*setting)
        if not _HAS_SETTINGS:
            torch.set_float32_matmul_precision(cls._legacy)


# What is behind `torch.backends.<backend>.<operation>.fp32_precision`, which does not give away all of it.


def _effective(backend: str, operation: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, operation))


def _set(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _setting(backend: str, operation: str) -> str:
    """Returns the precision set for this operation of this backend: "none" if it follows that of its parent.

    Where both are the same, only moving the parent can tell.
    """
    effective = _effective(backend, operation)
    if backend == "generic" or effective == "none":
        return effective
    parent = (backend, "all") if operation != "all" else ("generic", "all")
    if _effective(*parent) != effective:
        return effective
    before = _setting(*parent)
    other = "ieee" if effective != "ieee" else "tf32"
    _set(*parent, other)
    follows = _effective(backend, operation) == other
    _set(*parent, before)
    return "none" if follows else effective
