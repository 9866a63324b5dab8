"""What is called more than shrinkage, less, a trade or nothing, on answers made up for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from lit_cka.study.evaluation import null_of
from lit_cka.study.report import conclusion
from lit_cka.study.storage import CheckpointResult, SetResult
from lit_cka.study.summary import Answers, Row, summarise

NUM_MODELS, NUM_SAMPLES = 8, 200


def results(
    gains: Mapping[str, tuple[float, float]], *, kept: float = 0.8, is_scaling: bool = False, groups: bool = False
) -> list[CheckpointResult]:
    """Models of which each variant is right on the same share of samples, and an edit on some more than its null.

    Args:
        gains: over the null, in-distribution and shifted, by edit.
        kept: of the update, by each edit.
        is_scaling: whether each edit is.
        groups: whether the second shifted set has the samples of the first one.
    """
    rng = np.random.default_rng(0)
    variants = ["pretrained", "finetuned", *(name for edit in gains for name in (edit, null_of(edit)))]
    found = []
    for number in range(NUM_MODELS):
        sets = []
        for place, name in enumerate(("clean", "noisy", "dark")):
            level = {each: 0.6 for each in variants}
            level |= {edit: 0.6 + gain[min(place, 1)] for edit, gain in gains.items()}
            common = rng.random(NUM_SAMPLES) + 0.05 * rng.normal()
            right = np.stack([common + 0.02 * rng.normal(size=NUM_SAMPLES) < level[each] for each in variants])
            held = np.arange(NUM_SAMPLES) if groups and place else None
            sets.append(SetResult(name, "top1", right.astype(np.uint8), held))
        cost = {"seconds": 1.0 + number, "mebibytes": None, "kept": kept, "is_scaling": is_scaling}
        found.append(CheckpointResult(str(number), [0, 0], variants, sets, dict.fromkeys(gains, cost)))
    return found


def rows(*args: Mapping[str, tuple[float, float]], **options: object) -> dict[str, Row]:
    return {row.label: row for row in summarise(results(*args, **options))}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ((0.0, 0.15), "more than shrinkage"),
        ((0.15, 0.15), "more than shrinkage"),
        ((-0.15, 0.15), "trades otherwise"),
        ((0.15, -0.15), "trades otherwise"),
        ((0.0, -0.15), "less than shrinkage"),
        ((0.15, 0.0), "not told from shrinkage"),
        ((0.0, 0.0), "not told from shrinkage"),
    ],
)
def test_verdicts(gain: tuple[float, float], verdict: str) -> None:
    row = rows({"edit": gain})["edit"]
    assert row.verdict == verdict
    assert row.beyond_shifted is not None
    assert row.beyond_shifted.mean == pytest.approx(gain[1], abs=0.03)
    assert (row.seconds, row.mebibytes, row.kept) == (4.5, None, 0.8)


def test_a_shrinkage_is_beside_nothing_and_an_enlarged_update_is_no_shrinkage() -> None:
    found = rows({"edit": (0.0, 0.15)}, is_scaling=True)
    assert list(found) == ["pretrained", "finetuned", "edit"]
    assert (found["edit"].verdict, found["edit"].beyond_shifted) == ("is a shrinkage", None)
    larger = rows({"edit": (0.0, 0.15)}, kept=1.4)["edit"]
    assert larger.verdict == "enlarges the update"
    assert np.isnan(larger.p_adjusted)


def test_many_edits_are_corrected_for() -> None:
    """By Holm: of two edits the clearer one's p-value is doubled."""
    found = rows({"clear": (0.0, 0.15), "none": (0.0, 0.0)})
    alone = found["clear"].beyond_shifted
    assert alone is not None
    assert found["clear"].p_adjusted == pytest.approx(2 * alone.p)
    assert found["none"].p_adjusted == found["none"].beyond_shifted.p  # type: ignore[union-attr]
    said = conclusion(list(found.values()))
    assert said.startswith("More than shrinkage: clear. Of the other edits")
    assert said.endswith("not told from shrinkage: none.")


def test_samples_of_one_group_are_one_unit_across_sets() -> None:
    """Two shifted sets of the same 200 originals, by hand: the mean of an original's two differences counts."""
    found = results({"edit": (0.0, 0.1)}, groups=True)
    answers = Answers(found)
    assert [len(each) for each in answers.units] == [NUM_SAMPLES] * 3
    assert not set(answers.units[0]) & set(answers.units[1])
    np.testing.assert_array_equal(answers.units[1], answers.units[2])
    effect = answers.effect("edit", null_of("edit"), [1, 2])
    both = [answers.right("edit", n).astype(float) - answers.right(null_of("edit"), n) for n in (1, 2)]
    interval = stats.ttest_1samp(np.mean(both, axis=(0, 1)), 0).confidence_interval()
    assert effect.over_samples == pytest.approx(tuple(interval), rel=1e-9)


def test_no_results_are_an_error() -> None:
    with pytest.raises(ValueError, match="Expected results of at least one checkpoint"):
        summarise([])
