"""What is measured of a model on a test set: values of each sample, their sums, and the metrics they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_cka.parallel.devices import widest_float
from lit_cka.parallel.ranks import is_distributed

NUM_BINS = 15
# The metric that a variant is judged by, the first that there is; all but perplexity are shares of right answers.
MAIN_METRICS = ("top1", "choice_accuracy", "exact_match", "perplexity")
SHARES = MAIN_METRICS[:3]


def sample_values(model: nn.Module, batch: Any, to_classes: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Returns what the model gives for a batch: values (n,) of each sample, in float64, by what they are.

    A model with a method `evaluate(batch)` says itself. Others are classifiers: the batch is `(inputs, labels)`, or
    what the model's `split(batch)` makes of it, or a mapping with "labels"; the model returns logits, or an object
    that holds them as `logits`.
    """
    evaluate = getattr(model, "evaluate", None)
    if callable(evaluate):
        values: dict[str, Tensor] = evaluate(batch)
        return values
    logits, labels = _classify(model, batch)
    logits = logits.to(widest_float(logits.device))
    if to_classes is not None:
        logits = to_classes(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Expected logits (samples, classes) and whole labels (samples,), but got logits of shape "
            f"{tuple(logits.shape)} and {labels.dtype} labels of shape {tuple(labels.shape)}."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"Expected labels from 0 to {logits.shape[1] - 1}, the model's classes, but got labels from "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    confidence, top = logits.softmax(dim=1).max(dim=1)
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return {
        "top1": (top == labels).to(logits.dtype),
        "top5": (top5 == labels[:, None]).any(dim=1).to(logits.dtype),
        "loss": cross_entropy(logits, labels, reduction="none"),
        "confidence": confidence,
    }


def _classify(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    split = getattr(model, "split", None)
    if callable(split) and not isinstance(batch, Tensor):
        inputs, labels = split(batch)
        output = model(inputs)
    elif isinstance(batch, Mapping) and "labels" in batch:
        labels = batch["labels"]
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        output = model(inputs)
    else:
        raise ValueError(
            "Expected batches `(inputs, labels)`, or a mapping with 'labels', or a model with a method "
            f"`split(batch)` or `evaluate(batch)`, but got a batch of type {type(batch).__name__}."
        )
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"Expected the model to return logits, but it returned {type(output).__name__}.")
    return logits, labels


class MetricSums:
    """Sums over samples, of one variant on one test set, and the metrics that follow from them.

    top1, top5, loss      means over samples
    calibration_error     sum_b |right_b - confidence_b| / n over 15 equal bins of confidence (Guo et al. 2017)
    perplexity            exp(sum nll / sum tokens)
    and the mean of whatever else the model's `evaluate` gives
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], num_first: int | None) -> None:
        """Add the first so many samples of a batch; None for all."""
        values = {name: value[:num_first].detach() for name, value in values.items()}
        first = next(iter(values.values()))
        dtype = widest_float(first.device)
        added = {name: value.to(dtype).sum()[None] for name, value in values.items()}
        added["n"] = torch.tensor([float(len(first))], dtype=dtype, device=first.device)
        if "confidence" in values:
            bins = torch.zeros(2, NUM_BINS, dtype=dtype, device=first.device)
            index = (values["confidence"] * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            for row, name in zip(bins, ("top1", "confidence"), strict=True):
                row.index_add_(0, index, values[name].to(dtype))
            added["bins"] = bins.flatten()
        for name, value in added.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self, names: list[str], device: torch.device) -> dict[str, float]:
        """Returns the metrics over all ranks; each has to call it, with the `names` of any rank that has some."""
        sizes = {"bins": 2 * NUM_BINS}
        dtype = widest_float(device)
        flat = torch.cat(
            [self._sums.get(name, torch.zeros(sizes.get(name, 1), dtype=dtype, device=device)) for name in names]
        )
        if is_distributed():
            dist.all_reduce(flat)
        sums = dict(zip(names, flat.cpu().split([sizes.get(name, 1) for name in names]), strict=True))
        n = sums["n"].item()
        metrics = {
            name: (value / n).item() if n else math.nan
            for name, value in sums.items()
            if name not in ("n", "bins", "confidence", "nll", "num_tokens")
        }
        if "bins" in sums:
            right, confidence = sums["bins"].view(2, NUM_BINS)
            metrics["calibration_error"] = ((right - confidence).abs().sum() / n).item() if n else math.nan
        if "num_tokens" in sums:
            metrics["perplexity"] = (sums["nll"] / sums["num_tokens"]).exp().item()
        metrics["n"] = n
        return metrics

    @property
    def names(self) -> list[str]:
        """The names of the sums, sorted."""
        return sorted(self._sums)
