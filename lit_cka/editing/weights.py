"""MonoSoup on whole models: state dicts in, the five variants and a record of every parameter out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import torch
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
    record = ParameterRecord(
        name=name, shape=list(W1.shape), reason=None, k=None, rank=None, energy=None, rho=None, lambda_high=None,
        lambda_low=None, relative_change=None,
    )  # fmt: skip
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


def _why_left_alone(W0: Tensor | None, W1: Tensor) -> str | None:
    if not W1.is_floating_point():
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
    progress: bool = False,
) -> EditedModel:
    """The five variants of a fine-tuned model.

    On a CPU, several weights are edited at once, each on one thread, so that the result doesn't depend on the number
    of threads.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name. Entries that are the same tensor (tied) are edited once.
        settings: how to split; None for the defaults.
        parameters: names that may be edited; None for all. Others (buffers) keep their fine-tuned value.
        device: where to compute; None for where the weights are. The result is where the weights are.
        progress: show a progress bar.

    Returns:
        The variants "pretrained", "finetuned", "monosoup", "highonly", "lowonly", with the names of `W1`; what the
        pretrained model lacks or has in another shape is fine-tuned in "pretrained", too.

    Raises:
        ValueError: if weights hold NaN or infinity.
    """
    settings = settings or EditSettings()
    editable = set(W1) if parameters is None else set(parameters)
    own_name: dict[int, str] = {}
    tied = {name: own_name.setdefault(_identity(value), name) for name, value in W1.items()}
    names = sorted(dict.fromkeys(tied.values()), key=lambda name: -edit_cost(W1[name].shape))

    def edit(name: str) -> tuple[dict[str, Tensor], ParameterRecord]:
        if name not in editable:
            values, record = edit_parameter(name, None, W1[name], settings)
            return values, {**record, "reason": "not a parameter"}
        if device is None or not W1[name].is_floating_point():
            return edit_parameter(name, W0.get(name), W1[name], settings)
        start = W0.get(name)
        values, record = edit_parameter(
            name, None if start is None else start.to(device), W1[name].to(device), settings
        )
        if record["reason"] is not None:
            return dict.fromkeys(EDITED, W1[name]), record
        return {variant: value.to(W1[name].device) for variant, value in values.items()}, record

    on_cpu = device is None and all(value.device.type == "cpu" for value in W1.values())
    edited: dict[str, tuple[dict[str, Tensor], ParameterRecord]] = {}
    with progress_bar("Editing", len(names), enabled=progress) as advance:
        for name, result in zip(names, one_thread_each(edit, names, enabled=on_cpu), strict=True):
            edited[name] = result
            advance(1)
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


def _start(W0: Tensor | None, W1: Tensor) -> Tensor:
    return W1 if W0 is None or W0.shape != W1.shape else W0


def _identity(value: Tensor) -> int:
    """The same for tensors that are one in memory."""
    return hash((value.data_ptr() or id(value), value.shape, value.stride(), value.dtype, value.device))


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
