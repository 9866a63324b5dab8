"""Edits by name and of one's own: in state dicts, in files, in the editor; and which parameters take part."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_cka import MonoSoupEditor
from lit_cka.editing import Edit, EditSettings, edit_files, edit_state_dicts, edit_weights
from lit_cka.editing.depths import depths_by_number
from lit_cka.editing.edits import EDITS, named_edits
from lit_cka.editing.shrinking import norms_of_update, shrink_factor
from lit_cka.functional import edits as functions
from tests.editing.evaluation_worker import models, weights

Weights = dict[str, Tensor]
# Every edit of two checkpoints, with options; "half" is one of one's own.
OPTIONS: dict[str, dict[str, Any]] = {
    "wise_ft": {"alpha": 0.4},
    "lines": {"alpha": 0.2, "beta": 0.6},
    "trim": {"density": 0.25},
    "dare": {"drop": 0.3},
    "dg_hard": {},
    "shrink": {},
    "shrink_global": {},
    "tests.editing.test_edits:half": {"of": 4.0},
}
MATRICES = ["stem.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "blocks.2.fc.weight"]
pytestmark = pytest.mark.filterwarnings("ignore:1 tensors in which the models differ are not edited")


def half(W0: Tensor, W1: Tensor, of: float) -> Tensor:
    return W0 + (W1 - W0) * (of / 8)


def wrong_shape(W0: Tensor, W1: Tensor) -> Tensor:
    return W1[:1]


def no_tensor(W0: Tensor, W1: Tensor) -> None:
    return None


def pair() -> tuple[Weights, Weights]:
    """Two blocks, a stem with a bias, a counter, and a head of another size."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"stem.weight": (6, 5), "stem.bias": (6,), **{f"blocks.{i}.fc.weight": (8, 6) for i in range(3)}}
    W0 = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    W1 = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in W0.items()}
    for value in W1.values():
        value += 0.3 * torch.randn(len(value), *[1] * (value.ndim - 1), generator=generator)  # of rank 1
    W0["count"], W1["count"] = torch.tensor(1), torch.tensor(2)
    W0["head.weight"], W1["head.weight"] = torch.randn(3, 6), torch.randn(4, 6)
    return W0, W1


def expected(edit: str, W0: Weights, W1: Weights, name: str) -> Tensor:
    start, end = W0[name], W1[name]
    options = dict(OPTIONS[edit])
    if edit.endswith("half"):
        return start + (end - start) / 2
    if edit == "lines":
        options["depth"] = int(name[7]) / 2 if name.startswith("blocks") else None
    if edit == "dare":
        options["seed"] = zlib.crc32(name.encode())
    if edit == "shrink_global":
        options["factor"] = shrink_factor([norms_of_update(W0[each], W1[each], EditSettings()) for each in MATRICES])
    return EDITS[edit].function(start, end, **options)


@pytest.mark.parametrize("edit", OPTIONS)
def test_in_files_in_state_dicts_and_by_itself(edit: str, tmp_path: Path) -> None:
    W0, W1 = pair()
    save_file(W0, tmp_path / "a.safetensors")
    save_file(W1, tmp_path / "b.safetensors")
    records = edit_files(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", variant=edit,
        options=OPTIONS[edit], allow_differences=True, progress=False, report=tmp_path / "report.json",
    )  # fmt: skip
    made, depths = load_file(tmp_path / "out.safetensors"), depths_by_number(list(W1))
    one = Edit(edit, OPTIONS[edit])
    variants = edit_state_dicts(W0, W1, edits={"mine": one}, depths=depths).variants
    alone = edit_weights(W0, W1, one, depths=depths)
    edited = set(MATRICES) if one.kind.of_matrices else {*MATRICES, "stem.bias"}
    for name, value in W1.items():
        wanted = expected(edit, W0, W1, name) if name in edited else value
        for found in (made[name], variants["mine"][name], alone[name]):
            torch.testing.assert_close(found, wanted)
        assert (name in edited) == (not torch.equal(made[name], value))
    reasons = {record["name"]: record["reason"] for record in records}
    assert {name for name, reason in reasons.items() if reason is None} == edited
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["variant"] == edit
    for record in records:
        if record["reason"] is None:
            start, end = W0[record["name"]], W1[record["name"]]
            kept = (made[record["name"]] - start).norm() / (end - start).norm()
            assert record["kept"] == pytest.approx(kept.item(), rel=1e-5)
            assert record["relative_change"] == pytest.approx(((end - start).norm() / start.norm()).item(), rel=1e-5)


def test_in_the_editor() -> None:
    other = {"edit": "wise_ft", "alpha": 0.25}
    edits = {
        "shrink": {},
        "quarter": other,
        "trim": {"density": 0.5},
        "lines_2": {"edit": "lines", "alpha": 0.1, "beta": 1},
    }
    editor = MonoSoupEditor(*models(), edits=edits, wise_ft=[0.25], rule="energy", R=0.5)
    variants = editor.edited.variants
    assert list(variants) == editor.variant_names
    assert editor.variant_names[5:] == [*edits, "wise_ft_0.25"]
    before, after = map(weights, models())
    name = "net.blocks.2.linear.weight"
    assert torch.equal(variants["quarter"][name], variants["wise_ft_0.25"][name])
    torch.testing.assert_close(variants["lines_2"][name], before[name] + 1.1 * (after[name] - before[name]))
    assert torch.equal(variants["trim"][name], functions.trim(before[name], after[name], density=0.5))
    # `shrink` is the control of this MonoSoup, with its rule.
    norms = {variant: (variants[variant][name] - before[name]).norm().item() for variant in ("monosoup", "shrink")}
    assert norms["shrink"] == pytest.approx(norms["monosoup"], rel=1e-5)


def test_one_factor_for_all_leaves_the_norm_of_all() -> None:
    W0, W1 = pair()
    variants = edit_state_dicts(W0, W1, edits={"mine": Edit("shrink_global")}).variants

    def norm(variant: str) -> float:
        return math.sqrt(sum((variants[variant][name] - W0[name]).square().sum().item() for name in MATRICES))

    assert norm("mine") == pytest.approx(norm("monosoup"), rel=1e-5)
    factors = {((variants["mine"][n] - W0[n]).norm() / (W1[n] - W0[n]).norm()).item() for n in MATRICES}
    assert max(factors) == pytest.approx(min(factors), rel=1e-4)


# Which parameters


PATTERNS: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"include": ["blocks.**"]}, set(MATRICES[1:]), set()),
    ({"include": "blocks.[01].fc.*"}, {"blocks.0.fc.weight", "blocks.1.fc.weight"}, set()),
    ({"exclude": ["blocks.*.fc.weight"]}, {"stem.weight"}, set()),
    ({"keep_pretrained": ["stem.*"]}, set(MATRICES[1:]), {"stem.weight", "stem.bias"}),
    ({"include": ["stem.weight"], "keep_pretrained": ["blocks.0.**"]}, {"stem.weight"}, {"blocks.0.fc.weight"}),
    ({"include": ["**.weight"], "keep_finetuned": ["**.2.**", "stem.*"]}, set(MATRICES[1:3]), set()),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "edited", "pretrained"), PATTERNS)
@pytest.mark.parametrize("variant", ["monosoup", "dg_hard"])
def test_patterns(
    variant: str, patterns: dict[str, Any], edited: set[str], pretrained: set[str], tmp_path: Path
) -> None:
    W0, W1 = pair()
    settings = EditSettings(**patterns)
    save_file(W0, tmp_path / "a.safetensors")
    save_file(W1, tmp_path / "b.safetensors")
    records = edit_files(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors", settings,
        variant=variant, allow_differences=True, progress=False,
    )  # fmt: skip
    one = {} if variant == "monosoup" else {variant: Edit(variant)}
    in_memory = edit_state_dicts(W0, W1, settings, edits=one).variants[variant]
    made = load_file(tmp_path / "out.safetensors")
    for name, value in W1.items():
        for found in (made[name], in_memory[name]):
            kept = W0[name] if name in pretrained else value
            assert torch.equal(found, kept) == (name not in edited), name
    reasons = {record["name"]: record["reason"] for record in records}
    assert {name for name, reason in reasons.items() if reason == "kept as pretrained"} == pretrained
    assert {name for name, reason in reasons.items() if reason is None} == edited


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["block.**"]},
            r"patterns of the model's parameters in `include`, but 'block\.\*\*' matches none\.",
        ),
        (
            {"exclude": ["blocks.0.fc.weigth"]},
            r"in `exclude`, but 'blocks.0.fc.weigth' matches none\. Names like it: blocks",
        ),
        (
            {"keep_pretrained": ["stem.*"], "keep_finetuned": ["*.bias"]},
            "Expected 'stem.bias' in `keep_pretrained` or in",
        ),
    ],
)
def test_patterns_that_match_nothing_or_too_much(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit_state_dicts(*pair(), EditSettings(**options))


# Errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shrnik", {}, r"Expected an edit \(monosoup, .*but got 'shrnik'\. Did you mean 'shrink'\?"),
        ("wise_ft", {"density": 1}, r"'wise_ft' .'alpha'., but got 'density'\. 'density' is an option of trim"),
        ("wise_ft", {}, "Expected a value of 'alpha' for the edit 'wise_ft', which has no default"),
        ("dg_hard", {"R": 0.5}, r"of the edit 'dg_hard' \(none\), but got 'R'\. 'R' is an option of shrink"),
        ("lines", {"alpha": 1, "beta": 1, "depth": 0.5}, "but got 'depth'"),
        ("tests.nowhere:edit", {}, "to be the import path of an edit, but No module named"),
        ("tests.editing.test_edits:missing", {}, "to be the import path of an edit, but module"),
        ("tests.editing.test_edits:OPTIONS", {}, "to be a function of `W0` and `W1`, but it is"),
    ],
)  # fmt: skip
def test_wrong_edits_are_one_clear_error(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit(name, options)


@pytest.mark.parametrize(
    ("function", "got"), [("wrong_shape", r"torch\.float32 of \(1, 5\)"), ("no_tensor", "NoneType")]
)
def test_functions_that_give_something_else(function: str, got: str) -> None:
    edit = Edit(f"tests.editing.test_edits:{function}")
    with pytest.raises(ValueError, match=rf"to give torch.float32 of \(6, 5\) for 'stem.weight', but got {got}"):
        edit_weights(*pair(), edit)


def test_what_an_edit_needs_of_the_model_is_there_or_an_error() -> None:
    """Silently, a soup of one model would be that model, and every block the first."""
    W0, W1 = pair()
    with pytest.raises(ValueError, match="Expected other fine-tuned models for the edit 'uniform_soup'"):
        edit_weights(W0, W1, Edit("uniform_soup"))
    with pytest.raises(ValueError, match="Expected other fine-tuned models"):
        MonoSoupEditor(*models(), edits={"soup": {"edit": "uniform_soup"}}).edited  # noqa: B018
    edit = Edit("lines", {"alpha": 0.2, "beta": 0.6})
    by_names = edit_weights(W0, W1, edit)
    given = edit_weights(W0, W1, edit, depths=depths_by_number(list(W1)))
    assert all(torch.equal(by_names[name], given[name]) for name in W1)
    with pytest.raises(ValueError, match="Expected names of parameters with the number of their block"):
        edit_weights({"w": W0["stem.weight"]}, {"w": W1["stem.weight"]}, edit)


def test_names_of_variants() -> None:
    for label in ("monosoup", "lines", "wise_ft_0.5", "uniform_soup"):
        with pytest.raises(
            ValueError, match=f"Expected names of further variants in `edits`, but '{label}' is another"
        ):
            named_edits({label: {"edit": "dg_hard"}}, (0.1, 0.2), [0.5])


def test_weights_that_are_not_finite_are_named() -> None:
    W0, W1 = pair()
    W1["blocks.1.fc.weight"][0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'blocks\.1\.fc\.weight' of the fine-tuned model holds NaN or infinity"):
        edit_weights(W0, W1, Edit("wise_ft", {"alpha": 0.5}))


def test_files_refuse_what_they_can_not_do(tmp_path: Path) -> None:
    W0, W1 = pair()
    save_file(W0, tmp_path / "a.safetensors")
    save_file(W1, tmp_path / "b.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "out")]
    with pytest.raises(ValueError, match="'uniform_soup' is of several: use MonoSoupEditor"):
        edit_files(*paths, variant="uniform_soup")
    with pytest.raises(ValueError, match=r"Expected no `options` of 'monosoup', which `settings` are for"):
        edit_files(*paths, variant="monosoup", options={"R": 0.9})
    assert not paths[2].exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.2.a.w", "h.4.a.w", "h.3.w", "wte.w"], {"h.2.a.w": 0.0, "h.3.w": 0.5, "h.4.a.w": 1.0}),
        (["m.layers.0.e.0.w", "m.layers.0.e.1.w", "m.layers.1.e.0.w", "m.layers.1.b"],
         {"m.layers.0.e.0.w": 0.0, "m.layers.0.e.1.w": 0.0, "m.layers.1.e.0.w": 1.0, "m.layers.1.b": 1.0}),
        (["0.w", "2.w"], {"0.w": 0.0, "2.w": 1.0}),
        (["only.7.w", "x"], {"only.7.w": 0.0}),
    ],
)  # fmt: skip
def test_depth_by_number(names: list[str], expected: dict[str, float]) -> None:
    assert depths_by_number(names) == expected
    with pytest.raises(ValueError, match="Expected names of parameters with the number of their block"):
        depths_by_number(["a.w", "b1.w"])
