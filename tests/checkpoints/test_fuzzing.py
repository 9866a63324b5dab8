"""Any bytes in any file are read, or are one error that names the file: see `readers.py`, which runs 20,000 cases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.readers import READERS, outcome


@pytest.mark.parametrize("reader", READERS)
@settings(derandomize=True, max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_damage_is_one_error_or_none(reader: str, seed: int) -> None:
    found, said = outcome(reader, seed)
    assert found in ("read", "refused"), said


@pytest.mark.parametrize("reader", READERS)
def test_some_cases_are_read_and_some_refused(reader: str) -> None:
    """Else the cases would be too sound, or too damaged, to find anything."""
    expected, found = {"read"} if reader == "recordings" else {"read", "refused"}, set()
    for seed in range(40):
        found.add(outcome(reader, seed)[0])
        if found == expected:
            return
    raise AssertionError(found)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("reader", READERS)
def test_many_cases(reader: str) -> None:
    for seed in range(2000):
        found, said = outcome(reader, seed)
        assert found in ("read", "refused"), (seed, said)
