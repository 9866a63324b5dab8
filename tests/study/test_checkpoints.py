"""Which checkpoints a study is of, what it keeps of each, and when it may be gone on with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lit_cka.study.checkpoints import find_checkpoints
from lit_cka.study.plan import Plan
from lit_cka.study.storage import CheckpointResult, SetResult, load_result, require_same_samples, result_path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("model_0.pt", "model_2.pt", "model_10.pt", "other/model_2.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    return tmp_path


def test_patterns_find_all_but_the_pretrained_in_the_order_of_numbers(models: Path) -> None:
    found = find_checkpoints(["model_*.pt"], str(models / "model_0.pt"))
    assert [each.name for each in found] == ["model_2", "model_10"]
    several = find_checkpoints(["other/*", "./model_2.pt", "model_*.pt"], "model_0.pt")
    assert [each.name for each in several] == ["other/model_2", f"{models.name}/model_2", f"{models.name}/model_10"]
    Path("model_2.ckpt").touch()
    assert [each.name for each in find_checkpoints(["model_2.*"], "model_0.pt")] == ["model_2.ckpt", "model_2.pt"]


@pytest.mark.parametrize(
    ("patterns", "kind", "message"),
    [
        ([], ValueError, "Expected `checkpoints` to name fine-tuned checkpoints, but it is empty"),
        (["model_0.pt"], ValueError, "but 'model_0.pt' is the pretrained one"),
        (["model_[0].pt"], ValueError, "match the pretrained alone"),
        (["modle_10.pt"], FileNotFoundError, "Expected 'modle_10.pt' in `checkpoints` to be there, but nothing is. "
         "There is 'model_10.pt'."),
        (["none/*.pt"], FileNotFoundError, "There is no folder 'none'."),
    ],
)  # fmt: skip
def test_wrong_patterns(models: Path, patterns: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        find_checkpoints(patterns, "model_0.pt")


def test_a_checkpoint_that_was_written_anew_is_another_one(models: Path) -> None:
    (checkpoint,) = find_checkpoints(["model_10.pt"], "model_0.pt")
    before = checkpoint.identity()
    assert before == checkpoint.identity()
    Path("model_10.pt").write_text("model_10,p")
    assert checkpoint.identity() != before


def result(checkpoint: str = "a", /, **changes: object) -> CheckpointResult:
    right = np.random.default_rng(0).integers(0, 2, (3, 21)).astype(np.uint8)
    sets = [SetResult("first", "top1", right, np.arange(21), "d1", [3]), SetResult("second", "top1", right[:, :9])]
    edits = {"monosoup": {"seconds": 0.5, "mebibytes": None, "kept": 0.9, "is_scaling": False}}
    made = CheckpointResult(checkpoint, [5, 7], ["pretrained", "finetuned", "monosoup"], sets, edits, 1.5)
    for attribute, value in changes.items():
        setattr(made.sets[0], attribute, value)
    return made


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """A bit for each sample; names that no file could have, and that look alike, are apart."""
    name = "über/model*"
    path = result(name).save(tmp_path)
    found = load_result(path)
    assert (found.name, found.identity, found.variants) == (name, [5, 7], ["pretrained", "finetuned", "monosoup"])
    assert (found.edits, found.seconds) == (result().edits, 1.5)
    for loaded, expected in zip(found.sets, result().sets, strict=True):
        np.testing.assert_array_equal(loaded.right, expected.right)
        assert (loaded.groups is None) == (expected.groups is None)
        assert (loaded.name, loaded.metric, loaded.digest, loaded.absent) == (
            expected.name, expected.metric, expected.digest, expected.absent,
        )  # fmt: skip
    assert result_path(tmp_path, "über/model*") == path
    assert result_path(tmp_path, "über_model_") != path


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    path = result().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"Expected {re.escape(repr(str(path)))} to be the result of a checkpoint"):
        load_result(path)


def test_other_samples_are_refused() -> None:
    require_same_samples([result(), result("b")])
    with pytest.raises(ValueError, match="those of 'first' differ between 'a' and 'b': are they shuffled"):
        require_same_samples([result(), result("b", digest="d2")])
    with pytest.raises(ValueError, match="Expected the same test sets for all checkpoints"):
        require_same_samples([result(), result("b", name="third")])


def test_a_study_goes_on_with_the_same_options_alone(tmp_path: Path) -> None:
    options = {"study": {"edits": {"trim": {"density": 0.2}}, "checkpoints": ["a"]}, "seed": 0, "num_threads": 1}
    Plan(options, [1, 2]).begin(tmp_path)
    free = {**options, "num_threads": 4, "output": "there", "needs": {"a": "b"}}
    Plan({**free, "study": {**options["study"], "checkpoints": ["a", "b"], "device": "cuda"}}, [1, 2]).begin(tmp_path)  # type: ignore[dict-item]
    other = {**options, "study": {"edits": {"trim": {"density": 0.3}, "dare": {"drop": 0.5}}, "checkpoints": ["a"]}}
    message = "`study.edits.trim.density` (0.2 before, 0.3 now), `study.edits.dare.drop` (not given before, 0.5 now)"
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(other, [1, 2]).begin(tmp_path)
    with pytest.raises(ValueError, match="the file of the pretrained model has changed since"):
        Plan(options, [1, 3]).begin(tmp_path)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ValueError, match=r"plan\.json' to be the plan of a study, but it is not"):
        Plan(options, [1, 2]).begin(tmp_path)
