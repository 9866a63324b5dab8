"""MonoSoup on whole models: state dicts in, the five variants and a record of every parameter out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.spectral import RankRule, check_rule, spectral_split
from lit_cka.progress import progress_bar

VARIANTS = ("pretrained", "finetuned", "monosoup", "highonly", "lowonly")
EDITED = VARIANTS[2:]


class ParameterRecord(TypedDict):
    """What the edit did to one parameter. The numbers are None where it was left alone, and `reason` says why."""

    name: str
    shape: list[int]
    reason: str | None
    k: int | None
    rank: int | None  # number of singular values, min(out, rest)
    energy: float | None  # P_k
    rho: float | None
    lambda_high: float | None
    lambda_low: float | None
    relative_change: float | None  # ||W1 - W0||_F / ||W0||_F


Edit: TypeAlias = "tuple[dict[str, Tensor], ParameterRecord]"


@dataclass(frozen=True)
class EditSettings:
    """How weights are split.

    Args:
        rule: "effective_rank" (alias "freevariance", "vetterli") or "energy" (alias "variance").
        R: share of the energy that the high part reaches, in (0, 1]; for "energy" alone.
        min_rel_update: weights with a smaller relative change keep their fine-tuned value.

    Raises:
        ValueError: if a setting is out of its range.
    """

    rule: RankRule = "effective_rank"
    R: float = 0.8
    min_rel_update: float = 1e-6

    def __post_init__(self) -> None:
        check_rule(self.rule, self.R)
        if not self.min_rel_update >= 0:
            raise ValueError(f"Expected `min_rel_update` to be at least 0, but got {self.min_rel_update}.")


def edit_parameter(
    name: str, W0: Tensor | None, W1: Tensor, settings: EditSettings, variants: Sequence[str] = EDITED
) -> tuple[dict[str, Tensor], ParameterRecord]:
    """The edited values of one parameter, and what was done.

    Args:
        name: of the parameter.
        W0: pretrained value; None if the pretrained model has none.
        W1: fine-tuned value.
        settings: how to split.
        variants: which of "monosoup", "highonly" and "lowonly".

    Returns:
        A tensor per variant: `W1` itself, not a copy, where the parameter is left alone (one-dimensional, no floating
        point, unchanged, missing from the pretrained model or of another shape there).

    Raises:
        ValueError: if the weights hold NaN or infinity; the message names the parameter.
    """
    record = _untouched(name, W1)
    for W, model in ((W0, "pretrained"), (W1, "fine-tuned")):
        if W is not None and W.is_floating_point() and not bool(torch.isfinite(W).all()):
            raise ValueError(f"Expected finite weights, but {name!r} of the {model} model holds NaN or infinity.")
    record["reason"] = reason = _why_left_alone(W0, W1)
    if reason is None:
        assert W0 is not None
        split = spectral_split(W0, W1, rule=settings.rule, R=settings.R, min_rel_update=settings.min_rel_update)
        if isinstance(split, float):
            record["relative_change"] = split
            record["reason"] = "unchanged" if split == 0 else f"relative change below {settings.min_rel_update:g}"
        else:
            energy, rho, high, low = split.coefficients
            record.update(
                {
                    "k": split.rank,
                    "rank": split.num_singular_values,
                    "energy": energy,
                    "rho": rho,
                    "lambda_high": high,
                    "lambda_low": low,
                    "relative_change": split.relative_change,
                }
            )
            weights = {"monosoup": (high, low), "highonly": (1.0, 0.0), "lowonly": (0.0, 1.0)}
            edited = split.edited_weights(W0, W1, [weights[variant] for variant in variants])
            return dict(zip(variants, edited, strict=True)), record
    return dict.fromkeys(variants, W1), record


def _untouched(name: str, W1: Tensor) -> ParameterRecord:
    return ParameterRecord(
        name=name, shape=list(W1.shape), reason=None, k=None, rank=None, energy=None, rho=None, lambda_high=None,
        lambda_low=None, relative_change=None,
    )  # fmt: skip


def _why_left_alone(W0: Tensor | None, W1: Tensor) -> str | None:
    if not W1.is_floating_point() or (W0 is not None and not W0.is_floating_point()):
        return "not floating point"
    if W1.ndim < 2:
        return "fewer than two dimensions"
    if W1.numel() == 0:
        return "empty"
    if W0 is None:
        return "not in the pretrained model"
    if W0.shape != W1.shape:
        return f"shape {tuple(W0.shape)} in the pretrained model"
    return None


def edit_cost(shape: Sequence[int]) -> float:
    """About how long the edit of a weight takes, in arbitrary units: to share weights out evenly."""
    if len(shape) < 2 or 0 in shape:
        return 0.0
    rest = 1
    for size in shape[1:]:
        rest *= size
    small, large = sorted((shape[0], rest))
    return 9.0 * small**3 + 4.0 * small**2 * large + 100.0 * small * large


@dataclass
class EditedModel:
    """State dicts by variant, which share the tensors that are the same, and a record per parameter."""

    variants: dict[str, dict[str, Tensor]]
    records: list[ParameterRecord]


def edit_state_dicts(
    W0: Mapping[str, Tensor],
    W1: Mapping[str, Tensor],
    settings: EditSettings | None = None,
    *,
    parameters: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> EditedModel:
    """The five variants of a fine-tuned model.

    On a CPU, several weights are edited at once, each on one thread, so that the result doesn't depend on the number
    of threads. Where `torch.distributed` is initialised, the ranks share the weights out by cost, and all get all.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name. Entries that are the same tensor (tied) are edited once.
        settings: how to split; None for the defaults.
        parameters: names that may be edited; None for all. Others (buffers) keep their fine-tuned value.
        device: where to compute; None for where the weights are. The result is where the weights are.
        place: given every edited tensor, returns the one to keep; see `FileBacked`.
        progress: show a progress bar.

    Returns:
        The variants "pretrained", "finetuned", "monosoup", "highonly", "lowonly", with the names of `W1`; what the
        pretrained model lacks or has in another shape is fine-tuned in "pretrained", too.

    Raises:
        ValueError: if weights hold NaN or infinity.
    """
    settings = settings or EditSettings()
    editable = set(W1) if parameters is None else set(parameters)
    first_name: dict[tuple[object, ...], str] = {}
    tied = {name: first_name.setdefault(_identity(value), name) for name, value in W1.items()}
    names = sorted(dict.fromkeys(tied.values()), key=lambda name: -edit_cost(W1[name].shape))

    def edit(name: str) -> Edit:
        if name not in editable:
            return dict.fromkeys(EDITED, W1[name]), {**_untouched(name, W1[name]), "reason": "not a parameter"}
        start, end = W0.get(name), W1[name]
        if device is None or not end.is_floating_point():
            values, record = edit_parameter(name, start, end, settings)
        else:
            there = edit_parameter(name, None if start is None else start.to(device), end.to(device), settings)
            values, record = {variant: value.to(end.device) for variant, value in there[0].items()}, there[1]
        if record["reason"] is not None:
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
    records: list[ParameterRecord] = []
    for name in W1:
        record = edited[tied[name]][1]
        records.append(record if tied[name] == name else {**record, "name": name, "reason": f"tied to {tied[name]}"})
    return EditedModel(variants, records)


def share_out(costs: Sequence[float], num_ranks: int) -> list[int]:
    """A rank for each piece of work, so that all have about as much: the costliest first, to who has least."""
    loads, owners = [0.0] * num_ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[index]] += costs[index] + 1.0
    return owners


def _on_all_ranks(
    edit: Callable[[str], Edit],
    names: Sequence[str],
    W1: Mapping[str, Tensor],
    place: Callable[[Tensor], Tensor] | None,
    device: torch.device | str | None,
    progress: bool,
) -> list[Edit]:
    """`edit` of each name, done once among the ranks and known to all."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    owners = share_out([edit_cost(W1[name].shape) for name in names], num_ranks)
    own = [name for name, owner in zip(names, owners, strict=True) if owner == rank]
    done: dict[str, Edit] = {}
    problem: ValueError | None = None
    on_cpu = device is None and all(value.device.type == "cpu" for value in W1.values())
    try:
        with progress_bar("Editing", len(own), enabled=progress) as advance:
            for name, result in zip(own, one_thread_each(edit, own, enabled=on_cpu), strict=True):
                done[name] = result
                advance(1)
    except ValueError as error:
        problem = error
    if not distributed:
        if problem is not None:
            raise problem
        return [done[name] for name in names]
    # An error on one rank is one on all: the others would wait for its weights.
    said: list[tuple[str | None, dict[str, ParameterRecord]]] = [(None, {})] * num_ranks
    dist.all_gather_object(said, (None if problem is None else str(problem), {name: done[name][1] for name in done}))
    problems = [message for message, _ in said if message is not None]
    if problems:
        raise ValueError(problems[0])
    for name, owner in zip(names, owners, strict=True):
        record = said[owner][1][name]
        if record["reason"] is not None:
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


def _start(W0: Tensor | None, W1: Tensor) -> Tensor:
    return W1 if W0 is None or W0.shape != W1.shape else W0


def _identity(value: Tensor) -> tuple[object, ...]:
    """The same for tensors that are one in memory."""
    return value.data_ptr() or id(value), value.shape, value.stride(), value.dtype, value.device


Result = TypeVar("Result")


def one_thread_each(function: Callable[[str], Result], names: Sequence[str], *, enabled: bool) -> Iterator[Result]:
    """`map(function, names)`, on as many cores as torch may use, with one thread for each call."""
    if not enabled:
        yield from map(function, names)
        return
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(function, names)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)  # parts of it are global
