"""What freezing one block after the other adds: `FreezePlan`."""

from __future__ import annotations

from typing import Any, NamedTuple


class BlockParts(NamedTuple):
    """What is frozen with a block, besides what was frozen with the blocks before it.

    Attributes:
        block: its name.
        parameters: names of the parameters that nothing behind the block uses; with those of the first block come
            what runs before it, such as embeddings or a stem.
        modules: names of the modules that have run by the end of the block, and run no more in the step.
        flops: that the forward of one batch takes from the end of the block before it, or from the first block's own
            beginning, to the end of this one.
        can_skip: whether nothing behind the block needs what was computed before it ended but for what it returns.
    """

    block: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    flops: int
    can_skip: bool


class FreezePlan(NamedTuple):
    """The blocks in the order in which they run, and what is frozen with each.

    Attributes:
        parts: of each block.
        flops_stem: that the forward of the same batch takes before the first block.
        flops_behind: that it takes behind the last block.
        num_samples: that the batch held; 0 if that can't be told.
        num_trained_behind: how many parameters with gradients are frozen with none of the blocks.
    """

    parts: tuple[BlockParts, ...]
    flops_stem: int
    flops_behind: int
    num_samples: int
    num_trained_behind: int

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(part.block for part in self.parts)

    @property
    def flops(self) -> int:
        """That the forward of a batch takes."""
        return self.flops_stem + self.flops_within(len(self.parts)) + self.flops_behind

    def flops_within(self, num_blocks: int) -> int:
        """That the forward of a batch takes within so many of the first blocks."""
        return sum(part.flops for part in self.parts[:num_blocks])

    def most_frozen(self, asked: int | None) -> int:
        """Returns how many blocks may be frozen at most: so that something is left to train.

        Args:
            asked: by the user; None for all blocks but the last.

        Raises:
            ValueError: if nothing would be left with the first block frozen.
        """
        most = len(self.parts) - 1 if asked is None else min(asked, len(self.parts))
        while most and not self.num_trained_behind and not any(part.parameters for part in self.parts[most:]):
            most -= 1
        if not most:
            raise ValueError(
                f"Expected parameters to train behind {self.parts[0].block!r}, the first block to freeze, but with it "
                "everything would be frozen: pass `blocks=` that end before the last trained layer."
            )
        return most

    def state(self) -> dict[str, Any]:
        """Returns the plan in primitives, for a checkpoint."""
        parts = [
            {**part._asdict(), "parameters": list(part.parameters), "modules": list(part.modules)}
            for part in self.parts
        ]
        return {**self._asdict(), "parts": parts}

    @staticmethod
    def of(state: dict[str, Any]) -> FreezePlan:
        """Returns the plan that `state` gave."""
        parts = [
            BlockParts(**{**part, "parameters": tuple(part["parameters"]), "modules": tuple(part["modules"])})
            for part in state["parts"]
        ]
        return FreezePlan(**{**state, "parts": tuple(parts)})
