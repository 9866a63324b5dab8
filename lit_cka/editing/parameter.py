"""MonoSoup of one parameter: its edited values, and a record of what was done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from lit_cka.editing.settings import EditSettings
from lit_cka.functional.spectral import spectral_split

VARIANTS = ("pretrained", "finetuned", "monosoup", "highonly", "lowonly")
EDITED = VARIANTS[2:]
QUANTISED = "part of quantised weights"  # a reason to leave a parameter alone: scales, zeros and the numbers they scale
OTHER_SET = "of another set of weights"  # in the same file
AS_PRETRAINED, AS_FINETUNED = "kept as pretrained", "kept as fine-tuned"  # as the settings say
_CHUNK = 2**22  # elements that are looked at at a time


class ParameterRecord(TypedDict):
    """What the edit did to one parameter. The numbers are None where it was left alone, and `reason` says why.

    Example:
        >>> import torch
        >>> from lit_cka.editing import edit_state_dicts
        >>> (record,) = edit_state_dicts({"fc.bias": torch.zeros(4)}, {"fc.bias": torch.ones(4)}).records
        >>> record["lambda_low"], record["reason"]
        (None, 'fewer than two dimensions')
    """

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
    kept: float | None  # ||W - W0||_F / ||W1 - W0||_F of the edited weight W; of several variants, of the first


Edited: TypeAlias = "tuple[dict[str, Tensor], ParameterRecord]"


def edit_parameter(
    name: str,
    W0: Tensor | None,
    W1: Tensor,
    settings: EditSettings,
    variants: Sequence[str] = EDITED,
    *,
    overwrite: bool = False,
) -> tuple[dict[str, Tensor], ParameterRecord]:
    """Returns the edited values of one parameter, and what was done.

    Args:
        name: of the parameter.
        W0: pretrained value; None if the pretrained model has none.
        W1: fine-tuned value.
        settings: how to split.
        variants: which of "monosoup", "highonly" and "lowonly".
        overwrite: the last variant may take the memory of `W1`, whose value is lost.

    Returns:
        A tensor per variant: `W1` itself, not a copy, where the parameter is left alone (one-dimensional, no floating
        point, unchanged, missing from the pretrained model or of another shape there).

    Raises:
        ValueError: if the weights hold NaN or infinity; the message names the parameter.
    """
    kept = kept_as_it_is(name, W0, W1, settings)
    if kept is not None:
        return dict.fromkeys(variants, kept[0]), kept[1]
    record = untouched(name, W1.shape)
    record["reason"] = reason = why_left_alone(W0, W1)
    if reason is None:
        assert W0 is not None
        try:
            split = spectral_split(W0, W1, rule=settings.rule, R=settings.R, min_rel_update=settings.min_rel_update)
        except ValueError:
            check_finite(name, W0, W1)  # which says where it is not
            raise
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
            first = weights[variants[0]]
            record["kept"] = math.sqrt(first[0] ** 2 * energy + first[1] ** 2 * (1 - energy))
            edited = split.edited_weights(W0, W1, [weights[variant] for variant in variants], overwrite=overwrite)
            return dict(zip(variants, edited, strict=True)), record
    else:
        check_finite(name, W0, W1)
    return dict.fromkeys(variants, W1), record


def kept_as_it_is(
    name: str, W0: Tensor | None, W1: Tensor, settings: EditSettings
) -> tuple[Tensor, ParameterRecord] | None:
    """Returns the pretrained or the fine-tuned value of a parameter that is not to be edited, and its record; None of
    others. What the pretrained model lacks, or has in another shape, is fine-tuned.
    """
    fate = settings.fate(name)
    if fate is None:
        return None
    can_be = W0 is not None and W0.shape == W1.shape and W0.is_floating_point() == W1.is_floating_point()
    if fate == "pretrained" and can_be:
        assert W0 is not None
        return W0.to(W1.dtype), untouched(name, W1.shape, AS_PRETRAINED)
    return W1, untouched(name, W1.shape, AS_FINETUNED)


def is_changed(record: ParameterRecord) -> bool:
    """Returns whether a parameter is another one than the fine-tuned."""
    return record["reason"] in (None, AS_PRETRAINED)


def untouched(name: str, shape: Sequence[int], reason: str | None = None) -> ParameterRecord:
    """Returns a record without numbers."""
    return ParameterRecord(
        name=name, shape=list(shape), reason=reason, k=None, rank=None, energy=None, rho=None, lambda_high=None,
        lambda_low=None, relative_change=None, kept=None,
    )  # fmt: skip


def in_order(tied: Mapping[str, str], records: Mapping[str, ParameterRecord]) -> list[ParameterRecord]:
    """Returns a record for every name of `tied`, in that order: for a tied tensor that of its first name."""
    return [
        records[name] if first == name else {**records[first], "name": name, "reason": f"tied to {first}"}
        for name, first in tied.items()
    ]


def check_finite(name: str, W0: Tensor | None, W1: Tensor) -> None:
    """Raise a ValueError that names the parameter if its weights hold NaN or infinity."""
    for W, model in ((W0, "pretrained"), (W1, "fine-tuned")):
        if W is not None and W.is_floating_point() and not _is_finite(W):
            raise ValueError(f"Expected finite weights, but {name!r} of the {model} model holds NaN or infinity.")


def _is_finite(W: Tensor) -> bool:
    """Returns whether all elements are finite, by parts: of a tensor that fills the memory, a mask is large."""
    parts = W.detach().reshape(-1).split(_CHUNK) if W.is_contiguous() else (W,)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def why_left_alone(W0: Tensor | None, W1: Tensor, *, of_matrices: bool = True) -> str | None:
    """Returns why a parameter can't be edited, by an edit of matrices alone or of any weight; None if it can."""
    if not W1.is_floating_point() or (W0 is not None and not W0.is_floating_point()):
        return "not floating point"
    if W1.dtype.itemsize == 1 or (W0 is not None and W0.dtype.itemsize == 1):
        return "stored as 8-bit floats"  # whose scales are elsewhere, or that have too few digits for an edit
    if of_matrices and W1.ndim < 2:
        return "fewer than two dimensions"
    if W1.numel() == 0:
        return "empty"
    if W0 is None:
        return "not in the pretrained model"
    if W0.shape != W1.shape:
        return f"shape {tuple(W0.shape)} in the pretrained model"
    return None


def edit_cost(shape: Sequence[int]) -> float:
    """Returns about how long the edit of a weight takes, in arbitrary units: to share weights out evenly."""
    if len(shape) < 2 or 0 in shape:
        return 0.0
    rest = 1
    for size in shape[1:]:
        rest *= size
    small, large = sorted((shape[0], rest))
    return 9.0 * small**3 + 4.0 * small**2 * large + 100.0 * small * large
