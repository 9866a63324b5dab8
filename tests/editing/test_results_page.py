"""The page of an evaluation: its numbers against those of the evaluation, its intervals against SciPy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lit_cka.editing.results import EvaluationResults
from lit_cka.editing.results_page import results_columns, results_rows, wilson_interval, write_results_page

SHARES = {"finetuned": (0.9, 0.5, 0.75), "shrink": (0.8, 0.7, 1.0)}
SIZES = {"clean": 100, "noisy": 50, "odd": 40}


def results(metric: str = "top1") -> EvaluationResults:
    metrics = {
        variant: {name: {metric: share} for name, share in zip(SIZES, shares, strict=True)}
        for variant, shares in SHARES.items()
    }
    shifted = {variant: {metric: (shares[1] + shares[2]) / 2} for variant, shares in SHARES.items()}
    cka = {"clean": {"finetuned": {"a": 0.5, "b": 0.7}}, "noisy": {}, "odd": {}}
    return EvaluationResults(metrics, shifted, cka, dict(SIZES), {"clean": 64, "noisy": 0, "odd": 0})


@pytest.mark.parametrize("n", [1, 7, 250])
@pytest.mark.parametrize("share", [0.0, 1.0, 3 / 7])
def test_wilson_is_scipys(share: float, n: int) -> None:
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_row_has_each_sets_accuracy_and_interval() -> None:
    columns, rows = [column.name for column in results_columns(results())], results_rows(results())
    assert columns == [
        "variant", "clean, top1", "clean, 95 %", "noisy, top1", "noisy, 95 %", "odd, top1", "odd, 95 %", "shifted",
        "shifted, 95 %", "CKA, clean",
    ]  # fmt: skip
    by_variant = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    tuned = by_variant["finetuned"]
    assert (tuned["clean, top1"], tuned["shifted"], tuned["CKA, clean"]) == (90.0, 62.5, pytest.approx(0.6))
    low, high = stats.binomtest(25, 50).proportion_ci(method="wilson")
    assert tuned["noisy, 95 %"] == f"{100 * low:.1f} to {100 * high:.1f}"
    half = stats.norm.ppf(0.975) * np.sqrt(0.25 / 50 + 0.75 * 0.25 / 40) / 2
    assert tuned["shifted, 95 %"] == f"{62.5 - 100 * half:.1f} to {62.5 + 100 * half:.1f}"
    assert by_variant["shrink"]["CKA, clean"] is None


def test_perplexity_is_no_share() -> None:
    found = results("perplexity")
    columns = [column.name for column in results_columns(found)]
    assert columns == ["variant", "clean, perplexity", "noisy, perplexity", "odd, perplexity", "shifted", "CKA, clean"]
    assert results_rows(found)[0][1] == 0.9
    assert "less is better" in results_columns(found)[1].explanation


def test_the_page_explains_every_column_and_the_control(tmp_path: Path) -> None:
    path = write_results_page(tmp_path / "index.html", results(), ["3 of 4 tensors edited."], {}, ["monosoup.json"])
    data = re.search(r'type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    assert data is not None
    content = json.loads(data[1])
    assert len(content["rows"]) == 2
    for column in content["columns"]:
        assert column["explanation"].endswith("."), column
    assert "On the 50 samples of noisy." in content["columns"][3]["explanation"]
    assert content["about"][0] == "3 of 4 tensors edited."
    assert any(line.startswith("shrink makes each weight's update as small") for line in content["about"])
