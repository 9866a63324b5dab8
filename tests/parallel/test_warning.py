"""Warnings are one line, by the first process."""

from __future__ import annotations

import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lit_cka.parallel.warning import warn


def test_a_warning_is_one_line() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn("Something is odd.")
    (record,) = seen
    text = warnings.formatwarning(record.message, record.category, record.filename, record.lineno)
    assert text == "lit_cka:1: UserWarning: Something is odd.\n"


def test_each_text_is_shown_once() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for text in ("One.", "Two.", "One."):
            warn(text)
    assert [str(record.message) for record in seen] == ["One.", "Two."]


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("Nobody hears this.")


def test_they_can_be_silenced_by_the_packages_name() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="lit_cka")
        warn("Not shown.")
    assert seen == []
