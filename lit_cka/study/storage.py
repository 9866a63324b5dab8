"""What a study has found out about one checkpoint, as one file that is written whole: `CheckpointResult`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lit_cka.files import file_name, written_whole

_FORMAT = "1"


@dataclass
class SetResult:
    """Which samples of a test set each variant gets right.

    Attributes:
        name: of the test set.
        metric: what being right means: "top1", "choice_accuracy" or "exact_match".
        right: (variants, samples), 0 or 1.
        groups: of each sample, what it was made from (samples,); None where it is one by itself.
        digest: of all inputs and labels in their order, to see that other checkpoints have the same; None where it
            can't be told.
        absent: classes that no sample has a label of; None where the classes aren't known.
    """

    name: str
    metric: str
    right: NDArray[np.uint8]
    groups: NDArray[np.int64] | None = None
    digest: str | None = None
    absent: list[int] | None = None


@dataclass
class CheckpointResult:
    """What there is of one checkpoint.

    Attributes:
        name: of the checkpoint.
        identity: see `Checkpoint.identity`.
        variants: what was evaluated: "pretrained", "finetuned", edits, and the shrinkage beside each.
        sets: the test sets, the one in-distribution first.
        edits: by edit: "seconds" and "mebibytes" that it took, "kept", the share of the update's norm that it leaves,
            and "is_scaling", whether it is a shrinkage itself.
        seconds: that the evaluation of all variants took.
    """

    name: str
    identity: list[int]
    variants: list[str]
    sets: list[SetResult]
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, folder: Path) -> Path:
        """Write the file, of a bit for each sample and variant; returns its path."""
        arrays: dict[str, NDArray[Any]] = {}
        sets = []
        for number, each in enumerate(self.sets):
            arrays[f"right.{number}"] = np.packbits(each.right, axis=1)
            if each.groups is not None:
                arrays[f"groups.{number}"] = each.groups
            kept = {"name": each.name, "metric": each.metric, "digest": each.digest, "absent": each.absent}
            sets.append({**kept, "num_samples": each.right.shape[1]})
        said = {**asdict(self), "sets": sets}
        path = result_path(folder, self.name)
        with written_whole(path, durable=True) as partial:
            save_file(arrays, partial, metadata={"format": _FORMAT, "result": json.dumps(said)})
        return path


def result_path(folder: Path, name: str) -> Path:
    """Returns where the result of a checkpoint of this name is: names that look alike have different ones."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return folder / f"{file_name(name)}-{digest}.safetensors"


def load_result(path: Path) -> CheckpointResult:
    """Returns what `CheckpointResult.save` has written.

    Raises:
        ValueError: if the file is damaged, or no such file.
    """
    try:
        with safe_open(path, "numpy") as file:
            said, held = json.loads(file.metadata()["result"]), set(file.keys())
            sets = [
                SetResult(
                    each["name"],
                    each["metric"],
                    np.unpackbits(file.get_tensor(f"right.{number}"), axis=1, count=each["num_samples"]),
                    file.get_tensor(f"groups.{number}") if f"groups.{number}" in held else None,
                    each["digest"],
                    each["absent"],
                )
                for number, each in enumerate(said["sets"])
            ]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be the result of a checkpoint, but it is damaged ({error}). Remove it, and run "
            "the study again, which makes it anew."
        ) from error
    return CheckpointResult(**{**said, "sets": sets})


def require_same_samples(results: Sequence[CheckpointResult]) -> None:
    """Raise a ValueError unless all checkpoints have met the same samples in the same order, in the same test sets."""
    first = results[0]
    for other in results[1:]:
        if [each.name for each in other.sets] != [each.name for each in first.sets]:
            raise ValueError(
                f"Expected the same test sets for all checkpoints, but {first.name!r} has "
                f"{[each.name for each in first.sets]} and {other.name!r} {[each.name for each in other.sets]}."
            )
        for a, b in zip(first.sets, other.sets, strict=True):
            if a.right.shape[1] != b.right.shape[1] or a.digest != b.digest:
                raise ValueError(
                    f"Expected the same samples in the same order for all checkpoints, but those of {a.name!r} differ "
                    f"between {first.name!r} and {other.name!r}: are they shuffled or changed at random, or have the "
                    "data changed since? Pairs of other samples would say nothing."
                )
