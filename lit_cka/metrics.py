"""CKA as torchmetrics: `LinearCKA`, exact over a whole stream of batches, and `MinibatchCKA`, layers x layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.cka import cka_from_moments
from lit_cka.functional.minibatch import (
    HSICSums,
    Kernel,
    add_batch,
    cka_from_hsic_sums,
    empty_hsic_sums,
    in_units_of,
    merge_hsic_sums,
)
from lit_cka.functional.moments import PairedMoments, check_features, empty_moments
from lit_cka.functional.precision import Products, chosen_products
from lit_cka.functional.scaled_moments import ScaledMoments, add_scaled, merge_scaled
from lit_cka.parallel.collectives import agree_on_exponents, agree_on_sizes, all_reduce_moments, flattened


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
    a: Tensor
    b: Tensor
    exponent_x: Tensor
    exponent_y: Tensor

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
        for name in ("exponent_x", "exponent_y"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx=None)

    @property
    def moments(self) -> PairedMoments:
        """The statistics of all samples so far (of this rank, outside `sync_context`), of features that are divided by
        two to the power of `exponent_x` and `exponent_y`: 0 but for very large or small ones.
        """
        return PairedMoments(*(getattr(self, name) for name in PairedMoments._fields))

    def _set_moments(self, scaled: ScaledMoments) -> None:
        for name, value in {**scaled.moments._asdict(), **scaled._asdict()}.items():
            if name != "moments":
                setattr(self, name, value)

    @takes_arrays
    def update(self, X: Tensor, Y: Tensor) -> None:
        """Add the paired features `X` (n, d_x) and `Y` (n, d_y)."""
        check_features(X, Y)
        device, scaled = self.n.device, self._like(X.shape[1], Y.shape[1])
        self._set_moments(add_scaled(scaled, X.to(device), Y.to(device), products=self.products))

    def _like(self, num_features_x: int, num_features_y: int) -> ScaledMoments:
        """The moments so far, with widths if they had none; an error if they have others."""
        moments = self.moments
        if not len(moments.mean_x) or not len(moments.mean_y):
            d_x, d_y = len(moments.mean_x) or num_features_x, len(moments.mean_y) or num_features_y
            moments = empty_moments(d_x, d_y, moments.n.device)
        for name, mean, got in (("X", moments.mean_x, num_features_x), ("Y", moments.mean_y, num_features_y)):
            if len(mean) != got:
                raise ValueError(f"Expected `{name}` to have {len(mean)} features per sample, but got {got}.")
        return ScaledMoments(moments, self.exponent_x, self.exponent_y)

    def compute(self) -> Tensor:
        """CKA of all samples so far, on all ranks."""
        return cka_from_moments(self.moments, debiased=self.debiased)

    def _merge(self, states: dict[str, Tensor]) -> None:
        exponents = states["exponent_x"], states["exponent_y"]
        other = ScaledMoments(PairedMoments(*(states[name] for name in PairedMoments._fields)), *exponents)
        d_x, d_y = other.moments.xy.shape
        if d_x and d_y:  # otherwise it has seen no batch
            self._set_moments(merge_scaled(self._like(d_x, d_y), other))

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:
        """All-reduce, see `lit_cka.parallel.collectives`: no gathering, so no memory for every rank."""
        group = process_group or self.process_group
        exponents, spreads = torch.stack([self.exponent_x, self.exponent_y]), torch.stack([self.a, self.b])
        units = agree_on_exponents(exponents, spreads, group).unbind()
        scaled = ScaledMoments(self.moments, self.exponent_x, self.exponent_y).in_units(*units)
        self._set_moments(scaled._replace(moments=all_reduce_moments(scaled.moments, group)))


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

    xy: Tensor
    n: Tensor

    def __init__(self, kernel: Kernel = "linear", *, bandwidth: float = 1.0, **metric_kwargs: Any) -> None:
        super().__init__(**metric_kwargs)
        if kernel not in get_args(Kernel):
            raise ValueError(f'Expected `kernel` to be "linear" or "rbf", but got {kernel!r}.')
        if bandwidth <= 0:
            raise ValueError(f"Expected `bandwidth` to be positive, but got {bandwidth}.")
        self.kernel: Kernel = kernel
        self.bandwidth = bandwidth
        for name, value in empty_hsic_sums(0, 0)._asdict().items():
            self.add_state(name, value, dist_reduce_fx="sum")

    @property
    def sums(self) -> HSICSums:
        """The sums over all batches so far (of this rank, outside `sync_context`); of no layers before the first."""
        return HSICSums(*(getattr(self, name) for name in HSICSums._fields))

    def _set_sums(self, sums: HSICSums) -> None:
        for name, value in sums._asdict().items():
            setattr(self, name, value)

    def _like(self, k: int, l: int) -> HSICSums:  # noqa: E741
        """The sums so far, of as many layers if they were of none; an error if they are of others."""
        if not self.xy.numel():
            return empty_hsic_sums(k, l, self.n.device)
        if self.xy.shape != (k, l):
            raise ValueError(f"Expected {tuple(self.xy.shape)} layers as before, but got {(k, l)}.")
        return self.sums

    @takes_arrays
    def update(self, X: Sequence[Tensor] | Mapping[str, Tensor], Y: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Add one batch's features, one (n, d_l) per layer."""
        left, right = (list(layers.values() if isinstance(layers, Mapping) else layers) for layers in (X, Y))
        for name, layers in (("X", left), ("Y", right)):
            if not layers:
                raise ValueError(f"Expected `{name}` to hold the features of at least one layer, but got none.")
        self._set_sums(add_batch(self._like(len(left), len(right)), left, right, self.kernel, self.bandwidth))

    def _merge(self, states: dict[str, Tensor]) -> None:
        other = HSICSums(**states)
        if other.xy.numel():
            self._set_sums(merge_hsic_sums(self._like(*other.xy.shape), other, self.kernel))

    def compute(self) -> Tensor:
        """CKA (layers_x, layers_y) of all batches so far, on all ranks."""
        return cka_from_hsic_sums(self.sums)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:
        """All-reduce: agree on the numbers of layers, which a rank without batches does not know, then add up."""
        group, device = process_group or self.process_group, self.n.device
        k, l = agree_on_sizes(self.xy.shape, "numbers of layers", device, group)  # noqa: E741
        if not k or not l:
            return
        sums = self._like(k, l)
        exponents, spreads = torch.cat([sums.exponents_x, sums.exponents_y]), torch.cat([sums.xx, sums.yy])
        units = agree_on_exponents(exponents, spreads, group)
        flat, totals = flattened(in_units_of(sums, units[:k], units[k:], self.kernel)[:4])
        dist.all_reduce(flat, group=group)
        xy, xx, yy, n = totals
        self._set_sums(HSICSums(xy, xx, yy, n, units[:k], units[k:]))
