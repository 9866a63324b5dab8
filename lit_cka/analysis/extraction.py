"""Run a model once over a dataset and keep the features of its layers: `extract`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lit_cka.analysis.features import Features
from lit_cka.features.calling import call_model, evaluating
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.given_masks import Mask
from lit_cka.features.layers import Layers
from lit_cka.features.nested import tensors_in
from lit_cka.features.pooling import Pooling
from lit_cka.parallel.devices import usable_device
from lit_cka.parallel.ranks import Ranks
from lit_cka.progress import progress_bar
from lit_cka.reference.arguments import batch_copy
from lit_cka.samples.hashing import row_hashes
from lit_cka.samples.random_states import preserved_rng


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Layers | None = None,
    pooling: Pooling = "mean",
    mask: Mask | None = None,
    device: torch.device | str | None = None,
    ids: Sequence[str] | None = None,
    name: str = "model",
    data: str = "data",
    progress: bool = True,
    distributed: bool = False,
) -> Features:
    """Run a model once over a dataset, in eval mode, and keep the features of its layers.

    Where a GPU has too little memory for a batch, batches are run in halves from then on. The model gets copies, so
    that what it changes in place stays as it is in the loader's batches.

    Args:
        model: the network.
        loader: gives batches: mappings, of which the model gets what it takes by name, "id" names the samples and
            "labels" are kept; tuples, of which the model gets the first, and the second are labels; or inputs alone.
            Samples without ids are numbered, and matched by what the model has read of them; two loaders that give
            the same samples in other forms have to give them in the same order.
        layers: see `lit_cka.features.select_layers`; None for the repeated blocks.
        pooling: as in `FeatureExtractor`.
        mask: which tokens count, as in `FeatureExtractor`.
        device: where to run, and from where the model then goes back; None for where it is.
        ids: of all samples in order, in place of those in batches.
        name: of the model, for tables and files.
        data: name of the dataset.
        progress: show a progress bar.
        distributed: deal the batches out to the ranks of `torch.distributed`, or of torchrun. All ranks have to call it
            with the same samples, and all get all features, in the order of the samples.

    Raises:
        ValueError: if the loader gives no samples, an id comes twice, or a layer has no features, see
            `FeatureExtractor.collect`.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features = extract(net, [torch.randn(5, 4), torch.randn(3, 4)], layers=["0"], progress=False)
        >>> features.num_samples, tuple(features.layers["0"].shape)
        (8, (8, 8))
    """
    home = next(model.parameters(), torch.empty(0)).device
    place = home if device is None else usable_device(device)
    if place != home:
        model.to(place)
        try:
            return extract(
                model, loader, layers=layers, pooling=pooling, mask=mask, ids=ids, name=name, data=data,
                progress=progress, distributed=distributed,
            )  # fmt: skip
        finally:
            model.to(home)
    from lightning.fabric.utilities import move_data_to_device

    extractor = FeatureExtractor(model, layers, pooling, mask=mask)
    run = _Halving(model, extractor)

    def batches(rank: int, num_ranks: int) -> list[_BatchFeatures]:
        batches_here, num_batches = _share(loader, rank, num_ranks)
        taken = []
        with (
            torch.no_grad(),
            preserved_rng(),
            evaluating(model),
            extractor,
            extractor.alone(),
            progress_bar(f"{name} on {data}", num_batches, enabled=progress and rank == 0) as advance,
        ):
            for batch in batches_here:
                hashes = _input_hashes(batch)
                features = run(move_data_to_device(batch, place))
                num_samples, named = len(next(iter(features.values()))), _ids(batch)
                read = hashes if named is None and hashes is not None and len(hashes) == num_samples else None
                taken.append(_BatchFeatures(features, num_samples, named, _labels(batch), read))
                advance(1)
        return taken

    if distributed:
        with Ranks() as ranks:
            shares = ranks.gather(lambda: batches(ranks.rank, ranks.size))
        taken = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
    else:
        taken = batches(0, 1)
    if not taken:
        raise ValueError(f"Expected {data!r} to give samples, but it gave none.")
    found: list[str] = []
    for batch in taken:
        found += batch.ids or [str(len(found) + index) for index in range(batch.num_samples)]
    labels = [label for batch in taken for label in batch.labels]
    if ids is not None and len(ids) != len(found):
        raise ValueError(f"Expected an id for each of {len(found)} samples, but got {len(ids)}.")
    inputs = [key for batch in taken for key in batch.inputs or ()] if ids is None else []
    ids = found if ids is None else list(ids)
    most, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"Expected every sample to have its own id, but {most!r} comes more than once.")
    joined = {layer: torch.cat([batch.features[layer] for batch in taken]) for layer in taken[0].features}
    shown = pooling if isinstance(pooling, str) else getattr(pooling, "__name__", "callable")
    return Features(
        joined, ids, name, data, shown, labels if len(labels) == len(ids) else None,
        inputs if len(inputs) == len(ids) else None,
    )  # fmt: skip


class _BatchFeatures(NamedTuple):
    """The features of a batch, with the ids and labels that it has."""

    features: dict[str, Tensor]
    num_samples: int
    ids: list[str] | None
    labels: list[Any]
    inputs: list[str] | None


def _share(loader: Iterable[Any], rank: int, num_ranks: int) -> tuple[Iterable[Any], int]:
    """Returns this rank's batches, dealt out in turn, and how many they are, 0 if that isn't known."""
    from lightning.fabric.utilities.data import sized_len

    num_batches = sized_len(loader) or 0  # a DataLoader has `__len__` even where its dataset has none
    if num_ranks == 1:
        return loader, num_batches
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    if any(isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for sampler in samplers):
        raise ValueError("Expected a `loader` that does not shuffle: on several ranks, each would have its own order.")
    if isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler:
        indices = list(loader.batch_sampler)[rank::num_ranks]  # the others need not even be loaded
        part = DataLoader(
            loader.dataset,
            batch_sampler=indices,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )
        return part, len(indices)
    return islice(loader, rank, None, num_ranks), len(range(rank, num_batches, num_ranks))


def _ids(batch: Any) -> list[str] | None:
    named = batch.get("id") if isinstance(batch, Mapping) else None
    if named is None:
        return None
    return [str(sample) for sample in (named.tolist() if isinstance(named, Tensor) else named)]


def _input_hashes(batch: Any) -> list[str] | None:
    """Returns a hash of what a batch holds of each sample, None where that can't be told."""
    hashes = row_hashes(batch, _num_samples(batch), shared=False)
    return None if hashes is None else [key.hex() for key in hashes]


def _num_samples(batch: Any) -> int:
    # By the first tensor: there may be longer ones that hold no samples, such as weights of classes.
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)


def _labels(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        held = batch.get("labels", batch.get("label"))
    else:
        held = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(held, Tensor):
        return held.tolist() if held.ndim == 1 else []
    return list(held) if isinstance(held, (tuple, list)) else []


class _Halving:
    """Runs the model on a batch, in as many parts as it takes to fit into memory."""

    def __init__(self, model: nn.Module, extractor: FeatureExtractor) -> None:
        self._model = model
        self._extractor = extractor
        self._num_parts = 1

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        num_samples = _num_samples(batch)
        parts: list[dict[str, Tensor]] = []
        start = 0
        while start < max(num_samples, 1):
            size = -(-num_samples // self._num_parts)
            try:
                parts.append(self._run(_part(batch, num_samples, start, start + size)))
                start += max(size, 1)
                continue
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            # Out of the `except`: the exception holds the tensors of the run that failed.
            self._extractor.drain()
            self._num_parts *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _run(self, batch: Any) -> dict[str, Tensor]:
        call_model(self._model, batch_copy(batch))
        return {name: value.cpu() for name, value in self._extractor.collect().items()}


def _part(value: Any, num_samples: int, start: int, stop: int) -> Any:
    """Returns the samples from `start` to `stop` of everything in a batch that has one entry a sample."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and len(value) == num_samples else value
    if isinstance(value, Mapping):
        return {name: _part(item, num_samples, start, stop) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_part(item, num_samples, start, stop) for item in value]
    return value
