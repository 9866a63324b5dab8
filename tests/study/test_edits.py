"""The edits of a study, and the shrinkage beside each, against NumPy."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.editing.settings import EditSettings
from lit_cka.editing.weights import edit_state_dicts
from lit_cka.study.edits import StudyEdit, shrunk_alike, study_edits
from tests import oracles

EDITS: dict[str, Any] = {
    "monosoup": None,
    "energy": {"edit": "monosoup", "rule": "energy", "R": 0.5},
    "heads": {"edit": "highonly", "include": "head.*"},
    "trim": {"density": 0.3},
    "shrink": {},
}


def pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights whose updates have a strong direction or two, and many weak ones."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W0 = {"a.weight": normal(30, 20), "a.bias": normal(30), "head.weight": normal(12, 30)}
    W1 = {name: value + 0.05 * normal(*value.shape) for name, value in W0.items()}
    for name in ("a.weight", "head.weight"):
        W1[name] += 0.2 * normal(len(W1[name]), 2) @ normal(2, W1[name].shape[1])
    W0, W1 = ({name: value.to(dtype) for name, value in held.items()} for held in (W0, W1))
    return {**W0, "steps": torch.tensor(3)}, {**W1, "steps": torch.tensor(5)}


def made(edit: StudyEdit, W0: dict[str, Tensor], W1: dict[str, Tensor]) -> dict[str, Tensor]:
    return edit.weights(W0, W1, parameters=[name for name in W1 if name != "steps"])


def test_edits_are_those_of_one_model_alone() -> None:
    W0, W1 = pair()
    edits = study_edits(EDITS, EditSettings(), [0.25])
    assert list(edits) == [*EDITS, "wise_ft_0.25"]
    expected = edit_state_dicts(W0, W1).variants["monosoup"]
    found = made(edits["monosoup"], W0, W1)
    assert found.keys() == W1.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    # With options of its own, by the textbook.
    energy = made(edits["energy"], W0, W1)
    svd = np.linalg.svd((W1["a.weight"] - W0["a.weight"]).double().numpy(), full_matrices=False)
    k = oracles.monosoup_rank(svd[1], "energy", 0.5)
    by_hand = oracles.monosoup_weights(W0["a.weight"], svd, k, *oracles.monosoup_coefficients(svd[1], k)[2:])
    np.testing.assert_allclose(energy["a.weight"], by_hand["monosoup"], atol=1e-5)
    assert not torch.allclose(energy["a.weight"], found["a.weight"], atol=1e-3)
    heads = made(edits["heads"], W0, W1)
    assert torch.equal(heads["a.weight"], W1["a.weight"])
    assert not torch.equal(heads["head.weight"], W1["head.weight"])
    torch.testing.assert_close(made(edits["wise_ft_0.25"], W0, W1)["a.bias"], W0["a.bias"].lerp(W1["a.bias"], 0.25))


@pytest.mark.parametrize("label", EDITS)
def test_the_shrinkage_beside_an_edit_has_its_size_weight_by_weight(label: str) -> None:
    W0, W1 = pair()
    edited = made(study_edits(EDITS, EditSettings())[label], W0, W1)
    null = shrunk_alike(W0, W1, edited)
    assert torch.equal(null.weights["steps"], W1["steps"])
    sizes = [[], []]  # type: list[list[float]]
    for name in ("a.weight", "a.bias", "head.weight"):
        start, end, W, shrunk = (held[name].double().numpy() for held in (W0, W1, edited, null.weights))
        ratio = np.linalg.norm(W - start) / np.linalg.norm(end - start)
        np.testing.assert_allclose(shrunk, start + ratio * (end - start), atol=2e-6)
        sizes[0].append(np.linalg.norm(W - start))
        sizes[1].append(np.linalg.norm(end - start))
    assert null.kept == pytest.approx(np.linalg.norm(sizes[0]) / np.linalg.norm(sizes[1]), rel=1e-5)
    assert null.is_same == (label == "shrink")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_shrinkage_is_known_whatever_it_is_called(dtype: torch.dtype) -> None:
    """`wise_ft` shrinks, too, in any dtype; trimming does not."""
    W0, W1 = pair(dtype)
    edits = study_edits({"half": {"edit": "wise_ft", "alpha": 0.5}, "trim": {"density": 0.5}}, EditSettings())
    assert shrunk_alike(W0, W1, made(edits["half"], W0, W1)).is_same
    assert not shrunk_alike(W0, W1, made(edits["trim"], W0, W1)).is_same
    assert shrunk_alike(W0, W1, W1).is_same  # nothing done
    assert shrunk_alike(W0, W1, W1).kept == 1
    away = study_edits({"away": {"edit": "wise_ft", "alpha": -0.5}}, EditSettings())
    assert not shrunk_alike(W0, W1, made(away["away"], W0, W1)).is_same


def test_a_model_that_was_not_fine_tuned_has_no_size() -> None:
    W0, _ = pair()
    null = shrunk_alike(W0, W0, made(study_edits(EDITS, EditSettings())["monosoup"], W0, W0))
    assert math.isnan(null.kept)
    assert null.is_same
    assert all(torch.equal(null.weights[name], value) for name, value in W0.items())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"monosop": {}}, "but got 'monosop'. Did you mean 'monosoup'?"),
        ({"trim": {"density": 0.2, "drop": 0.1}}, "Expected options of the edit 'trim' ('density'), but got 'drop'"),
        ({"trim": {"density": 0.2, "drop": 0.1}}, "'drop' is an option of dare."),
        ({"monosoup": {"density": 0.2}}, "but got 'density'. 'density' is an option of trim."),
        ({"monosoup": {"rule": "energy", "R": 2}}, "to be in (0, 1], but got 2"),
        ({"trim": {}}, "Expected a value of 'density' for the edit 'trim'"),
        ({"trim": 0.2}, "Expected options of the edit 'trim' by name, but got 0.2."),
        ({"finetuned": {"edit": "shrink"}}, "but 'finetuned' is what they are compared with"),
        ({"wise_ft_0.5": {"edit": "shrink"}}, "but 'wise_ft_0.5' is another one already"),
        ({"soup": {"edit": "uniform_soup"}}, "Expected edits of one model in `edits`, but 'soup' takes several"),
        ({}, "Expected at least one edit in `edits`"),
    ],
)
def test_wrong_edits_are_named(edits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        study_edits(edits, EditSettings())
