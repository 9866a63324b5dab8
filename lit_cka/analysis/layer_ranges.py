"""Layers in words, neighbours together: `layer_ranges`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lit_cka.plots.canvas import short_names


def layer_ranges(chosen: Collection[str], names: Sequence[str]) -> str:
    """Returns the chosen layers as a text, in their order, three neighbours or more as a range, without what all names
    begin with.

    Args:
        chosen: some of `names`.
        names: of all layers, in order.

    Example:
        >>> names = [f"model.blocks.{number}" for number in range(8)]
        >>> layer_ranges([names[number] for number in (0, 1, 2, 3, 5, 7)], names)
        'blocks.0 to blocks.3, blocks.5 and blocks.7'
    """
    shown = whole_short_names(names)
    runs: list[list[str]] = [[]]
    for name, short in zip(names, shown, strict=True):
        if name in chosen:
            runs[-1].append(short)
        elif runs[-1]:
            runs.append([])
    parts = [
        part for run in runs if run for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def whole_short_names(names: Sequence[str]) -> list[str]:
    """Returns what `short_names` does, nothing cut out of the middle; of a single layer, the name as it is.

    Example:
        >>> whole_short_names(["model.blocks.0", "model.blocks.1"])
        ['blocks.0', 'blocks.1']
    """
    return short_names(names, max(map(len, names))) if len(names) > 1 else list(names)
