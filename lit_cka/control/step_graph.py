"""The autograd graph of one step, cut into sections at the ends of blocks: `StepGraph`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

BEHIND = -1  # the section of what no block's output depends on


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists and mappings (so in the outputs of transformers' models)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def nodes_of(value: Any) -> list[Any]:
    """Returns the nodes of the autograd graph that the tensors in a value come from."""
    return [tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None]


class StepGraph:
    """What each block's output depends on, beyond what the outputs of blocks before it depend on.

    Section i holds the nodes that the output of block i depends on and the outputs of earlier blocks do not. Sections
    are to be added in order, and at last what is behind them, by the loss.

    Attributes:
        section_of: of each node, the section that it is in.
        last_use: of each parameter, by id, the last section that uses it itself; `BEHIND` for what is behind all.
        shortcuts: numbers of blocks that something behind them passes by: it depends on what was computed before the
            block ended, other than through what the block returns.
        unlinked: numbers of blocks whose output does not depend on the output of the block before.
        recomputes: whether there are nodes of reentrant checkpointing.
    """

    def __init__(self) -> None:
        self.section_of: dict[Any, int] = {}
        self.last_use: dict[int, int] = {}
        self.shortcuts: set[int] = set()
        self.unlinked: set[int] = set()
        self.recomputes = False
        self._outputs: list[set[Any]] = []

    def add_block(self, nodes: Iterable[Any]) -> None:
        """Add the section of the next block, which returned tensors that come from these nodes."""
        number, outputs = len(self._outputs), set(nodes)
        self._outputs.append(outputs)
        touched = self._walk(outputs, number)
        before = self._outputs[number - 1] if number else set()
        if before and outputs and not (before & (touched | outputs)):
            self.unlinked.add(number)

    def add_rest(self, nodes: Iterable[Any]) -> None:
        """Add what is behind the blocks: what the loss depends on, which comes from these nodes."""
        self._walk(set(nodes), BEHIND)

    def _walk(self, start: set[Any], section: int) -> set[Any]:
        """Put into a section what these nodes depend on, as far as it is in none; return what was met in others."""
        waiting, touched = [node for node in start if node not in self.section_of], set()
        self.section_of.update(dict.fromkeys(waiting, section))
        while waiting:
            node = waiting.pop()
            self.recomputes = self.recomputes or type(node).__name__ == "CheckpointFunctionBackward"
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if (leaf := getattr(following, "variable", None)) is not None:
                    self.last_use[id(leaf)] = section
                    continue
                earlier = self.section_of.get(following)
                if earlier is None:
                    self.section_of[following] = section
                    waiting.append(following)
                elif earlier != section:
                    touched.add(following)
                    self._note_shortcut(following, earlier, section)
        return touched

    def _note_shortcut(self, node: Any, earlier: int, section: int) -> None:
        """Note which ends of blocks an edge from a section to a node of an earlier one passes by."""
        end = len(self._outputs) if section == BEHIND else section
        first = earlier + 1 if node in self._outputs[earlier] else earlier
        self.shortcuts.update(range(first, end))
