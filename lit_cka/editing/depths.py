"""How deep in a model the block of each parameter is: `depths_of`, `depths_by_number`."""

from __future__ import annotations

import re
from collections.abc import Sequence


def depths_of(names: Sequence[str], blocks: Sequence[str]) -> dict[str, float]:
    """Returns the depth of every parameter in a block, from 0 in the first to 1 in the last.

    Args:
        names: of the parameters.
        blocks: in order ("model.blocks.0", ...).

    Raises:
        ValueError: if there are no blocks, or one holds no parameter.
    """
    if not blocks:
        raise ValueError("Expected `layer_names` to name the model's blocks, but it is empty.")
    last = max(len(blocks) - 1, 1)
    depths = {f"{block}.": depth / last for depth, block in enumerate(blocks)}
    unused = [start[:-1] for start in depths if not any(name.startswith(start) for name in names)]
    if unused:
        raise ValueError(f"Expected `layer_names` to be blocks of the model, but no parameter is in {unused[0]!r}.")
    found = ((name, next((start for start in depths if name.startswith(start)), None)) for name in names)
    return {name: depths[start] for name, start in found if start is not None}


def depths_by_number(names: Sequence[str]) -> dict[str, float]:
    """Returns the depth of every parameter in a block, of names alone: the blocks are what most parameters have a
    number for ("h.0.attn.weight", "h.1.attn.weight", ...).

    Raises:
        ValueError: if no parameter's name holds a number.
    """
    numbers: dict[str, dict[str, int]] = {}
    for name in names:
        for match in re.finditer(r"(?:^|\.)(\d+)(?=\.)", name):
            numbers.setdefault(name[: match.start(1)], {})[name] = int(match[1])
    if not numbers:
        raise ValueError("Expected names of parameters with the number of their block in them, but there is none.")
    found = max(numbers.values(), key=len)
    first, last = min(found.values()), max(found.values())
    return {name: (number - first) / max(last - first, 1) for name, number in found.items()}
