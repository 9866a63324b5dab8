"""Which tensor of one model's files goes with which of another's, and where they differ: `Pairs`."""

from __future__ import annotations

from lit_cka.checkpoints.pickles import Weights
from lit_cka.checkpoints.quantised import quantised_names
from lit_cka.checkpoints.shards import TensorInfo
from lit_cka.editing.checks import difference_table


class Pairs:
    """The weights of two models, by the names that they have in their sets of weights; a tied weight under any of its.

    Args:
        W0: the pretrained model's.
        W1: the fine-tuned model's.
    """

    def __init__(self, W0: Weights, W1: Weights) -> None:
        self._W0, self._W1 = W0, W1
        self._plain = {name: plain for plain, name in W1.chosen.items()}
        self._same = _names_of_same(W0), _names_of_same(W1)

    def is_of_another_set(self, name: str) -> bool:
        """Whether a tensor of the fine-tuned model's files belongs to none of the weights that are meant."""
        return not any(other in self._plain for other in self._same[1][name])

    def before(self, name: str) -> str | None:
        """Returns the name of the pretrained tensor that goes with a fine-tuned one; None if there is none."""
        for other in self._same[1][name]:
            found = self._W0.chosen.get(self._plain[other]) if other in self._plain else None
            if found is not None:
                return found
        return None

    def quantised(self) -> set[str]:
        """Returns the names that the fine-tuned model has for tensors of weights that are quantised in either."""
        before = _quantised(self._W0)
        return _quantised(self._W1) | {name for name in self._W1.tensors if self.before(name) in before}

    def without_counterpart(self) -> list[str]:
        """Returns the names that the pretrained model has for weights of which the fine-tuned one has nothing."""
        plain_of = {name: plain for plain, name in self._W0.chosen.items()}
        return [
            plain
            for plain, name in self._W0.chosen.items()
            if not any(plain_of.get(other) in self._W1.chosen for other in self._same[0][name])
        ]

    def check(self, *, allow_differences: bool) -> int:
        """Returns the number of tensors in which the models differ.

        Raises:
            ValueError: with a table of them, if there are any and they aren't allowed, or if no tensor is in both.
        """
        rows = self._differences()
        table = difference_table(("tensor", "pretrained", "fine-tuned"), rows)
        shapes = {name: self._W0.tensors[found].shape for name in self._plain if (found := self.before(name))}
        if not any(self._W1.tensors[name].shape == shape for name, shape in shapes.items()):
            raise ValueError(
                f"Expected two models of one architecture, but no tensor has the same name and shape.\n{table}"
            )
        if rows and not allow_differences:
            raise ValueError(
                f"Expected two models of one architecture, but they differ in {len(rows)} tensors.\n{table}\n"
                "With `allow_differences=True` (`--allow_differences true`) those stay as they are in the fine-tuned "
                "model."
            )
        return len(rows)

    def _differences(self) -> list[tuple[str, str, str]]:
        rows = []
        for plain, name in self._W1.chosen.items():
            found = self.before(name)
            before = None if found is None else self._W0.tensors[found]
            if before is None or before.shape != self._W1.tensors[name].shape:
                rows.append((plain, _shape(before), _shape(self._W1.tensors[name])))
        for plain in self.without_counterpart():
            rows.append((plain, _shape(self._W0.tensors[self._W0.chosen[plain]]), "missing"))
        return rows


def _names_of_same(weights: Weights) -> dict[str, list[str]]:
    """Returns for each name all names of the same tensor, its own first."""
    names: dict[str, list[str]] = {}
    for name, first in weights.tied.items():
        names.setdefault(first, []).append(name)
    return {name: [name, *(other for other in names[first] if other != name)] for name, first in weights.tied.items()}


def _quantised(weights: Weights) -> set[str]:
    return quantised_names({name: (info.kind, len(info.shape)) for name, info in weights.tensors.items()})


def _shape(info: TensorInfo | None) -> str:
    return "missing" if info is None else str(info.shape)
