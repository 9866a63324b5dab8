"""Prefixes that tell one checkpoint's names from another's."""

from __future__ import annotations

import pytest

from lit_cka.editing.prefixes import Renaming, find_renaming

NAMES = ["layers.0.weight", "layers.1.weight", "head.weight"]


@pytest.mark.parametrize("prefix", ["model.", "network.model.", "a.b.c."])
def test_a_prefix(prefix: str) -> None:
    longer = [prefix + name for name in NAMES]
    removing, adding = find_renaming(NAMES, longer), find_renaming(longer, NAMES)
    assert (removing, adding) == (Renaming(removed=prefix), Renaming(added=prefix))
    assert removing is not None
    assert [removing(name) for name in longer] == NAMES
    assert find_renaming(NAMES, [*longer, "loss.weight"]) == removing


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ["head.weight", "model.layers.0.weight"],  # one is there as it is
        ["model.other.0", "model.other.1"],
        ["a.b.c.d." + name for name in NAMES],
        ["model.layers.0.weight", "x.layers.1.weight", "y.head.weight", "z.z"],
        [],
    ],
)
def test_no_prefix(names: list[str]) -> None:
    assert find_renaming(NAMES, names) is None
