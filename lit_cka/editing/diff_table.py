"""A comparison of checkpoints as a table for people, a row for each tensor: `diff_columns`, `diff_rows`."""

from __future__ import annotations

from collections.abc import Sequence

from lit_cka.editing.tensor_diff import KINDS, Diff, TensorDiff
from lit_cka.plots.table_page import Cell, Column

_NAME = Column("tensor", "The name of the tensor, without the prefixes of wrappers.")
_SHAPE = Column("shape", "Its shape; where checkpoints differ, that in each of them.")
_TYPE = Column("type", "The type of its numbers; where checkpoints differ, that in each of them.")
_COSINE = Column(
    "cosine", "Of the updates to B and to C: 1 the same direction, 0 unrelated, -1 opposite.", numeric=True
)
_LARGEST_RANK = Column("largest rank", "What a rank can be at most: the smaller side of the matrix.", numeric=True)
_EFFECTIVE_RANK = (
    "How many directions the update amounts to: exp of the entropy of its singular values, as shares of their sum. "
    "Tensors of more than two dimensions are read as matrices (first, rest)."
)
_STABLE_RANK = "The squared Frobenius norm of the update over its largest singular value squared."
_OF_A_CHECKPOINT = ("kind", "relative_change", "effective_rank", "stable_rank")
_NOTE = Column("note", "What else there is to know.", wide=True)


def diff_columns(found: Diff) -> list[Column]:
    """Returns the columns; those of numbers once for each checkpoint."""
    kinds = "; ".join(f"{kind}: {said}" for kind, said in KINDS.items())
    columns = []
    for label in found.labels:
        of = f", {label}" if len(found.labels) > 1 else ""
        columns += [
            Column(f"kind{of}", f"How {label} differs from A. {kinds}.", choices=True),
            Column(f"relative change{of}", "||W - W0|| / ||W0||, Frobenius norms, with W0 in A.", numeric=True),
            Column(f"effective rank{of}", _EFFECTIVE_RANK, numeric=True),
            Column(f"stable rank{of}", _STABLE_RANK, numeric=True),
        ]
    return [_NAME, *columns, _LARGEST_RANK, *([_COSINE] if len(found.labels) > 1 else []), _SHAPE, _TYPE, _NOTE]


def diff_rows(found: Diff) -> list[list[Cell]]:
    """Returns a cell for each of `diff_columns`, for each tensor that any of the checkpoints has."""
    sides = [{each["name"]: each for each in tensors} for tensors in found.tensors]
    names = dict.fromkeys(name for side in sides for name in side)
    rows = []
    for name in names:
        records = [side.get(name) for side in sides]
        there = [record for record in records if record is not None]
        row: list[Cell] = [name]
        for record in records:
            row += [None if record is None else record[key] for key in _OF_A_CHECKPOINT]  # type: ignore[literal-required]
        row.append(next((each["full_rank"] for each in there if each["full_rank"]), None))
        row += [found.cosines.get(name)] if len(sides) > 1 else []
        row += [_by_checkpoint(found, there, records, key) for key in ("shape", "dtype")]
        rows.append([*row, _note(found, records)])
    return rows


def _by_checkpoint(found: Diff, there: Sequence[TensorDiff], records: Sequence[TensorDiff | None], key: str) -> str:
    """Returns the shape or type, once if it is the same in all that have it."""
    values = {"A": there[0][f"base_{key}"]}  # type: ignore[literal-required]
    values |= {label: record and record[key] for label, record in zip(found.labels, records, strict=True)}  # type: ignore[literal-required]
    said = {label: _text(value) for label, value in values.items() if value is not None}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{label}: {text}" for label, text in said.items())


def _text(value: list[int] | str) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value)) or "scalar"


def _note(found: Diff, records: Sequence[TensorDiff | None]) -> str:
    notes = {label: _notes(record, label) for label, record in zip(found.labels, records, strict=True) if record}
    if len(set(map(tuple, notes.values()))) == 1:
        notes = {"": next(iter(notes.values()))}
    return "; ".join(f"{label}: {said}" if label else said for label, each in notes.items() for said in each)


def _notes(record: TensorDiff, label: str) -> list[str]:
    said = [f"tied to {record['tied_to']}"] if record["tied_to"] is not None else []
    said += [record["note"]] if record["note"] is not None else []
    for where, number in (("A", record["base_num_not_finite"]), (label, record["num_not_finite"])):
        said += [f"{number} of its elements in {where} are NaN or infinite"] if number else []
    return said
