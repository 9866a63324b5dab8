"""The edits of a study, by the names they are to have, and the shrinkage that each is compared with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_cka.editing.edits import EDITS, Edit, edit_weights, named_edits
from lit_cka.editing.parameter import EDITED, edit_parameter
from lit_cka.editing.settings import EditSettings
from lit_cka.functional.edits import wise_ft
from lit_cka.parallel.devices import widest_float

BASELINES = ("pretrained", "finetuned")


@dataclass(frozen=True)
class StudyEdit:
    """One edit of a study.

    Attributes:
        label: what it is called in the study.
        settings: which parameters take part, and how MonoSoup splits.
        edit: what is done to each weight; a name of `EDITED` for MonoSoup's variants.
    """

    label: str
    settings: EditSettings
    edit: Edit | str

    @property
    def wants_depth(self) -> bool:
        """Whether it goes by the depth of a weight's block."""
        return isinstance(self.edit, Edit) and self.edit.wants("depth")

    def weights(
        self,
        W0: Mapping[str, Tensor],
        W1: Mapping[str, Tensor],
        *,
        parameters: Collection[str],
        depths: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the edited weights of a whole model, one after the other on all threads of torch.

        Args:
            W0: pretrained weights by name.
            W1: fine-tuned weights by name; what is left alone is of the result as it is.
            parameters: names of those that MonoSoup may edit, without buffers.
            depths: of the weights in blocks, from 0 to 1.
        """
        if isinstance(self.edit, Edit):
            return edit_weights(W0, W1, self.edit, depths=depths, settings=self.settings)
        edited = dict(W1)
        for name in parameters:
            values, _ = edit_parameter(name, W0.get(name), W1[name], self.settings, (self.edit,))
            edited[name] = values[self.edit]
        return edited


def study_edits(
    edits: Mapping[str, Mapping[str, Any] | None], settings: EditSettings, alphas: Sequence[float] = ()
) -> dict[str, StudyEdit]:
    """Returns the edits by their labels.

    Args:
        edits: options by label; under "edit" which edit it is, where that is not the label: one of MonoSoup's variants,
            with options as of `EditSettings`, or as for `lit_cka.editing.Edit`.
        settings: what edits have in common, unless their options say otherwise.
        alphas: one edit "wise_ft_<alpha>" for each.

    Raises:
        ValueError: if there is none, no edit has the name (the nearest is shown), an option is of another edit, or a
            label is taken.
    """
    of_monosoup, others = {}, {}
    for label, options in edits.items():
        if label in BASELINES:
            raise ValueError(f"Expected labels of edits in `edits`, but {label!r} is what they are compared with.")
        if not isinstance(options, Mapping | None):
            raise ValueError(f"Expected options of the edit {label!r} by name, but got {options!r}.")
        given = dict(options or {})
        name = given.pop("edit", label)
        if name in EDITED:
            of_monosoup[label] = StudyEdit(label, _settings(name, settings, given), name)
        else:
            others[label] = {"edit": name, **given}
    named = named_edits(others, alphas=alphas)
    found = {**of_monosoup, **{label: StudyEdit(label, settings, edit) for label, edit in named.items()}}
    for label, edit in found.items():
        if isinstance(edit.edit, Edit) and edit.edit.wants("others"):
            raise ValueError(f"Expected edits of one model in `edits`, but {label!r} takes several.")
    if not found:
        raise ValueError("Expected at least one edit in `edits`, but there is none.")
    return {label: found[label] for label in [*edits, *(label for label in found if label not in edits)]}


def _settings(name: str, common: EditSettings, given: Mapping[str, Any]) -> EditSettings:
    """Returns MonoSoup's settings with the options given."""
    has = {each.name: getattr(common, each.name) for each in fields(EditSettings)}
    unknown = sorted(set(given) - set(has))
    if unknown:
        of_others = [other for other in EDITS if _takes(other, unknown[0])]
        hint = f" {unknown[0]!r} is an option of {' and '.join(of_others)}." if of_others else ""
        shown = ", ".join(map(repr, has))
        raise ValueError(f"Expected options of the edit {name!r} ({shown}), but got {unknown[0]!r}.{hint}")
    return EditSettings(**{**has, **given})


def _takes(name: str, option: str) -> bool:
    import inspect

    return option in inspect.signature(EDITS[name].function).parameters


class Shrunk(NamedTuple):
    """The shrinkage that an edit is compared with."""

    weights: dict[str, Tensor]
    kept: float  # norm of the edited model's update over that of the fine-tuned one's; NaN where that is 0
    is_same: bool  # whether it is the edit: then that is a shrinkage itself


def shrunk_alike(W0: Mapping[str, Tensor], W1: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> Shrunk:
    """Returns the fine-tuned weights, each one's update scaled to the norm that an edit leaves it.

        W_null = W0 + (||W_edited - W0|| / ||W1 - W0||) (W1 - W0)

    For MonoSoup this is the edit `shrink`. It is as large as the edit, weight by weight, and knows nothing of
    directions, elements or spectra: what an edit is worth beyond it comes from what the edit chooses.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name.
        edited: edited weights of the names of `W1`; where they are the fine-tuned ones, so is the result.
    """
    null, is_same = {}, True
    all_kept, all_of_it = [0.0], [0.0]
    for name, W in edited.items():
        start, end = W0.get(name), W1[name]
        null[name] = W
        if start is None or start.shape != end.shape or not end.is_floating_point() or not start.is_floating_point():
            continue
        sizes = [_distance(value, start) for value in (W, end)]
        all_kept.append(sizes[0] ** 2)
        all_of_it.append(sizes[1] ** 2)
        if W is end or not sizes[1]:
            continue
        null[name] = wise_ft(start, end, alpha=sizes[0] / sizes[1])
        # Each of the two was rounded to the weights' dtype.
        rounding = torch.finfo(end.dtype).eps * (_size(start) + _size(end))
        is_same = is_same and _distance(W, null[name]) <= rounding
    kept, all_of = math.fsum(all_kept), math.fsum(all_of_it)
    return Shrunk(null, math.sqrt(kept / all_of) if all_of else math.nan, is_same)


def _size(W: Tensor) -> float:
    return float(torch.linalg.vector_norm(W, dtype=widest_float(W.device)))


def _distance(W: Tensor, start: Tensor) -> float:
    dtype = torch.promote_types(W.dtype, torch.float32)
    return _size(W.to(dtype) - start.to(dtype))
