"""CKA as torchmetrics: `LinearCKA`, exact over a whole stream of batches, and `MinibatchCKA`, layers x layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_cka.functional.cka import cka_from_moments, min_num_samples, pairwise_hsic, self_hsic
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.moments import (
    PairedMoments,
    add_samples,
    check_features,
    empty_moments,
    merge_moments,
)
from lit_cka.functional.precision import Products, chosen_products
from lit_cka.parallel.collectives import agree_on_sizes, all_reduce_moments, flattened


class _Float64Metric(Metric):
    """A metric whose float64 states change device with their parent module, but never their precision."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, **metric_kwargs: Any) -> None:
        # A cached value would keep a rank without new batches out of the collectives that the others wait in.
        super().__init__(**{"compute_with_cache": False, **metric_kwargs})

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of this class (or its states, as a dict) to this one's."""
        if isinstance(incoming_state, type(self)):
            incoming_state = {name: getattr(incoming_state, name) for name in incoming_state._defaults}
        elif isinstance(incoming_state, Metric):
            raise ValueError(
                f"Expected a {type(self).__name__} or a dict of its states, but got {type(incoming_state).__name__}."
            )
        self._merge({name: value.to(self.n.device) for name, value in incoming_state.items()})
        self._update_count += 1

    @abstractmethod
    def _merge(self, states: dict[str, Tensor]) -> None:
        """Add the samples that these states describe to this metric's."""

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Called by `forward`: this metric holds the batch's states, `incoming_state` all earlier ones."""
        self._merge(incoming_state)

    def _copy_state_dict(self) -> dict[str, Any]:
        """The states to return to after a synchronisation: no copy, since no update changes a tensor in place."""
        return {name: getattr(self, name) for name in self._defaults}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype is not torch.float64:
                return fn(tensor)
            device = fn(torch.empty(0, device=tensor.device)).device
            # Apple's backend has no float64: the statistics stay on the CPU there, and `update` brings them features.
            return tensor.to("cpu" if device.type == "mps" else device)

        super()._apply(move, exclude_state)
        return self


class LinearCKA(_Float64Metric):
    """Linear CKA of two streams of features, exact: the value of `linear_cka` on all samples at once.

    Independent of batch size, batch order, number of ranks and how the samples are shared out over them. Holds
    float64 moments about the running mean: `8 (d_x^2 + d_y^2 + d_x d_y)` bytes and O(d). See
    `lit_cka.functional.moments`. Both estimators need the same state; `debiased` only chooses the ratio.

    - `update(X, Y)`: features (n, d_x) and (n, d_y) of the same samples, any floating dtype, any `n` (0 included).
    - `compute()`: float64 scalar, see `linear_cka`. NaN for constant or non-finite features, and as long as there
      are fewer than 2 samples (4 if debiased).

    Args:
        num_features_x: `d_x`; None takes it from the first batch.
        num_features_y: `d_y`; None takes it from the first batch.
        debiased: use the unbiased HSIC (Song et al. 2012).
        products: multiply features in "float64", or in "float32" with sums in float64, which changes CKA by less than
            1e-6; None takes float32 on devices that are slow at float64, see `has_fast_float64`.
        metric_kwargs: as for every torchmetrics `Metric`.

    Raises:
        ValueError: on other `products`; in `update`, on integer features, unequal `n`, or a width other than the one
            declared or seen.

    Example:
        >>> X = torch.arange(12.0).reshape(6, 2).sin()
        >>> metric = LinearCKA()
        >>> metric.update(X[:4], X[:4] + 1)
        >>> metric.update(X[4:], X[4:] + 1)
        >>> print(f"{metric.compute():.6f}")
        1.000000
    """

    n: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    def __init__(
        self,
        num_features_x: int | None = None,
        num_features_y: int | None = None,
        *,
        debiased: bool = False,
        products: Products | None = None,
        **metric_kwargs: Any,
    ) -> None:
        super().__init__(**metric_kwargs)
        chosen_products(products, torch.device("cpu"))  # or an error
        for name, width in (("num_features_x", num_features_x), ("num_features_y", num_features_y)):
            if width is not None and width < 1:
                raise ValueError(f"Expected `{name}` to be a positive number of features or None, but got {width}.")
        self.num_features_x = num_features_x
        self.num_features_y = num_features_y
        self.debiased = debiased
        self.products = products
        # An undeclared width is 0 until the first batch.
        for name, value in empty_moments(num_features_x or 0, num_features_y or 0)._asdict().items():
            self.add_state(name, value, dist_reduce_fx=None)

    @property
    def moments(self) -> PairedMoments:
        """The statistics of all samples so far (of this rank, outside `sync_context`)."""
        return PairedMoments(*(getattr(self, name) for name in PairedMoments._fields))

    def _set_moments(self, moments: PairedMoments) -> None:
        for name, value in moments._asdict().items():
            setattr(self, name, value)

    def update(self, X: Tensor, Y: Tensor) -> None:
        """Add the paired features `X` (n, d_x) and `Y` (n, d_y)."""
        check_features(X, Y)
        device, moments = self.n.device, self._like(X.shape[1], Y.shape[1])
        self._set_moments(add_samples(moments, X.to(device), Y.to(device), products=self.products))

    def _like(self, num_features_x: int, num_features_y: int) -> PairedMoments:
        """The moments so far, with widths if they had none; an error if they have others."""
        moments = self.moments
        if not len(moments.mean_x) or not len(moments.mean_y):
            d_x, d_y = len(moments.mean_x) or num_features_x, len(moments.mean_y) or num_features_y
            moments = empty_moments(d_x, d_y, moments.n.device)
        for name, mean, got in (("X", moments.mean_x, num_features_x), ("Y", moments.mean_y, num_features_y)):
            if len(mean) != got:
                raise ValueError(f"Expected `{name}` to have {len(mean)} features per sample, but got {got}.")
        return moments

    def compute(self) -> Tensor:
        """CKA of all samples so far, on all ranks."""
        return cka_from_moments(self.moments, debiased=self.debiased)

    def _merge(self, states: dict[str, Tensor]) -> None:
        other = PairedMoments(**states)
        if len(other.mean_x) and len(other.mean_y):  # otherwise it has seen no batch
            self._set_moments(merge_moments(self._like(len(other.mean_x), len(other.mean_y)), other))

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:
        """All-reduce, see `lit_cka.parallel.collectives`: no gathering, so no memory for every rank."""
        self._set_moments(all_reduce_moments(self.moments, process_group or self.process_group))


class MinibatchCKA(_Float64Metric):
    """CKA of every layer of one model with every layer of another, from the mean of each batch's unbiased HSIC.

    Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?" (arXiv 2010.15327), eq. 2. State is
    O(layers^2) whatever the widths, and any kernel will do. Unlike `LinearCKA` the value depends on the batch size
    (less so the larger it is); give all batches the same size.

    - `update(X, Y)`: one batch, the layers' features (n, d_l) as a sequence or mapping, n >= 4.
    - `compute()`: float64 (layers_x, layers_y) in about [-1, 1]; NaN where a layer's mean self-HSIC is not positive.

    Args:
        kernel: "linear" or "rbf".
        bandwidth: of the RBF kernel, as a multiple of the median distance within the batch.
        metric_kwargs: as for every torchmetrics `Metric`.

    Raises:
        ValueError: in `update`, on integer features, fewer than 4 samples, unequal `n`, or another number of layers.

    Example:
        >>> X = [torch.arange(12.0).reshape(6, 2).sin(), torch.arange(6.0)[:, None]]
        >>> metric = MinibatchCKA()
        >>> metric.update(X, X)
        >>> print(f"{metric.compute()[0, 0]:.6f}")
        1.000000
    """

    hsic_xy: Tensor
    hsic_xx: Tensor
    hsic_yy: Tensor
    n: Tensor

    def __init__(
        self, kernel: Literal["linear", "rbf"] = "linear", *, bandwidth: float = 1.0, **metric_kwargs: Any
    ) -> None:
        super().__init__(**metric_kwargs)
        if kernel not in ("linear", "rbf"):
            raise ValueError(f'Expected `kernel` to be "linear" or "rbf", but got {kernel!r}.')
        if bandwidth <= 0:
            raise ValueError(f"Expected `bandwidth` to be positive, but got {bandwidth}.")
        self.kernel = kernel
        self.bandwidth = bandwidth
        # Sums over batches; a 0 in place of the (layers, ) shapes until the first batch, which sums broadcast away.
        for name in ("hsic_xy", "hsic_xx", "hsic_yy", "n"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, X: Sequence[Tensor] | Mapping[str, Tensor], Y: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Add one batch's features, one (n, d_l) per layer."""
        grams_x, grams_y = self._grams("X", X), self._grams("Y", Y)
        if grams_x.shape[-1] != grams_y.shape[-1]:
            raise ValueError(
                "Expected `X` and `Y` to hold the same samples in the same order, "
                f"but got {grams_x.shape[-1]} and {grams_y.shape[-1]} samples."
            )
        shape = (len(grams_x), len(grams_y))
        if self.hsic_xy.ndim and self.hsic_xy.shape != shape:
            raise ValueError(f"Expected {tuple(self.hsic_xy.shape)} layers as before, but got {shape}.")
        self.hsic_xy = self.hsic_xy + pairwise_hsic(grams_x, grams_y, unbiased=True)
        self.hsic_xx = self.hsic_xx + self_hsic(grams_x, unbiased=True)
        self.hsic_yy = self.hsic_yy + self_hsic(grams_y, unbiased=True)
        self.n = self.n + grams_x.shape[-1]

    def _grams(self, name: str, features: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        layers = list(features.values() if isinstance(features, Mapping) else features)
        if not layers:
            raise ValueError(f"Expected `{name}` to hold the features of at least one layer, but got none.")
        for layer in layers:
            check_features(layers[0], layer)
        needed = min_num_samples(debiased=True)
        if len(layers[0]) < needed:
            raise ValueError(
                f"Expected at least {needed} samples in a batch for the unbiased HSIC, but got {len(layers[0])}. "
                "Use a larger batch size, and drop_last=True if only the last batch is that small."
            )
        device = self.n.device
        if self.kernel == "rbf":
            return torch.stack([rbf_gram(layer.to(device), bandwidth=self.bandwidth) for layer in layers])
        return torch.stack([linear_gram(layer.to(device)) for layer in layers])

    def _merge(self, states: dict[str, Tensor]) -> None:
        shape, other = self.hsic_xy.shape, states["hsic_xy"].shape
        if len(shape) and len(other) and shape != other:
            raise ValueError(f"Expected {tuple(shape)} layers as before, but got {tuple(other)}.")
        for name, value in states.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """CKA (layers_x, layers_y) of all batches so far, on all ranks."""
        if not self.hsic_xy.ndim:
            return torch.full((0, 0), torch.nan, dtype=torch.float64, device=self.n.device)
        scale = torch.outer(self.hsic_xx.clamp(min=0).sqrt(), self.hsic_yy.clamp(min=0).sqrt())
        return (self.hsic_xy / scale).masked_fill(scale == 0, torch.nan)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:
        """All-reduce: agree on the numbers of layers, which a rank without batches does not know, then add up."""
        group, device = process_group or self.process_group, self.n.device
        shape = torch.Size(agree_on_sizes(self.hsic_xy.shape or (0, 0), "numbers of layers", device, group))
        if not shape.numel():
            return
        shapes = {"hsic_xy": shape, "hsic_xx": shape[:1], "hsic_yy": shape[1:], "n": torch.Size()}
        flat, sums = flattened([getattr(self, name).expand(size) for name, size in shapes.items()])
        dist.all_reduce(flat, group=group)
        for name, value in zip(shapes, sums, strict=True):
            setattr(self, name, value)
