"""The edits there are, by name, and those that a user adds: `EDITS`, `Edit`, `edit_weights`."""

from __future__ import annotations

import difflib
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lit_cka.checkpoints.quantised import quantised_tensors
from lit_cka.editing.depths import depths_by_number
from lit_cka.editing.parameter import (
    EDITED,
    VARIANTS,
    ParameterRecord,
    check_finite,
    kept_as_it_is,
    untouched,
    why_left_alone,
)
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.shrinking import norms_of_update, shrink_factor
from lit_cka.functional import edits as functions

# `edit(W0, W1, **options)`: the edited weight, of the shape and dtype of `W1`; both are floating point. Of its options,
# `depth`, `others`, `seed` and `factor` are given to it if it has them, see `Place`.
EditFunction: TypeAlias = Callable[..., Tensor]


class Kind(NamedTuple):
    """An edit, and whether it is for weights of two or more dimensions alone."""

    function: EditFunction
    of_matrices: bool = False


# MonoSoup's three variants come from one split, see `edit_parameter`; all others are functions of one weight.
EDITS: dict[str, Kind] = {
    "wise_ft": Kind(functions.wise_ft),
    "lines": Kind(functions.lines),
    "trim": Kind(functions.trim),
    "dare": Kind(functions.dare),
    "dg_hard": Kind(functions.dg_hard, of_matrices=True),
    "shrink": Kind(functions.shrink, of_matrices=True),
    "shrink_global": Kind(functions.shrink_by, of_matrices=True),
    "uniform_soup": Kind(functions.uniform_soup),
}
NAMES = (*EDITED, *EDITS)
_GIVEN = ("depth", "others", "factor")  # by the model that is edited
_SEED = 0


class Place(NamedTuple):
    """What an edit may ask of the weight it is given, besides its value."""

    name: str
    depth: float | None = None  # of its block: 0 in the first, 1 in the last; None outside of blocks
    others: Sequence[Tensor] = ()  # the weight of other fine-tuned models
    factor: float = 1.0  # by which the whole update of the model is shrunk, see `shrink_factor`


@dataclass(frozen=True)
class Edit:
    """An edit and its options.

    Args:
        name: one of `NAMES` other than MonoSoup's variants, or the import path of an `EditFunction` of one's own,
            "package.module:function".
        options: of the function, by name. A `seed` differs from weight to weight, by their names.

    Raises:
        ValueError: if there is no such edit (the nearest is named), it has no such option, or lacks one.

    Example:
        >>> import torch
        >>> edit = Edit("wise_ft", {"alpha": 0.5})
        >>> edit(torch.zeros(2), torch.ones(2), Place("bias")).tolist()
        [0.5, 0.5]
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        has, needed = self._arguments()
        unknown = sorted(set(self.options) - has)
        if unknown:
            of_others = [name for name, kind in EDITS.items() if unknown[0] in _options(kind.function)[0]]
            hint = f" {unknown[0]!r} is an option of {' and '.join(of_others)}." if of_others else ""
            shown = ", ".join(map(repr, sorted(has))) or "none"
            raise ValueError(f"Expected options of the edit {self.name!r} ({shown}), but got {unknown[0]!r}.{hint}")
        missing = sorted(needed - set(self.options))
        if missing:
            raise ValueError(f"Expected a value of {missing[0]!r} for the edit {self.name!r}, which has no default.")

    @property
    def kind(self) -> Kind:
        """The function, and what it is for."""
        return EDITS[self.name] if self.name in EDITS else Kind(_imported(self.name))

    def _arguments(self) -> tuple[set[str], set[str]]:
        has, needed = _options(self.kind.function)
        return has - set(_GIVEN), needed - {*_GIVEN, "seed"}

    def wants(self, name: str) -> bool:
        """Returns whether the edit is to be given this by the model: "depth", "others" or "factor"."""
        return name in _options(self.kind.function)[0]

    def with_defaults(self, settings: EditSettings) -> Edit:
        """Returns the edit with MonoSoup's settings, where it has options of these names and they aren't given."""
        has = self._arguments()[0]
        common: dict[str, Any] = {name: value for name, value in settings.of_monosoup().items() if name in has}
        return Edit(self.name, {**common, **self.options})

    def __call__(self, W0: Tensor, W1: Tensor, place: Place) -> Tensor:
        """Returns the edited weight.

        Raises:
            ValueError: if the function gives a weight of another shape or dtype, or none.
        """
        function, options = self.kind.function, dict(self.options)
        has = _options(function)[0]
        options |= {name: getattr(place, name) for name in _GIVEN if name in has}
        if "seed" in has:
            options["seed"] = options.get("seed", _SEED) + zlib.crc32(place.name.encode())
        edited = function(W0, W1, **options)
        if not isinstance(edited, Tensor) or (edited.shape, edited.dtype) != (W1.shape, W1.dtype):
            got = f"{edited.dtype} of {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
            raise ValueError(
                f"Expected the edit {self.name!r} to give {W1.dtype} of {tuple(W1.shape)} for {place.name!r}, "
                f"but got {got}."
            )
        return edited

    def of_parameter(
        self, W0: Tensor | None, W1: Tensor, place: Place, settings: EditSettings
    ) -> tuple[Tensor, ParameterRecord]:
        """Returns one edited parameter and what was done: `W1` itself where it is left alone, and the record says why.

        Raises:
            ValueError: if the weights hold NaN or infinity; the message names the parameter.
        """
        kept = kept_as_it_is(place.name, W0, W1, settings)
        if kept is not None:
            return kept
        record = untouched(place.name, W1.shape)
        record["reason"] = reason = why_left_alone(W0, W1, of_matrices=self.kind.of_matrices)
        check_finite(place.name, W0, W1)
        if reason is not None:
            return W1, record
        assert W0 is not None
        edited = self.with_defaults(settings)(W0, W1, place)
        start = W0.to(torch.promote_types(W1.dtype, torch.float32))
        change, kept = (torch.linalg.vector_norm(W - start, dtype=torch.float64).item() for W in (W1, edited))
        size = torch.linalg.vector_norm(start, dtype=torch.float64).item()
        record["relative_change"] = change / size if size else float("inf") if change else 0.0
        record["kept"] = kept / change if change else None
        if not change:
            record["reason"] = "unchanged"
            return W1, record
        return edited, record


def named_edits(
    edits: Mapping[str, Mapping[str, Any]], lines: tuple[float, float] | None = None, alphas: Sequence[float] = ()
) -> dict[str, Edit]:
    """Returns the edits by the names of their variants.

    Args:
        edits: options by name; under "edit" which edit it is, if not that of the name.
        lines: `(alpha, beta)` of a variant "lines"; None for none.
        alphas: one variant "wise_ft_<alpha>" for each.

    Raises:
        ValueError: if a name is one of MonoSoup's or there twice, or as `Edit` does.
    """
    if len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
        raise ValueError(f"Expected different alphas in `wise_ft`, to six digits, but got {list(alphas)}.")
    found: dict[str, Edit] = {}
    for label, options in edits.items():
        given = dict(options or {})
        found[label] = Edit(given.pop("edit", label), given)
    others = {f"wise_ft_{alpha:g}": Edit("wise_ft", {"alpha": alpha}) for alpha in alphas}
    if lines is not None:
        others = {"lines": Edit("lines", {"alpha": lines[0], "beta": lines[1]}), **others}
    taken = [each for each in found if each in (*VARIANTS, "uniform_soup", *others) or each.startswith("wise_ft_")]
    if taken:
        raise ValueError(f"Expected names of further variants in `edits`, but {taken[0]!r} is another one already.")
    return {**found, **others}


def edit_weights(
    W0: Mapping[str, Tensor],
    W1: Mapping[str, Tensor],
    edit: Edit,
    *,
    depths: Mapping[str, float] | None = None,
    others: Sequence[Mapping[str, Tensor]] = (),
    settings: EditSettings | None = None,
) -> dict[str, Tensor]:
    """Returns the weights of a fine-tuned model, edited one by one.

    Args:
        W0: pretrained weights by name.
        W1: fine-tuned weights by name. What `W0` lacks, has in another shape, or holds as whole numbers, and quantised
            weights with their scales, stay as they are.
        edit: what to do.
        depths: of the weights in blocks, see `lit_cka.editing.depths`; None to read them from the names.
        others: weights of other fine-tuned models, of the same names.
        settings: which parameters take part, and MonoSoup's for `shrink`; None for the defaults.

    Raises:
        ValueError: if the edit is of several models, and there are no others; if it goes by depth, and no name tells
            it; or as `Edit.of_parameter` does.

    Example:
        >>> import torch
        >>> W0 = {"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}
        >>> W1 = {"fc.weight": torch.eye(4) + 0.1, "fc.bias": torch.ones(4)}
        >>> edit_weights(W0, W1, Edit("wise_ft", {"alpha": 0.5}))["fc.bias"].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    settings = settings or EditSettings()
    if edit.wants("others") and not others:
        raise ValueError(f"Expected other fine-tuned models for the edit {edit.name!r}, but there are none.")
    if edit.wants("depth") and depths is None:
        depths = depths_by_number(list(W1))
    factor = 1.0
    if edit.wants("factor"):
        pairs = ((W0.get(name), W1[name]) for name in W1 if settings.fate(name) is None)
        factor = shrink_factor([norms_of_update(*pair, settings) for pair in pairs])
    quantised = quantised_tensors(W0) | quantised_tensors(W1)
    edited = {}
    for name, value in W1.items():
        place = Place(name, (depths or {}).get(name), [other[name] for other in others], factor)
        edited[name] = value if name in quantised else edit.of_parameter(W0.get(name), value, place, settings)[0]
    return edited


def _options(function: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """Returns the names of the options of an edit, and those without a default."""
    parameters = list(inspect.signature(function).parameters.values())[2:]
    named = [each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return {each.name for each in named}, {each.name for each in named if each.default is each.empty}


def _imported(path: str) -> EditFunction:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(path, NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Expected an edit ({', '.join(NAMES)}) or the import path of one's own, such as "
            f"'package.module:function', but got {path!r}.{hint}"
        )
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected {path!r} to be the import path of an edit, but {error}.") from error
    if not callable(function) or len(inspect.signature(function).parameters) < 2:
        raise ValueError(f"Expected {path!r} to be a function of `W0` and `W1`, but it is {function!r}.")
    found: EditFunction = function
    return found
