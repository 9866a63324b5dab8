"""Features in files, and features of the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_cka.analysis.features import Features, matched


def features(ids: list[str] | None = None, model: str = "a", **options: Any) -> Features:
    ids = ["0", "1", "2"] if ids is None else ids
    X = torch.randn(len(ids), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Features({"layers.10": X, "layers.9": X.exp() * 1e300, "<b>": X[:, :1] * torch.nan}, ids, model, **options)


def test_a_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    before = features(["हिन्दी", "\U0001f3ac", '"'], data="d", pooling="cls", labels=["good", 1, None])
    path = before.save(tmp_path / "new" / "a.safetensors")
    after = Features.load(str(path))
    assert list(after.layers) == ["layers.10", "layers.9", "<b>"]
    for name, X in before.layers.items():
        assert after.layers[name].dtype == torch.float64
        assert torch.equal(after.layers[name].view(torch.int64), X.contiguous().view(torch.int64))
    assert (after.ids, after.labels) == (before.ids, before.labels)
    assert (after.model, after.data, after.pooling, after.num_samples) == ("a", "d", "cls", 3)
    assert Features.load(features().save(tmp_path / "b")).labels is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = features().save(tmp_path / "a.safetensors")
    features(["3"]).save(path)
    shared = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="share memory"):
        Features({"a": shared, "b": shared}, ["0", "1", "2"]).save(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        features(labels=[object()] * 3).save(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        features().save(tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "folder"]
    assert Features.load(path).ids == ["3"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    content = features().save(tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "b.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a file of features at '.*b\.safetensors', but there is none"):
        Features.load(path)
    for part in (b"", content[:4], content[:60], content[:-8], b"text, not tensors"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"b\.safetensors' is damaged or no safetensors file"):
            Features.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError, match=r"b\.safetensors' to hold features that lit_cka stored"):
            Features.load(path)


def test_features_have_to_fit_together() -> None:
    with pytest.raises(ValueError, match=r"of 3 samples, .* layer 'x' have shape \(2, 4\)"):
        Features({"x": torch.zeros(2, 4)}, ["0", "1", "2"])
    with pytest.raises(ValueError, match=r"layer 'x' have shape \(3,\)"):
        Features({"x": torch.zeros(3)}, ["0", "1", "2"])
    with pytest.raises(ValueError, match="3 labels, one for each id, but got 2"):
        features(labels=[0, 1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["0", "1"], "but a has 3 and b 2"),
        (["0", "x", "y"], "but sample 1 is '1' for a and 'x' for b"),
    ],
)
def test_samples_have_to_match(ids: list[str], message: str) -> None:
    same = features(model="b")
    assert matched(features(), same) is same
    with pytest.raises(ValueError, match=f"features of the same samples, {message}"):
        matched(features(), features(ids, "b"))


def test_samples_are_put_in_the_same_order() -> None:
    other = features(["2", "0", "1"], "b", labels=["c", "a", "b"])
    found = matched(features(labels=["a", "b", "c"]), other)
    assert (found.ids, found.labels, found.model) == (["0", "1", "2"], ["a", "b", "c"], "b")
    for name, X in other.layers.items():
        torch.testing.assert_close(found.layers[name], X[[1, 2, 0]], equal_nan=True)


def test_inputs_are_stored_and_matched_by(tmp_path: Path) -> None:
    features(inputs=["x", "y", "x"]).save(tmp_path / "a")
    first = Features.load(tmp_path / "a")
    assert first.inputs == ["x", "y", "x"]
    other = features(model="b", inputs=["x", "x", "y"])
    found = matched(first, other)
    torch.testing.assert_close(found.layers["layers.10"], other.layers["layers.10"][[0, 2, 1]])
    with pytest.raises(ValueError, match="1 of 3 that a has read are not among those of b"):
        matched(first, features(model="b", inputs=["x", "y", "y"]))
    others = features(model="b", inputs=["p", "q", "r"])  # in another form
    assert matched(first, others) is others
    with pytest.raises(ValueError, match="3 of 3 that a has read are not among those of b"):
        matched(first, others, same_loader=True)


def test_a_file_of_another_dataset_does_not_match(tmp_path: Path) -> None:
    features(["en-0", "en-1", "en-2"], "b", data="english").save(tmp_path / "b")
    with pytest.raises(ValueError, match="sample 0 is '0' for a and 'en-0' for b"):
        matched(features(), Features.load(tmp_path / "b"))
