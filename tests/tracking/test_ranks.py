"""The callback on several ranks: the numbers of one process, on every rank, whatever the data's number of samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_cka.functional import cka_interval, linear_jackknife
from lit_cka.functional.jackknife import MIN_SAMPLES
from tests import sync_worker
from tests.tracking import ranks_worker
from tests.tracking.helpers import BLOCKS, dataset, features, hand_cka
from tests.tracking.ranks_worker import CASES, NUM_UNEVEN, OPTIONS, Case

WORLD_SIZES = pytest.mark.parametrize("world_size", [3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `ranks_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("ranks")
    sync_worker.run_to_end(ranks_worker.__file__, folder, "forked", seconds=300)
    return folder


def seen_by_ranks(folder: Path, job: str, world_size: int) -> list[Any]:
    files = [folder / f"{job}-{world_size}-{rank}.json" for rank in range(world_size)]
    assert [file.name for file in files if not file.exists()] == []
    return [json.loads(file.read_text()) for file in files]


def by_hand(batches: list[Any], **options: Any) -> Any:
    reference, module = ranks_worker.models()
    doubled = [[x.double(), y] for x, y in batches]
    return pytest.approx(hand_cka(reference, module, BLOCKS, doubled, **options), abs=1e-9)


def check_intervals(record: Any, batches: list[Any], *, is_exact: bool) -> None:
    """Those of all samples in one process; none of fewer than an interval takes, nor of batches' estimates."""
    n = sum(len(batch[0]) for batch in batches)
    if not is_exact or n < MIN_SAMPLES:
        assert not record.get("low")
        return
    reference, module = ranks_worker.models()
    doubled = [[x.double(), y] for x, y in batches]
    before, after = features(reference, BLOCKS, doubled), features(module, BLOCKS, doubled)
    for name in BLOCKS:
        X, Y = torch.cat(before[name]), torch.cat(after[name])
        samples = linear_jackknife(Y, X)
        low, high = cka_interval(samples.value, n, samples)
        found = record["low"][name], record["high"][name]
        assert found == pytest.approx((low.item(), high.item()), abs=1e-6), (name, n)


def own_batches(case: Case, world_size: int) -> list[Any]:
    """All batches of the ranks, without the samples that are repeated, and not those of fewer than 4."""
    data, batches = dataset(case.num_samples, 1), []
    for rank in range(world_size):
        own = range(rank, case.num_samples, world_size)
        batches += [data[own[i : i + case.batch_size]] for i in range(0, len(own), case.batch_size)]
    return [batch for batch in batches if len(batch[0]) >= 4]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.num_samples} by {case.batch_size} {case.kind}")
def test_a_validation_has_the_scores_of_one_process_twice(folder: Path, case: Case) -> None:
    n, world_size = case.num_samples, 3
    if case.kind == "minibatch":
        batches = own_batches(case, world_size)
    elif case.kind == "dropping":
        batches = [dataset(n, 1)[: n // world_size * world_size]]
    elif case.kind == "limited":
        batches = [dataset(n, 1)[: case.batch_size * world_size]]
    else:
        batches = [dataset(n, 1)[:]]
    expected = by_hand(batches, **OPTIONS[case.kind])
    ranks = [seen[CASES.index(case)] for seen in seen_by_ranks(folder, "validated", world_size)]
    for seen in ranks:
        for record in seen["history"]:
            assert record["n"] == sum(len(batch[0]) for batch in batches)
            assert record["scores"] == expected
            check_intervals(record, batches, is_exact=case.kind != "minibatch")
        assert len(seen["history"]) == 2
        assert seen["history"][0]["scores"] == seen["history"][1]["scores"]
        assert seen["num_calls"] == 0  # its weights are exchanged into the live model, which runs
        assert seen["history"] == ranks[0]["history"]  # no rank differs by a bit
        assert seen["means"] == ranks[0]["means"]


@WORLD_SIZES
def test_too_few_samples_are_an_error_on_every_rank(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "too_few", world_size):
        assert seen.startswith("CKA takes at least 4 samples, but the dataset of validate dataloader 0 has 1")


@WORLD_SIZES
def test_data_that_change_on_one_rank_alone(folder: Path, world_size: int) -> None:
    before, after = dataset(NUM_UNEVEN, 1)[:], dataset(NUM_UNEVEN, 1)[:]
    after[0][-1] += 3
    ranks = seen_by_ranks(folder, "changed", world_size)
    for seen in ranks:
        for record, batch in zip(seen["history"], (before, after, after), strict=True):
            assert record["n"] == NUM_UNEVEN
            assert record["scores"] == by_hand([batch])
        assert seen["history"] == ranks[0]["history"]
        assert seen["num_calls"] == [0, 0, 0]  # its weights are exchanged into the live model


@WORLD_SIZES
def test_samples_that_are_left_out_are_counted_on_all_ranks(folder: Path, world_size: int) -> None:
    """The first one says so, though it is another that has them."""
    ranks = seen_by_ranks(folder, "missing", world_size)
    num_missing = ranks_worker.NUM_MISSING
    (text,) = ranks[0]["warned"]
    assert text.startswith(f"{num_missing} samples of validate dataloader 0 were not among those")
    for seen in ranks:
        assert [record["n"] for record in seen["history"]] == [NUM_UNEVEN, NUM_UNEVEN - num_missing]


@WORLD_SIZES
def test_an_evaluation_that_a_rank_takes_no_part_in_is_left_out(folder: Path, world_size: int) -> None:
    """No rank waits for another, then or in the next one."""
    ranks = seen_by_ranks(folder, "skipping", world_size)
    assert "some rank has no batches at all" in ranks[0]["warned"][0]
    for seen in ranks:
        assert [record["n"] for record in seen["history"]] == [NUM_UNEVEN]
        assert seen["history"] == ranks[0]["history"]


@WORLD_SIZES
def test_shares_of_other_sizes(folder: Path, world_size: int) -> None:
    ranks = seen_by_ranks(folder, "shared", world_size)
    for seen in ranks:
        assert [record["n"] for record in seen["history"]] == [NUM_UNEVEN] * 2
        for record in seen["history"]:
            assert record["scores"] == by_hand([dataset(NUM_UNEVEN, 1)[:]])
        assert seen == ranks[0]


@WORLD_SIZES
@pytest.mark.parametrize("estimator", ranks_worker.ESTIMATORS)
def test_samples_that_come_to_other_ranks(folder: Path, estimator: str, world_size: int) -> None:
    """What was recorded of them comes along; their batches stay together, which counts for the minibatch estimator."""
    ranks = [seen[estimator] for seen in seen_by_ranks(folder, "reshuffled", world_size)]
    assert all(history == ranks[0] for history in ranks)
    scores = []
    for epoch, record in enumerate(ranks[0]):
        batches = []
        for rank in range(world_size):
            sampler = ranks_worker.reshuffling(rank, world_size)
            sampler.set_epoch(epoch)
            places = enumerate(sampler)
            own = [index for place, index in places if rank + place * world_size < 44]  # without repeated ones
            size = ranks_worker.RESHUFFLED_SIZE
            batches += [sampler.dataset[own[start : start + size]] for start in range(0, len(own), size)]
        assert record["n"] == sum(len(batch[0]) for batch in batches) == 44
        assert record["scores"] == by_hand(batches, estimator=estimator)
        scores.append(record["scores"][BLOCKS[2]])
    assert len(scores) == 2
    assert (abs(scores[0] - scores[1]) < 1e-9) == (estimator == "exact")


@WORLD_SIZES
@pytest.mark.parametrize("kind", ["Gathering", "Allowing"])
def test_features_that_depend_on_the_other_samples_of_a_batch(folder: Path, kind: str, world_size: int) -> None:
    """Which is found out without ranks that wait for each other, whatever their steps do, and how many they are."""
    ranks = [seen[kind] for seen in seen_by_ranks(folder, "mixing", world_size)]
    assert len(ranks[0]["warned"]) == 1
    assert min(ranks[0]["history"][-1 if kind == "Gathering" else -2]["scores"].values()) < 0.99
    for seen in ranks:
        assert seen["history"] == ranks[0]["history"]
        assert seen["mean"] == ranks[0]["mean"]
        assert len(seen["history"]) == (8 if kind == "Allowing" else 4)


@WORLD_SIZES
def test_a_rank_without_samples(folder: Path, world_size: int) -> None:
    """Lightning calls no hook where it knows of it, so that the others would wait; else there is nothing to add."""
    for seen in seen_by_ranks(folder, "lacking", world_size):
        assert seen["probed"].startswith("Expected every rank to have batches to validate on, or none, but only some")
        for name in ("tracked", "other stage"):
            assert seen[name].startswith("no error")
        (record,) = seen["stream"]
        assert record["n"] == NUM_UNEVEN
        assert record["scores"] == by_hand([dataset(NUM_UNEVEN, 1)[:]])


@WORLD_SIZES
def test_a_reference_that_one_rank_lacks_is_an_error_on_all(folder: Path, world_size: int) -> None:
    for seen in seen_by_ranks(folder, "lacking", world_size):
        assert seen["file"].startswith("Expected a checkpoint file at")
        assert "-gone.pt" in seen["file"]


@pytest.mark.parametrize("world_size", [3, 1])
def test_a_fit_goes_on_with_another_number_of_ranks(folder: Path, world_size: int) -> None:
    """With more of them, some have nothing recorded, and ask the others."""
    expected = [(NUM_UNEVEN, by_hand([dataset(NUM_UNEVEN, 1)[:]]))]
    for seen in seen_by_ranks(folder, "continued", 2):
        assert [(record["n"], record["scores"]) for record in seen] == expected
    for seen in seen_by_ranks(folder, "continued", world_size):
        assert [(record["n"], record["scores"]) for record in seen] == 2 * expected


@WORLD_SIZES
def test_a_probe_counts_every_batch_once(folder: Path, world_size: int) -> None:
    ranks = seen_by_ranks(folder, "probed", world_size)
    for seen in ranks:
        assert seen == ranks[0]
        for num_samples in (NUM_UNEVEN, 10):
            records = seen[str(num_samples)]
            assert [record["n"] for record in records] == [num_samples] * 2
            for record in records:
                assert record["scores"] == by_hand([dataset(num_samples, 1)[:]])
        (shuffled,) = seen["shuffled"]
        assert (shuffled["n"], shuffled["scores"]) == (NUM_UNEVEN, by_hand([dataset(NUM_UNEVEN, 1)[:]]))
        assert {record["n"] for record in seen["fit"]} == {10}
        assert [record["step"] for record in seen["fit"]] == list(range(1, 1 + 2 * math.ceil(4 / world_size)))


@WORLD_SIZES
def test_a_fit_has_the_same_history_on_every_rank(folder: Path, world_size: int) -> None:
    """In `fit`, Lightning's DDP calls the LightningModule itself with the arguments of the step."""
    ranks = seen_by_ranks(folder, "fitted", world_size)
    for seen in ranks:
        assert seen == ranks[0]
        assert [(record["stage"], record["n"]) for record in seen["history"]] == [
            ("validate", NUM_UNEVEN),
            ("validate", NUM_UNEVEN),
            ("test", 10),
        ]
        scores = seen["history"][1]["scores"]
        expected = {f"cka/{name}": score for name, score in scores.items()}
        expected["cka/mean"] = sum(scores.values()) / len(scores)
        assert {key: seen["logged"][key] for key in expected} == pytest.approx(expected, abs=1e-6)
        assert seen["num_calls"] == 0  # its weights are exchanged into the live model


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddp_spawn", "ddp"))]
)
def test_processes_that_lightning_starts(folder: Path, strategy: str) -> None:
    if strategy != "ddp_fork":  # which was forked with the others
        sync_worker.run_to_end(ranks_worker.__file__, folder, strategy, seconds=120)
    fits, validations = (seen_by_ranks(folder, f"{strategy}-{stage}", 2) for stage in ("fit", "validate"))
    started_by = {"ddp_fork": "fork", "ddp_spawn": "spawn", "ddp": "script"}
    assert fits[0]["started by"] == validations[0]["started by"] == started_by[strategy]
    assert fits[0] == fits[1]
    assert [record["n"] for record in fits[0]["history"]] == [NUM_UNEVEN] * 2
    assert fits[0]["history"][0]["scores"] != fits[0]["history"][1]["scores"]
    assert validations[0] == validations[1]
    (record,) = validations[0]["history"]
    assert record["n"] == NUM_UNEVEN
    assert record["scores"] == by_hand([dataset(NUM_UNEVEN, 1)[:]])
