"""The live model against its reference, batch by batch: `Tracker`, which knows nothing of Lightning's trainer."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_cka.features import FeatureExtractor
from lit_cka.metrics import LinearCKA, MinibatchCKA
from lit_cka.pooling import Pooling
from lit_cka.reference import Reference

Estimator = Literal["exact", "minibatch"]
# Wider features would need more memory for their statistics than the models that are tracked.
_MAX_STATE_BYTES = 8 * 2**30


class LayerScore(NamedTuple):
    """CKA of one layer, the number of samples `n` behind it, and `d`, the larger of the two feature widths."""

    cka: float
    n: int
    d: int


class Tracker:
    """Pairs the features of a live model with its reference's and accumulates the CKA of every layer.

    Args:
        live: the model in training.
        reference: what to compare it with.
        layer_names: the layers, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.
        estimator: "exact" (`LinearCKA`) or "minibatch" (`MinibatchCKA`).
        debiased: as for `LinearCKA`.
    """

    def __init__(
        self,
        live: nn.Module,
        reference: Reference,
        layer_names: list[str],
        pooling: Pooling,
        estimator: Estimator = "exact",
        debiased: bool = False,
    ) -> None:
        self.reference = reference
        self.layer_names = layer_names
        self.live = live
        self._estimator = estimator
        self._debiased = debiased
        self._extractor = FeatureExtractor(
            live, layer_names, pooling, on_call=reference.on_call, on_return=reference.on_return
        )
        self._hooks = ExitStack()
        self._metrics: list[dict[str, LinearCKA | MinibatchCKA]] = []
        self._widths: dict[str, int] = {}
        self._ran_once = False
        self._warned: set[tuple[str, str]] = set()

    def open(self, num_dataloaders: int, device: torch.device) -> None:
        """Start anew for an evaluation over `num_dataloaders` sets: empty statistics on `device`, hooks in place."""
        self.close()
        self._metrics = [
            {name: self._new_metric().to(device) for name in self.layer_names} for _ in range(num_dataloaders)
        ]
        self._hooks.enter_context(self._extractor)
        self._extractor.enabled = False

    def close(self) -> None:
        """Remove all hooks from the live model and the reference. The statistics stay."""
        self._hooks.close()
        self.reference.close()

    def begin(self) -> None:
        """Watch the step that follows."""
        self._extractor.drain()  # what a step that failed may have left
        self._extractor.enabled = True
        self.reference.begin(first=not self._ran_once)

    def end(self, dataloader: int) -> None:
        """Add what the step since `begin` showed to the statistics of the dataloader with this index.

        Raises:
            ValueError: in the first step, if a layer did not run once with usable output. Later, such a layer skips
                the batch, with one warning: a training is not ended for it.
        """
        self._extractor.enabled = False
        live, problems = self._extractor.drain()
        reference, reference_problems = self.reference.end()
        problems = {**reference_problems, **problems}
        for name in live.keys() - reference.keys() - problems.keys():
            problems[name] = (
                f"The reference did not run for layer {name!r}, since no module around it was called: the step calls "
                "it by itself. Give the module a `forward` that calls its parts, and use that in the step."
            )
        for name in self.layer_names:
            if name not in problems:
                try:
                    self._update(self._metrics[dataloader][name], name, live[name], reference[name])
                except ValueError as error:
                    problems[name] = f"Layer {name!r} can't be used: {error}"
            if name in problems and not self._ran_once:
                raise ValueError(problems[name])
            if name in problems:
                self._warn_once(name, "skipped", f"{problems[name]} This batch is left out for the layer.")
        self._ran_once = True

    def scores(self, dataloader: int) -> dict[str, LayerScore]:
        """CKA of every layer over all batches since `open`, on all ranks; NaN with one warning where undefined."""
        scores = {}
        for name, metric in self._metrics[dataloader].items():
            with warnings.catch_warnings():  # a rank without batches takes part all the same
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                with metric.sync_context():
                    # In this order: `compute` ends the synchronisation.
                    n, finite, value = int(metric.n), _is_finite(metric), _item(metric.compute())
            if value != value:
                self._warn_once(name, "nan", _undefined(name, n, finite, self._debiased or self._estimator != "exact"))
            scores[name] = LayerScore(value, n, self._widths.get(name, 0))
        return scores

    def _new_metric(self) -> LinearCKA | MinibatchCKA:
        if self._estimator == "minibatch":
            return MinibatchCKA(sync_on_compute=False)
        return LinearCKA(debiased=self._debiased, sync_on_compute=False)

    def _update(self, metric: LinearCKA | MinibatchCKA, name: str, live: Tensor, reference: Tensor) -> None:
        d = max(live.shape[1], reference.shape[1])
        if isinstance(metric, LinearCKA):
            if 24 * d * d > _MAX_STATE_BYTES:
                raise ValueError(
                    f"Layer {name!r} has {d} features per sample, whose statistics would take "
                    f'{24 * d * d / 1e9:.0f} GB. Pool them (pooling="mean"), or use estimator="minibatch".'
                )
            metric.update(live, reference)
        elif len(live) < 4:
            self._warn_once("", "small", "Batches of fewer than 4 samples are left out of the minibatch estimator.")
        else:
            metric.update([live], [reference])
        self._widths[name] = d

    def _warn_once(self, name: str, kind: str, text: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            rank_zero_warn(text, stacklevel=4)


def _item(value: Tensor) -> float:
    """The one element; NaN where the minibatch estimator has seen no batch and thus no layer."""
    return value.item() if value.numel() else float("nan")


def _is_finite(metric: LinearCKA | MinibatchCKA) -> bool:
    sums = [metric.xx, metric.yy] if isinstance(metric, LinearCKA) else [metric.hsic_xx, metric.hsic_yy]
    return all(bool(value.isfinite().all()) for value in sums)


def _undefined(name: str, n: int, finite: bool, debiased: bool) -> str:
    needed = 4 if debiased else 2
    if n < needed:
        reason = f"it takes {needed} samples, and there were {n}"
    elif not finite:
        reason = "the features of the live model or of the reference hold NaN or infinity"
    else:
        reason = "all samples have the same features in the live model or in the reference (a dead layer?)"
    return f"CKA of layer {name!r} is undefined (NaN): {reason}."
