"""MonoSoup on whole models: state dicts in, the five variants and a record of every parameter out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.checkpoints.quantised import quantised_tensors
from lit_cka.checkpoints.state_dicts import first_names, tensor_identity
from lit_cka.editing.edits import Edit, edit_weights
from lit_cka.editing.parameter import (
    EDITED,
    QUANTISED,
    Edited,
    ParameterRecord,
    edit_cost,
    edit_parameter,
    in_order,
    is_changed,
    untouched,
)
from lit_cka.editing.settings import EditSettings
from lit_cka.parallel.ranks import is_distributed, run_on_all_ranks
from lit_cka.parallel.sharing import one_stream_each, one_thread_each, share_out
from lit_cka.progress import progress_bar


@dataclass
class EditedModel:
    """State dicts by variant, which share the tensors that are the same, and a record per parameter.

    Example:
        >>> import torch
        >>> W0 = {"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}
        >>> W1 = {"fc.weight": torch.eye(4) + 0.1, "fc.bias": torch.ones(4)}
        >>> edited = edit_state_dicts(W0, W1)
        >>> [(record["name"], record["reason"]) for record in edited.records]
        [('fc.weight', None), ('fc.bias', 'fewer than two dimensions')]
    """

    variants: dict[str, dict[str, Tensor]]
    records: list[ParameterRecord]


def edit_state_dicts(
    W0: Mapping[str, Tensor],
    W1: Mapping[str, Tensor],
    settings: EditSettings | None = None,
    *,
    edits: Mapping[str, Edit] | None = None,
    depths: Mapping[str, float] | None = None,
    others: Sequence[Mapping[str, Tensor]] = (),
    parameters: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> EditedModel:
    """Returns the five variants of a fine-tuned model. Quantised weights stay as they are, and their scales with them.

    On a CPU, several weights are edited at once, each on one thread, so that the result doesn't depend on the number
    of threads. Where `torch.distributed` is initialised, the ranks share the weights out by cost, and all get all.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name. Entries that are the same tensor (tied) are edited once.
        settings: how to split; None for the defaults.
        edits: more variants, by the names they are to have: each edit is applied to all weights.
        depths: of the weights in blocks, for "lines"; see `lit_cka.editing.depths`.
        others: weights of other fine-tuned models, for "uniform_soup".
        parameters: names that may be edited; None for all. Others (buffers) keep their fine-tuned value.
        device: where to compute; None for where the weights are. The result is where the weights are.
        place: given every edited tensor, returns the one to keep; see `FileBacked`.
        progress: show a progress bar.

    Returns:
        The variants "pretrained", "finetuned", "monosoup", "highonly", "lowonly" and those of `edits`, with the names
        of `W1`; what the pretrained model lacks or has in another shape is fine-tuned in "pretrained", too.

    Raises:
        ValueError: if weights hold NaN or infinity.

    Example:
        >>> import torch
        >>> W0 = {"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}
        >>> W1 = {"fc.weight": torch.eye(4) + 0.1, "fc.bias": torch.ones(4)}
        >>> edited = edit_state_dicts(W0, W1)
        >>> list(edited.variants)
        ['pretrained', 'finetuned', 'monosoup', 'highonly', 'lowonly']
    """
    settings = settings or EditSettings()
    settings.check_patterns(W1)
    editable = set(W1) if parameters is None else set(parameters)
    tied = first_names({name: tensor_identity(value) for name, value in W1.items()})
    names = sorted(dict.fromkeys(tied.values()), key=lambda name: -edit_cost(W1[name].shape))
    quantised = quantised_tensors(W0) | quantised_tensors(W1)

    def edit(name: str) -> Edited:
        if name in quantised or name not in editable:
            reason = QUANTISED if name in quantised else "not a parameter"
            return dict.fromkeys(EDITED, W1[name]), untouched(name, W1[name].shape, reason)
        start, end = W0.get(name), W1[name]
        if device is None or not end.is_floating_point():
            values, record = edit_parameter(name, start, end, settings)
        else:
            there = edit_parameter(name, None if start is None else start.to(device), end.to(device), settings)
            values, record = {variant: value.to(end.device) for variant, value in there[0].items()}, there[1]
        if not is_changed(record):
            values = dict.fromkeys(EDITED, end)
        elif place is not None:
            values = {variant: place(value) for variant, value in values.items()}
        return values, record

    edited = dict(zip(names, _on_all_ranks(edit, names, W1, place, device, progress), strict=True))
    variants = {
        "pretrained": {name: _start(W0.get(name), value) for name, value in W1.items()},
        "finetuned": dict(W1),
        **{variant: {name: edited[tied[name]][0][variant] for name in W1} for variant in EDITED},
    }
    for label, each in (edits or {}).items():
        made = edit_weights(W0, W1, each, depths=depths, others=others, settings=settings)
        variants[label] = (
            made
            if place is None
            else {name: value if value is W1[name] else place(value) for name, value in made.items()}
        )
    return EditedModel(variants, in_order(tied, {name: record for name, (_, record) in edited.items()}))


def _on_all_ranks(
    edit: Callable[[str], Edited],
    names: Sequence[str],
    W1: Mapping[str, Tensor],
    place: Callable[[Tensor], Tensor] | None,
    device: torch.device | str | None,
    progress: bool,
) -> list[Edited]:
    """Returns `edit` of each name, done once among the ranks and known to all."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    owners = share_out([edit_cost(W1[name].shape) for name in names], num_ranks)
    names_here = [name for name, owner in zip(names, owners, strict=True) if owner == rank]
    places = {value.device for value in W1.values()} if device is None else {torch.device(device)}
    (where,) = places if len(places) == 1 else (torch.device("meta"),)
    done: dict[str, Edited] = {}

    def edit_here() -> dict[str, ParameterRecord]:
        with progress_bar("Editing", len(names_here), enabled=progress) as advance:
            for name, result in zip(names_here, _several_at_once(edit, names_here, where), strict=True):
                done[name] = result
                advance(1)
        return {name: record for name, (_, record) in done.items()}

    records = run_on_all_ranks(edit_here)
    if num_ranks == 1:
        return [done[name] for name in names]
    for name, owner in zip(names, owners, strict=True):
        record = records[owner][name]
        if not is_changed(record):
            done[name] = dict.fromkeys(EDITED, W1[name]), record
            continue
        if owner == rank:
            values = done[name][0]
        else:  # contiguous like the owner's, whatever `W1` is: what is sent is the memory as it lies
            layout = torch.contiguous_format
            values = {variant: torch.empty_like(W1[name], memory_format=layout) for variant in EDITED}
        there = {variant: value.to(device) if device is not None else value for variant, value in values.items()}
        for variant in EDITED:
            dist.broadcast(there[variant], owner)
        if owner != rank:
            values = {variant: value.to(W1[name].device) for variant, value in there.items()}
            done[name] = values if place is None else {key: place(value) for key, value in values.items()}, record
    return [done[name] for name in names]


def _several_at_once(edit: Callable[[str], Edited], names: Sequence[str], where: torch.device) -> Iterator[Edited]:
    if where.type == "cuda":
        return one_stream_each(edit, names, where)
    return one_thread_each(edit, names, enabled=where.type == "cpu")


def _start(W0: Tensor | None, W1: Tensor) -> Tensor:
    return W1 if W0 is None or W0.shape != W1.shape else W0
