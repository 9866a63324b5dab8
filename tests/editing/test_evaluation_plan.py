"""Which variants are evaluated, and where CKA is taken: the same numbers as of everything, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lit_cka import MonoSoupEditor
from lit_cka.data import DigitShiftsDataModule
from lit_cka.editing.evaluation_plan import EvaluationPlan
from lit_cka.editing.parameter import VARIANTS
from lit_cka.editing.results import EvaluationResults
from tests.editing.evaluation_worker import Sets, models
from tests.editing.test_evaluation import evaluate
from tests.tracking.helpers import trainer


def results_of(folder: Path, **options: Any) -> tuple[EvaluationResults, Sets]:
    data = Sets()
    return evaluate(MonoSoupEditor(*models(), wise_ft=[0.5], **options), data, folder), data


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResults:
    return results_of(tmp_path_factory.mktemp("everything"))[0]


def test_chosen_variants_have_the_numbers_that_they_have_among_all(
    tmp_path: Path, everything: EvaluationResults
) -> None:
    results, _ = results_of(tmp_path, variants=["monosoup", "finetuned", "wise_ft_0.5"])
    names = ["finetuned", "monosoup", "wise_ft_0.5"]
    assert list(results.metrics) == names
    assert results.metrics == {name: everything.metrics[name] for name in names}
    for name, scores in results.cka.items():  # though the pretrained model itself is not evaluated
        assert scores == {variant: everything.cka[name][variant] for variant in names[:2]}


def test_cka_on_chosen_sets(tmp_path: Path, everything: EvaluationResults) -> None:
    results, _ = results_of(tmp_path, cka_sets=["few"])
    assert results.metrics == everything.metrics
    assert results.cka == {"clean": {}, "chosen": {}, "few": everything.cka["few"]}
    assert results.num_cka_samples == {"clean": 0, "chosen": 0, "few": everything.num_cka_samples["few"]}


@pytest.mark.parametrize("options", [{"cka_sets": []}, {"max_cka_batches": 0}])
def test_evaluation_without_cka(tmp_path: Path, options: dict[str, Any], everything: EvaluationResults) -> None:
    results, _ = results_of(tmp_path, **options)
    assert results.metrics == everything.metrics
    assert not any(results.cka.values())


def test_cka_without_evaluation(tmp_path: Path, everything: EvaluationResults) -> None:
    results, data = results_of(tmp_path, evaluate=False, cka_sets="chosen")
    assert results.metrics == {}
    assert results.cka == {"chosen": everything.cka["chosen"]}
    assert results.num_cka_samples == {"chosen": everything.num_cka_samples["chosen"]}
    assert [bool(counted.counts) for counted in data.data] == [False, True, False]  # nothing else is read


def test_cka_alone_reads_no_more_batches_than_it_takes(tmp_path: Path) -> None:
    limited, data = results_of(tmp_path, evaluate=False, max_cka_batches=1)
    with_all, _ = results_of(tmp_path, max_cka_batches=1)
    assert limited.cka == with_all.cka
    for counted, size in zip(data.data, Sets.sizes, strict=True):
        assert len(counted.counts) == min(size, limited.num_cka_samples[data.test_names[data.data.index(counted)]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["monosuop"]}, "Did you mean 'monosoup'"),
        ({"variants": []}, "at least one variant"),
        ({"evaluate": False, "cka_sets": []}, "something to measure"),
        ({"evaluate": False, "max_cka_batches": 0}, "something to measure"),
        ({"evaluate": False, "variants": ["pretrained"]}, "to compare with 'pretrained'"),
        ({"max_cka_batches": -1}, "at least 0, or None, but got -1"),
    ],
)
def test_what_can_not_be_measured_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonoSoupEditor(*models(), **options)


def test_a_test_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test sets in `cka_sets` \(clean, chosen, few\), but got 'clear'. Did you"):
        results_of(tmp_path, cka_sets=["clear"])


def test_a_test_set_that_is_not_there_is_said_before_the_work(tmp_path: Path) -> None:
    """With data modules that know their sets."""
    editor = MonoSoupEditor(*models(), cka_sets=["noise"])
    with (
        mock.patch.object(MonoSoupEditor, "edited", property(lambda editor: pytest.fail("It was edited."))),
        pytest.raises(ValueError, match=r"\(digits, rotated, noisy, blurred\), but got 'noise'. Did you mean 'noisy'"),
    ):
        trainer(tmp_path).test(editor, DigitShiftsDataModule())


def test_one_name_is_a_list_of_one() -> None:
    plan = EvaluationPlan(variants="monosoup", cka_sets="clean")
    assert plan.evaluated(VARIANTS) == ["monosoup"]
    assert plan.takes_cka_on("clean")
    assert not plan.takes_cka_on("c")
