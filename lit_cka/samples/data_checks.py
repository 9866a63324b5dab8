"""What a few samples say of a dataloader: which data these are, and whether they are the same at every pass.

Samples are drawn beside the dataloader's own iteration, in this process, with all random states kept apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

from lit_cka.features.lightning_private import before_batch_transfer
from lit_cka.samples.batch_rows import rows_of
from lit_cka.samples.drawing import change_random_states, drawing, fetch, holders_of, untouched
from lit_cka.samples.hashing import content_hash, row_hashes

_NUM_PROBES = 4  # samples for a fingerprint, from the first to the last
_NUM_COLLATED = 16  # samples to see whether they are put into another order, of which many may be as long
_MOST_BYTES = 2**30  # of tensors that are hashed as a whole
_NUM_BATCHES = 2
_ENOUGH = 16  # samples of which some would differ by random changes
_DRAWS = (2, 8)  # of enough samples, and of few
_UNKNOWN = 0


def root_of(dataset: Any) -> tuple[Any, npt.NDArray[np.int64] | None]:
    """The dataset that a `Subset` is a part of, and the indices of its samples there; None for a dataset itself."""
    indices = None
    while type(dataset) is Subset:
        try:
            of_subset = np.asarray(dataset.indices, dtype=np.int64)
        except (TypeError, ValueError):  # a dataset with other keys
            break
        indices = of_subset if indices is None else of_subset[indices]
        dataset = dataset.dataset
    return dataset, indices


def dataset_fingerprint(dataset: Any, known: int | None = None) -> int:
    """A fingerprint of 64 bits of a map-style dataset: of its length and of some samples, the last one among them.

    All of it counts where it is made of tensors. Datasets whose samples change, or can't be hashed or drawn, all have
    the same one.

    Args:
        dataset: what is drawn from, beside its own use.
        known: its fingerprint some time ago; then it is drawn once, not twice.
    """
    if type(dataset) is TensorDataset and sum(tensor.nbytes for tensor in dataset.tensors) <= _MOST_BYTES:
        return _as_number(content_hash(dataset.tensors))
    indices = _probes(dataset, _NUM_PROBES)
    if not indices or known == _UNKNOWN:
        return _UNKNOWN
    with untouched(dataset):
        drawn = []
        for draw in range(2 if known is None else 1):
            change_random_states(draw, dataset)
            drawn.append(_quietly(lambda: [content_hash(sample) for sample in fetch(dataset, indices)]))
    is_fixed = drawn[0] is not None and None not in drawn[0] and drawn[0] == drawn[-1]
    return _as_number(content_hash([len(dataset), drawn[0]])) if is_fixed else _UNKNOWN


def _as_number(fingerprint: bytes | None) -> int:
    return _UNKNOWN if fingerprint is None else int.from_bytes(fingerprint[:8], "big", signed=True)


def _probes(dataset: Any, number: int) -> list[int]:
    length = _quietly(lambda: len(dataset)) if isinstance(dataset, Sized) else None
    return sorted({round(i * (length - 1) / (number - 1)) for i in range(number)}) if length else []


def _quietly(function: Callable[[], Any]) -> Any:
    """What the function of a user's dataset returns; None if it raises, of whatever kind."""
    try:
        return function()
    except Exception:
        return None


def keeps_order(loader: DataLoader[Any]) -> bool:
    """Whether the samples of a batch are in the order of their indices, and not, say, sorted by length.

    Some samples are collated in their order and in reverse, where torch's own function doesn't do it. True where
    that can't be told.
    """
    indices = _probes(loader.dataset, _NUM_COLLATED)
    if loader.collate_fn is default_collate or len(indices) < 2:
        return True
    with untouched(*holders_of(loader)):
        batches = _quietly(partial(_both_ways, loader, indices)) or (None, None)
    rows = [row_hashes(batch, len(indices), shared=False) for batch in batches]
    return rows[0] is None or rows[1] is None or rows[0] == rows[1][::-1]


def _both_ways(loader: DataLoader[Any], indices: list[int]) -> tuple[Any, Any]:
    samples = fetch(loader.dataset, indices)
    backward = copy.deepcopy(samples[::-1])  # since it may change what it is given
    return loader.collate_fn(samples), loader.collate_fn(backward)


def draws_differ(loader: Any, transfer: Callable[[Any], Any] | None = None, *holders: Any) -> bool | None:
    """Whether the data are others when they are read again: augmented, cropped or collated at random.

    The first batches are drawn several times, by the same indices, under other random states: global ones, and those
    that the dataset, its transforms and the `collate_fn` hold. A dataset without indices is iterated anew: it differs
    unless samples come again at other places.

    Args:
        loader: a dataloader, a `CombinedLoader`, or another iterable of batches.
        transfer: what else is done to a batch before a step gets it.
        holders: objects with random states that this uses.

    Returns:
        None where it can't be told: the data would be used up, or can't be hashed.
    """
    if isinstance(loader, CombinedLoader):
        verdicts = [draws_differ(part) for part in loader.flattened]
        return True if True in verdicts else None if None in verdicts else False
    inner = [value for value in _attributes(loader) if isinstance(value, DataLoader)]
    if not isinstance(loader, DataLoader) and inner:
        return draws_differ(inner[0], transfer, *holders)
    holders = (*holders_of(loader), *holders)
    with untouched(*holders):
        try:
            return _draws_differ(loader, holders, transfer)
        except Exception:  # of any kind, in code of the user's that expects, say, to run in a worker
            return None


def transfer_of(trainer: pl.Trainer, dataloader: int) -> tuple[Any, ...]:
    """What Lightning does to a batch before a step gets it, where hooks of the user take part, and whose they are."""
    module, datamodule = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]  # by a connector
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    users = [user for user in (module, datamodule) if user is not None and any(is_overridden(h, user) for h in hooks)]

    def transfer(batch: Any) -> Any:
        batch = before_batch_transfer(module, trainer.precision_plugin.convert_input(batch), dataloader)
        return trainer.strategy.batch_to_device(batch, module.device, dataloader)

    return (transfer, *users) if users else ()


def _attributes(loader: Any) -> list[Any]:
    return list(vars(loader).values()) if hasattr(loader, "__dict__") else []


def _draws_differ(loader: Any, holders: Sequence[Any], transfer: Callable[[Any], Any] | None) -> bool | None:
    has_enough = isinstance(loader, DataLoader) and (loader.batch_size or 0) >= _ENOUGH
    draw_batches = drawing(loader, 1 if has_enough else _NUM_BATCHES)
    first: list[bytes] | None = None
    num_draws = 1
    draw = 0
    while draw < num_draws:
        change_random_states(draw, *holders)
        batches = [batch if transfer is None else transfer(batch) for batch in draw_batches()]
        samples = _hashes(loader, batches)
        if samples is None:
            return None
        if first is None:
            first, num_draws = samples, _DRAWS[len(samples) < _ENOUGH]
        elif samples != first and not (_is_iterable(loader) and _are_shuffled(first, samples)):
            return True
        draw += 1
    return False


def _hashes(loader: Any, batches: list[Any]) -> list[bytes] | None:
    """A hash of each sample."""
    is_single = isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None
    hashes = [row_hashes(batch, 1 if is_single else rows_of(batch).num_samples or 1) for batch in batches]
    known = [of_batch for of_batch in hashes if of_batch is not None]
    return [sample for of_batch in known for sample in of_batch] if len(known) == len(hashes) else None


def _is_iterable(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def _are_shuffled(samples: list[bytes], others: list[bytes]) -> bool:
    """Whether some sample is in both at other places."""
    place = {sample: index for index, sample in enumerate(samples)}
    return any(place.get(sample, index) != index for index, sample in enumerate(others))
