"""Edits of whole models: every weight against a full SVD, what is left alone and why, threads and ranks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_cka.editing.parameter import EDITED, VARIANTS, ParameterRecord, edit_cost, edit_parameter
from lit_cka.editing.placement import FileBacked
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.weights import EditedModel, edit_state_dicts
from lit_cka.functional.rank_rules import RankRule
from lit_cka.parallel.sharing import one_thread_each, share_out
from tests import oracles, sync_worker
from tests.editing import edit_worker
from tests.editing.edit_worker import NAN_IN, SETTINGS, WORLD_SIZES, is_parameter, models
from tests.oracles import float64

LEFT_ALONE = {
    "stem.bias": "fewer than two dimensions",
    "frozen.weight": "unchanged",
    "small.weight": "relative change below 0.001",
    "norm.running_mean": "not a parameter",
    "norm.table": "not a parameter",
    "norm.num_batches_tracked": "not a parameter",
    "positions": "not floating point",
    "head.weight": "shape (10, 24) in the pretrained model",
    "new.weight": "not in the pretrained model",
    "none": "empty",
}
TIED = {"tied": "embedding", "tied view": "embedding"}


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[int]:
    """Two, which every edit has to leave as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # what a thread begins with is another setting
        assert pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)


def edit(W0: dict[str, Tensor], W1: dict[str, Tensor], **options: Any) -> EditedModel:
    return edit_state_dicts(W0, W1, SETTINGS, parameters=filter(is_parameter, W1), **options)


def record_of(edited: EditedModel, name: str) -> ParameterRecord:
    (record,) = (record for record in edited.records if record["name"] == name)
    return record


def assert_same(edited: EditedModel | dict[str, Any], expected: EditedModel) -> None:
    """Bit for bit."""
    variants, records = (
        (edited.variants, edited.records)
        if isinstance(edited, EditedModel)
        else (edited["variants"], edited["records"])
    )
    assert list(variants) == list(expected.variants)
    for variant, values in expected.variants.items():
        assert list(variants[variant]) == list(values)
        for name, value in values.items():
            assert variants[variant][name].dtype == value.dtype
            assert torch.equal(variants[variant][name], value), (variant, name)
    assert records == expected.records


# What is edited, and what is left alone


@pytest.mark.parametrize(
    ("rule", "R"), [("effective_rank", 0.8), ("energy", 0.8), ("variance", 0.5), ("vetterli", 0.1)]
)
def test_every_weight_is_the_oracle_s(rule: RankRule, R: float) -> None:
    W0, W1 = models()
    edited = edit_state_dicts(W0, W1, EditSettings(rule, R, 1e-3), parameters=filter(is_parameter, W1))
    names = [name for name in W1 if name not in LEFT_ALONE and name not in TIED]
    assert len(names) == 9
    for name in names:
        svd = oracles.update_svd(W0[name], W1[name])
        k = oracles.monosoup_rank(svd[1], rule, R)
        P, rho, high, low = oracles.monosoup_coefficients(svd[1], k)
        record = record_of(edited, name)
        assert record["reason"] is None
        assert (record["shape"], record["k"], record["rank"]) == (list(W1[name].shape), k, len(svd[1]))
        got = [record[key] for key in ("energy", "rho", "lambda_high", "lambda_low")]  # type: ignore[literal-required]
        assert got == pytest.approx([P, rho, high, low], abs=1e-9)
        change = np.linalg.norm(svd[1]) / np.linalg.norm(float64(W0[name]).ravel())
        assert record["relative_change"] == pytest.approx(change, rel=1e-9)
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(W1[name].dtype, 1e-5)
        for variant, oracle in oracles.monosoup_weights(W0[name], svd, k, high, low).items():
            value = edited.variants[variant][name]
            assert (value.dtype, value.shape) == (W1[name].dtype, W1[name].shape)
            assert np.linalg.norm(float64(value) - oracle) <= step * np.linalg.norm(oracle), (name, variant)


def test_what_is_left_alone_is_the_fine_tuned_tensor_itself() -> None:
    W0, W1 = models()
    edited = edit(W0, W1)
    assert tuple(edited.variants) == VARIANTS == ("pretrained", "finetuned", *EDITED)
    assert all(list(values) == list(W1) for values in edited.variants.values())
    for name in W1:
        record = record_of(edited, name)
        for variant in EDITED:
            assert (edited.variants[variant][name] is W1[name]) == (name in LEFT_ALONE), name
        assert record["reason"] == LEFT_ALONE.get(name, f"tied to {TIED[name]}" if name in TIED else None)
        assert record["shape"] == list(W1[name].shape)
        if name in LEFT_ALONE:
            assert {record[key] for key in ("k", "rank", "energy", "rho", "lambda_high", "lambda_low")} == {None}  # type: ignore[literal-required]
    assert record_of(edited, "frozen.weight")["relative_change"] == 0
    assert record_of(edited, "small.weight")["relative_change"] == pytest.approx(1e-4, rel=1e-2)
    assert record_of(edited, "head.weight")["relative_change"] is None
    for name, value in W1.items():
        assert edited.variants["finetuned"][name] is value
        start = W0.get(name)
        lacking = start is None or start.shape != value.shape
        assert edited.variants["pretrained"][name] is (value if lacking else start)


def test_quantised_weights_stay_as_they_are_with_their_scales() -> None:
    def model(seed: int) -> dict[str, Tensor]:
        values = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))
        eight = {"l.weight": values[0].to(torch.float8_e4m3fn), "l.weight_scale_inv": values[1]}
        return {**eight, "l.bias": values[1, 0], "alone.weight": eight["l.weight"].clone(), "m.weight": values[2]}

    W0, W1 = model(0), model(1)
    edited = edit_state_dicts(W0, W1)
    reasons = {record["name"]: record["reason"] for record in edited.records}
    quantised = dict.fromkeys(["l.weight", "l.weight_scale_inv", "l.bias"], "part of quantised weights")
    assert reasons == {**quantised, "alone.weight": "stored as 8-bit floats", "m.weight": None}
    for variant in EDITED:
        assert [name for name in W1 if edited.variants[variant][name] is not W1[name]] == ["m.weight"]


def test_records_are_in_the_order_of_the_fine_tuned_model() -> None:
    W0, W1 = models()
    assert [record["name"] for record in edit(W0, W1).records] == list(W1)
    backwards = dict(reversed(W1.items()))
    assert [record["name"] for record in edit(W0, backwards).records] == list(backwards)


def test_the_models_are_not_changed() -> None:
    W0, W1 = models()
    edit(W0, W1)
    for held, before in zip((W0, W1), models(), strict=True):
        assert list(held) == list(before)
        assert all(torch.equal(held[name], before[name]) for name in held)


def test_the_same_tensor_under_two_names_is_edited_once() -> None:
    W0, W1 = models()
    placed: list[Tensor] = []

    def place(value: Tensor) -> Tensor:
        placed.append(value)
        return value

    edited = edit(W0, W1, place=place)
    assert len(placed) == 9 * len(EDITED)
    for variant in EDITED:
        values = edited.variants[variant]
        assert values["tied"] is values["tied view"] is values["embedding"]
        assert any(values["tied"] is value for value in placed)
    first = record_of(edited, "embedding")
    for name in TIED:
        assert record_of(edited, name) == {**first, "name": name, "reason": "tied to embedding"}


def test_parts_of_one_memory_are_not_tied() -> None:
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    W1 = {
        "whole": whole,
        "first": whole[:3],
        "second": whole[3:],
        "turned": whole.T,
        "empty": whole[:0],
        "no": whole[:0],
    }
    square = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    W1.update(square=square, square_turned=square.T)
    W0 = {name: torch.zeros_like(value) for name, value in W1.items()}
    records = edit_state_dicts(W0, W1).records
    assert [record["reason"] for record in records] == [None, None, None, None, "empty", "empty", None, None]
    assert [record["rank"] for record in records] == [6, 3, 3, 6, None, None, 5, 5]


def test_an_update_of_nothing_edits_nothing() -> None:
    W0, _ = models()
    edited = edit_state_dicts(W0, {name: value.clone() for name, value in W0.items()})
    assert {record["reason"] for record in edited.records} <= {"unchanged", *LEFT_ALONE.values()}
    assert edit_state_dicts({}, {}) == EditedModel({variant: {} for variant in VARIANTS}, [])


def test_any_name_may_be_edited_unless_parameters_are_named() -> None:
    W0, W1 = models()
    W1["norm.table"] = W1["norm.table"] + torch.eye(6)
    assert record_of(edit_state_dicts(W0, W1), "norm.table")["k"] is not None
    edited = edit_state_dicts(W0, W1, parameters=["embedding"])
    assert [record["name"] for record in edited.records if record["k"] is not None] == ["embedding", *TIED]
    assert {record["reason"] for record in edited.records if record["k"] is None} == {"not a parameter"}


def test_whole_numbers_in_either_model_are_left_alone() -> None:
    W = torch.ones(3, 3)
    for start, end in ((W.int(), W), (W, W.int()), (W.bool(), W), (W.int(), 2 * W.int())):
        edited = edit_state_dicts({"W": start}, {"W": end})
        assert edited.records[0]["reason"] == "not floating point"
        assert edited.variants["monosoup"]["W"] is end


def test_edited_weights_of_parameters_are_tensors_without_gradient() -> None:
    W0, W1 = ({"W": nn.Parameter(torch.randn(4, 5))} for _ in range(2))
    value = edit_state_dicts(W0, W1).variants["monosoup"]["W"]
    assert not value.requires_grad
    assert type(value) is Tensor


def test_the_variants_that_are_asked_for() -> None:
    W0, W1 = torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 1.0]))
    settings = EditSettings("energy", 0.9)
    every, record = edit_parameter("W", W0, W1, settings)
    assert tuple(every) == EDITED
    one, same_record = edit_parameter("W", W0, W1, settings, ["lowonly"])
    assert list(one) == ["lowonly"]
    assert torch.equal(one["lowonly"], every["lowonly"])
    assert {**record, "kept": None} == {**same_record, "kept": None}
    assert same_record["kept"] == pytest.approx(math.sqrt(0.1))
    torch.testing.assert_close(every["lowonly"], torch.diag(torch.tensor([0.0, 1.0])))
    torch.testing.assert_close(every["highonly"], torch.diag(torch.tensor([3.0, 0.0])))
    low = 1 / 9 + 8 / 9 * math.sqrt(0.1)
    torch.testing.assert_close(every["monosoup"], torch.diag(torch.tensor([3 * (1 - low), low])))
    assert record["kept"] == pytest.approx(math.hypot(3 * (1 - low), low) / math.sqrt(10))
    assert (record["name"], record["shape"], record["relative_change"]) == ("W", [2, 2], math.inf)


# Settings


def test_small_changes_are_left_alone() -> None:
    W0 = {"W": torch.eye(4, dtype=torch.float64)}
    W1 = {"W": W0["W"] + 1e-5 * torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))}
    change = 1e-5 / math.sqrt(2)
    for smallest, reason in (
        (0, None),
        (0.99 * change, None),
        (1.01 * change, f"relative change below {1.01 * change:g}"),
    ):
        edited = edit_state_dicts(W0, W1, EditSettings(min_rel_update=smallest))
        assert edited.records[0]["reason"] == reason
        assert edited.records[0]["relative_change"] == pytest.approx(change, rel=1e-9)
        assert (edited.variants["lowonly"]["W"] is W1["W"]) == (reason is not None)


def test_defaults() -> None:
    assert EditSettings() == EditSettings("effective_rank", 0.8, 1e-6)
    W0, W1 = models()
    assert_same(edit_state_dicts(W0, W1, EditSettings()), edit_state_dicts(W0, W1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "svd"}, "Expected `rule` to be one of 'effective_rank'"),
        ({"R": 0.0}, "Expected `R`, a share of the energy"),
        ({"R": 80.0}, "Expected `R`, a share of the energy"),
        ({"min_rel_update": -1e-9}, "Expected `min_rel_update` to be at least 0, but got -1e-09"),
        ({"min_rel_update": math.nan}, "Expected `min_rel_update` to be at least 0, but got nan"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditSettings(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embedding", "stem.bias", "bfloat16", "frozen.weight", "tied"])
@pytest.mark.parametrize("number", [0, 1])
def test_weights_that_are_not_finite_are_named(number: int, name: str, bad: float) -> None:
    held = models()
    first = "embedding" if name == "tied" and number == 0 else name
    held[number][first] = held[number][first].clone()
    held[number][first].view(-1)[2] = bad
    said = (
        f"Expected finite weights, but '{first}' of the {('pretrained', 'fine-tuned')[number]} model holds NaN or inf"
    )
    with pytest.raises(ValueError, match=said):
        edit(*held)
    assert torch.get_num_threads() == 2


# Threads


def larger_models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of sizes at which a decomposition on two threads is not that on one."""
    generator = torch.Generator().manual_seed(0)
    W0 = {str(i): torch.randn(150 + 90 * (i % 3), 400 - 70 * i, generator=generator) for i in range(5)}
    return W0, {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in W0.items()}


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    W0, W1 = larger_models()
    by_number = {}
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        by_number[number] = edit_state_dicts(W0, W1)
        assert torch.get_num_threads() == number
    torch.set_num_threads(2)
    for number in (2, 5):
        assert_same(by_number[number], by_number[1])


def test_one_thread_for_each_of_several_at_once() -> None:
    torch.set_num_threads(3)
    lock, running, most, seen = threading.Lock(), 0, 0, []

    def work(name: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            seen.append(torch.get_num_threads())
        time.sleep(0.02 if name == "0" else 0.005)
        with lock:
            running -= 1
        return name

    names = [str(i) for i in range(12)]
    assert list(one_thread_each(work, names, enabled=True)) == names  # in order, though the first ends last
    assert set(seen) == {1}
    assert 2 <= most <= 3
    assert torch.get_num_threads() == 3
    most, seen = 0, []
    assert list(one_thread_each(work, names, enabled=False)) == names
    assert set(seen) == {3}
    assert most == 1
    torch.set_num_threads(2)


def test_threads_are_as_before_whatever_ends_the_work() -> None:
    done = []

    def work(name: str) -> str:
        if name == "3":
            raise KeyError(name)
        time.sleep(0.01)
        done.append(name)
        return name

    with pytest.raises(KeyError):
        list(one_thread_each(work, [str(i) for i in range(500)], enabled=True))
    assert torch.get_num_threads() == 2
    assert len(done) < 490  # what had not begun is dropped
    given_up = one_thread_each(str.upper, ["a", "b", "c"], enabled=True)
    assert next(given_up) == "A"
    given_up.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 2
    assert list(one_thread_each(work, [], enabled=True)) == []


# Placement, devices


def test_edits_in_files_have_the_same_values(tmp_path: Path) -> None:
    W0, W1 = models()
    edited = edit(W0, W1, place=FileBacked(tmp_path).place)
    assert_same(edited, edit(W0, W1))
    assert len(list(tmp_path.iterdir())) == 9 * len(EDITED)
    for variant in EDITED:
        values = edited.variants[variant]
        assert all(values[name] is W1[name] for name in LEFT_ALONE)
        assert values["tied"] is values["embedding"]


def test_a_named_device_changes_nothing_on_it() -> None:
    W0, W1 = models()
    assert_same(edit(W0, W1, device="cpu", progress=True), edit(W0, W1))


@pytest.mark.gpu
def test_edits_on_a_gpu() -> None:
    W0, W1 = models()
    there, here = edit(W0, W1, device="cuda"), edit(W0, W1)
    for record, expected in zip(there.records, here.records, strict=True):
        assert (record["k"], record["reason"]) == (expected["k"], expected["reason"])
        assert record["lambda_low"] == (expected["lambda_low"] and pytest.approx(expected["lambda_low"], abs=1e-9))
    for variant, values in here.variants.items():
        for name, value in values.items():
            assert there.variants[variant][name].device.type == "cpu"
            torch.testing.assert_close(there.variants[variant][name], value)
    assert all(there.variants["monosoup"][name] is W1[name] for name in LEFT_ALONE)


# Ranks


def test_work_is_shared_out_evenly() -> None:
    assert share_out([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert share_out([1, 2, 3], 1) == [0, 0, 0]
    assert share_out([], 3) == []
    assert share_out([7.0], 3) == [0]
    assert sorted(share_out([0.0] * 6, 3)) == [0, 0, 1, 1, 2, 2]
    costs = [float(cost) for cost in np.random.default_rng(0).integers(1, 100, 60)]
    owners = share_out(costs, 4)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) < 1.05 * sum(costs) / 4


def test_costs_follow_the_work() -> None:
    """Most is the eigendecomposition of the smaller side."""
    assert edit_cost((768, 3, 32, 32)) == edit_cost((768, 3072)) == edit_cost((3072, 768))
    assert edit_cost((768,)) == edit_cost(()) == edit_cost((0, 4)) == edit_cost((4, 0)) == 0
    costs = [edit_cost(shape) for shape in ((1, 768), (50, 768), (512, 768), (768, 768), (768, 3072), (3072, 3072))]
    assert costs == sorted(set(costs))
    assert edit_cost((2048, 2048)) == pytest.approx(8 * edit_cost((1024, 1024)), rel=0.1)


NEEDS_GLOO = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="the processes talk over gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `edit_worker.py` have left what they got; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("edits")
    sync_worker.run_to_end(edit_worker.__file__, folder)
    return folder


@NEEDS_GLOO
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("job", ["plain", "on_a_device", "in_files"])
def test_ranks_get_what_one_process_gets(folder: Path, job: str, world_size: int) -> None:
    expected = edit(*models())
    for every in sync_worker.seen_by_ranks(folder, "every", world_size):
        seen: Any = every[job]
        assert_same(seen, expected)
        assert {key: set(names) for key, names in seen["untouched"].items()} == {key: set(LEFT_ALONE) for key in EDITED}
        assert seen["tied"] is True
        assert seen.get("num_files", 27) == 9 * len(EDITED)


@NEEDS_GLOO
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_error_on_one_rank_is_one_on_all(folder: Path, world_size: int) -> None:
    said = f"Expected finite weights, but '{NAN_IN}' of the fine-tuned model holds NaN or infinity."
    for every in sync_worker.seen_by_ranks(folder, "every", world_size):
        seen: Any = every["failing"]
        assert seen["error"] == said
        assert seen["num_threads after"] == seen["num_threads"]
        assert seen["after"] == 1
