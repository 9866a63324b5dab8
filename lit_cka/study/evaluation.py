"""One checkpoint of a study: loaded, edited in all ways, and evaluated, each batch loaded once for all: `Evaluator`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from lit_cka.editing.evaluation import SHARES, sample_values
from lit_cka.editing.loaded_sets import LoadedSet
from lit_cka.editing.parameter import check_finite
from lit_cka.editing.placement import Placement
from lit_cka.editing.sources import module_weights, weights_for
from lit_cka.reference.arguments import batch_copy
from lit_cka.samples.hashing import content_hash
from lit_cka.study.checkpoints import Checkpoint
from lit_cka.study.edits import BASELINES, StudyEdit, shrunk_alike
from lit_cka.study.measuring import measured
from lit_cka.study.storage import CheckpointResult, SetResult


def null_of(label: str) -> str:
    """Returns what the shrinkage beside an edit is called."""
    return f"shrink({label})"


class Evaluator:
    """Evaluates checkpoints of one architecture, one after the other.

    Args:
        host: the module that all weights go into, on the device to compute on.
        pretrained: weights W0 by name, as for `weights_for`, there as well.
        edits: by label.
        depths: of the weights in blocks; None if no edit asks.
        shared: beginnings of names that only the fine-tuned models have.
        which: of several sets of weights in a file; None where there is one.
        max_batches: of each test set; None for all.
    """

    def __init__(
        self,
        host: nn.Module,
        pretrained: Mapping[str, Tensor],
        edits: Mapping[str, StudyEdit],
        *,
        depths: Mapping[str, float] | None = None,
        shared: Sequence[str] = (),
        which: str | None = None,
        max_batches: int | None = None,
    ) -> None:
        self.host = host
        self._w0 = dict(pretrained)
        self._edits = dict(edits)
        self._depths, self._shared, self._which = depths, shared, which
        self._max_batches = max_batches
        self._parameters = list(module_weights(host, buffers=False))
        self._device = next((value.device for value in module_weights(host).values()), torch.device("cpu"))

    def evaluate(
        self,
        checkpoint: Checkpoint,
        data: pl.LightningDataModule,
        sets: Sequence[LoadedSet],
        loaders: Sequence[Any],
        advance: Callable[[float], None] = lambda amount: None,
    ) -> CheckpointResult:
        """Returns which samples each variant gets right.

        Args:
            checkpoint: the fine-tuned model.
            data: that moves batches to the device.
            sets: the test sets, the one in-distribution first.
            loaders: likewise.
            advance: called with the share of the work that was done since the last call.

        Raises:
            ValueError: if the checkpoint is of another architecture, damaged, or holds NaN.
            OSError: if it can't be read.
        """
        result = CheckpointResult(checkpoint.name, checkpoint.identity(), [], [])
        weights = self._variants(checkpoint, result)
        result.variants = list(weights)
        start = time.perf_counter()
        # A shrinkage that is the edit has its tensors, and needs no pass of its own.
        first_of: dict[int, str] = {}
        same = {label: first_of.setdefault(id(each), label) for label, each in weights.items()}
        placement = Placement(self.host, {label: weights[label] for label in dict.fromkeys(same.values())})
        for loaded, loader in zip(sets, loaders, strict=True):
            result.sets.append(self._evaluate_set(loaded, loader, data, placement, same, advance, len(loaders)))
        result.seconds = time.perf_counter() - start
        return result

    def _variants(self, checkpoint: Checkpoint, result: CheckpointResult) -> dict[str, dict[str, Tensor]]:
        """Returns the weights of each variant, and notes what the edits took."""
        loaded = weights_for(self.host, checkpoint.path, "fine-tuned", which=self._which).weights
        moved: dict[int, Tensor] = {}  # of tied weights one tensor
        w1 = {name: moved.setdefault(id(value), value.to(self._device)) for name, value in loaded.items()}
        for name, value in w1.items():
            check_finite(name, None, value)
        # What the pretrained model lacks, the fine-tuned one has for both.
        w0 = {**w1, **{name: value for name, value in self._w0.items() if name in w1}}
        weights = dict(zip(BASELINES, (w0, w1), strict=True))
        for label, edit in self._edits.items():

            def edited(edit: StudyEdit = edit) -> dict[str, Tensor]:
                return edit.weights(w0, w1, parameters=self._parameters, depths=self._depths)

            weights[label], cost = measured(edited, self._device)
            null = shrunk_alike(w0, w1, weights[label])
            weights[null_of(label)] = weights[label] if null.is_same else null.weights
            result.edits[label] = {**cost._asdict(), "kept": null.kept, "is_scaling": null.is_same}
        return weights

    @torch.no_grad()
    def _evaluate_set(
        self,
        loaded: LoadedSet,
        loader: Any,
        data: pl.LightningDataModule,
        placement: Placement,
        same: Mapping[str, str],
        advance: Callable[[float], None],
        num_sets: int,
    ) -> SetResult:
        right: dict[str, list[Tensor]] = {label: [] for label in same.values()}
        digest, metric, labels = xxh3_128(), None, []
        has_digest = True
        num_batches = _length(loader, self._max_batches)
        for batch in islice(iter(loader), self._max_batches):
            hashed = content_hash(batch)
            has_digest = has_digest and hashed is not None
            digest.update(hashed or b"")
            labels.append(_labels(self.host, batch))
            batch = _on_device(batch, data, self._device)
            with placement.all_in_turn() as variants:
                for variant in variants:
                    values = sample_values(self.host, batch_copy(batch), loaded.to_classes)
                    metric = _metric(values, loaded.name)
                    right[variant].append(values[metric].round().to("cpu", torch.uint8))
            if num_batches:
                advance(1 / num_batches / num_sets)
        if metric is None or not sum(map(len, next(iter(right.values())))):
            raise ValueError(f"Expected all test sets to have samples, but {loaded.name!r} had none.")
        by_variant = {label: torch.cat(parts).numpy() for label, parts in right.items()}
        stacked = np.stack([by_variant[same[label]] for label in same])
        groups = None if loaded.groups is None else loaded.groups[: stacked.shape[1]].numpy().astype(np.int64)
        return SetResult(
            loaded.name,
            metric,
            stacked,
            groups,
            digest.hexdigest() if has_digest else None,
            _absent(labels, None if loaded.to_classes is not None else getattr(self.host, "num_classes", None)),
        )


def _length(loader: Any, most: int | None) -> int:
    """Returns how many batches there will be, 0 if nobody knows."""
    try:
        length = len(loader)
    except TypeError:
        return 0
    return length if most is None else min(length, most)


def _on_device(batch: Any, data: pl.LightningDataModule, device: torch.device) -> Any:
    """Returns the batch as a trainer would hand it over."""
    batch = data.on_before_batch_transfer(batch, 0)
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)


def _metric(values: Mapping[str, Tensor], name: str) -> str:
    found = next((metric for metric in SHARES if metric in values), None)
    if found is None:
        raise ValueError(
            f"Expected a share of right answers on {name!r} ({', '.join(SHARES)}), which is what a study compares, but "
            f"the model gives {', '.join(values)}. `lit-cka monosoup` evaluates those."
        )
    return found


def _labels(model: nn.Module, batch: Any) -> Tensor | None:
    """Returns the labels of a batch of a classifier; None where they can't be told."""
    split = getattr(model, "split", None)
    if callable(getattr(model, "evaluate", None)):
        return None
    if callable(split) and not isinstance(batch, Tensor):
        labels = split(batch)[1]
    elif isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return labels if isinstance(labels, Tensor) else None


def _absent(labels: Sequence[Tensor | None], num_classes: int | None) -> list[int] | None:
    """Returns the classes that no label is of."""
    known = [each.cpu().flatten() for each in labels if each is not None]
    if num_classes is None or len(known) < len(labels):
        return None
    return sorted(set(range(num_classes)) - set(torch.cat(known).tolist()))
