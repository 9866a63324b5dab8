"""The reference's features by batch: found for the same inputs alone, within a budget, rounded about their mean."""

from __future__ import annotations

import lightning.pytorch  # noqa: F401  # so that warnings know the rank
import pytest
import torch
from torch import Tensor

from lit_cka.reference.cache import Batch, CacheDtype, ReferenceCache

CPU = torch.device("cpu")
CALL, MARK = "net", (3, "as it was")
FIRST, SECOND, THIRD = (Batch("validate", 0, index) for index in range(3))
OTHER_LOADER, OTHER_STAGE = Batch("validate", 1, 0), Batch("test", 0, 0)


def features(n: int = 8, d: int = 4, seed: int = 0, *, offset: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    randn = torch.randn(n + 1, d, dtype=torch.float64, generator=generator)
    return randn[:n] + offset * randn[n]


def filled(max_bytes: float = 1e9, dtype: CacheDtype = "float64", batches: int = 3) -> ReferenceCache:
    """With the first batches of the first dataloader, and one of another and of another stage."""
    cache = ReferenceCache(max_bytes, dtype)
    for index, batch in enumerate([*(FIRST, SECOND, THIRD)[:batches], OTHER_LOADER, OTHER_STAGE]):
        cache.keep(batch, CALL, MARK, {"a": features(seed=index), "b": features(d=2, seed=index)})
    return cache


def found(cache: ReferenceCache, batch: Batch, mark: object = MARK, call: str = CALL) -> dict[str, Tensor] | None:
    return cache.find(batch, call, mark, CPU)  # type: ignore[arg-type]


def test_features_are_found_as_they_were_for_the_same_inputs() -> None:
    cache = filled()
    for index, batch in enumerate((FIRST, SECOND, THIRD, OTHER_LOADER, OTHER_STAGE)):
        for _ in range(2):
            again = found(cache, batch)
            assert again is not None
            assert list(again) == ["a", "b"]
            assert torch.equal(again["a"], features(seed=index))
            assert torch.equal(again["b"], features(d=2, seed=index))
        assert cache.has(batch)


def test_nothing_is_found_for_other_batches_and_calls() -> None:
    cache = filled()
    for batch in (Batch("validate", 0, 3), Batch("validate", 2, 0), Batch("test", 1, 0)):
        assert found(cache, batch) is None
        assert not cache.has(batch)
        assert cache.recall(batch, "a", CPU) is None
    assert found(cache, FIRST, call="") is None
    assert found(cache, FIRST) is not None  # to ask for another call changes nothing


def test_two_calls_in_one_step_are_kept_apart() -> None:
    """Two encoders, say, that are called one after the other."""
    cache = ReferenceCache(1e9)
    cache.keep(FIRST, "left", 1, {"left.a": features(seed=1)})
    cache.keep(FIRST, "right", 2, {"right.a": features(seed=2)})
    for seed, side in ((1, "left"), (2, "right")):
        again = found(cache, FIRST, seed, side)
        assert again is not None
        assert list(again) == [f"{side}.a"]
        assert torch.equal(again[f"{side}.a"], features(seed=seed))
        recalled = cache.recall(FIRST, f"{side}.a", CPU)
        assert recalled is not None
        assert torch.equal(recalled, features(seed=seed))


def test_what_is_kept_first_stays() -> None:
    cache = filled()
    cache.keep(FIRST, CALL, MARK, {"a": features(seed=9), "b": features(d=2, seed=9)})
    again = found(cache, FIRST)
    assert again is not None
    assert torch.equal(again["a"], features(seed=0))


def test_inputs_without_a_fingerprint_are_not_kept() -> None:
    cache = ReferenceCache(1e9)
    cache.keep(FIRST, CALL, None, {"a": features()})
    assert not cache.has(FIRST)
    assert found(cache, FIRST, None) is None


def test_zero_bytes_keep_nothing() -> None:
    cache = filled(max_bytes=0)  # and without a warning
    assert not any(map(cache.has, (FIRST, OTHER_LOADER)))
    assert found(cache, FIRST) is None
    assert not ReferenceCache(0, "bfloat16").rounds


# Data that change.


def test_other_inputs_than_before_end_the_cache_for_their_dataloader() -> None:
    cache = filled()
    assert found(cache, FIRST) is not None
    with pytest.warns(UserWarning, match="Batch 1 of validate dataloader 0 is not what it was") as seen:
        assert found(cache, SECOND, "changed") is None
    assert len(seen) == 1
    # From here on without a warning, as warnings are errors; and also for those that have not changed.
    for batch in (FIRST, SECOND, THIRD):
        assert found(cache, batch) is None
        assert found(cache, batch, "changed") is None
        assert not cache.has(batch)
    assert found(cache, OTHER_LOADER) is not None
    assert found(cache, OTHER_STAGE) is not None


def test_what_was_found_in_this_pass_can_be_recalled_until_it_is_forgotten() -> None:
    cache = filled()
    with pytest.warns(UserWarning, match="is not what it was"):
        found(cache, SECOND, "changed")
    for index, batch in enumerate((FIRST, SECOND)):
        recalled = cache.recall(batch, "a", CPU)
        assert recalled is not None
        assert torch.equal(recalled, features(seed=index))
    cache.forget_changing()
    for batch in (FIRST, SECOND, THIRD):
        assert cache.recall(batch, "a", CPU) is None
    assert found(cache, OTHER_LOADER) is not None
    assert found(cache, OTHER_STAGE) is not None


def test_changing_data_are_never_kept_again() -> None:
    cache = filled()
    with pytest.warns(UserWarning, match="is not what it was"):
        found(cache, SECOND, "changed")
    for _ in range(2):
        cache.keep(SECOND, CALL, "changed", {"a": features()})
        cache.keep(Batch("validate", 0, 7), CALL, MARK, {"a": features()})
        assert not cache.has(SECOND)
        assert not cache.has(Batch("validate", 0, 7))
        cache.forget_changing()


def test_every_changing_dataloader_is_named_once() -> None:
    cache = filled()
    for batch, text in ((FIRST, "Batch 0 of validate dataloader 0"), (OTHER_STAGE, "Batch 0 of test dataloader 0")):
        with pytest.warns(UserWarning, match=text) as seen:
            found(cache, batch, "changed")
        assert len(seen) == 1


@pytest.mark.parametrize("drop", ["forget", "forget_changing", "stop_rounding"])
def test_what_is_dropped_makes_room(drop: str) -> None:
    cache = filled(max_bytes=5 * features().nbytes * 1.5)
    if drop == "forget":
        cache.forget("validate", 0)
    elif drop == "stop_rounding":
        cache.stop_rounding()
    else:
        with pytest.warns(UserWarning, match="is not what it was"):
            found(cache, FIRST, "changed")
        cache.forget_changing()
    assert not cache.has(FIRST)
    assert cache.has(OTHER_LOADER) == (drop != "stop_rounding")
    for index in range(1, 4):  # as much as the three batches before
        cache.keep(Batch("validate", 1, index), CALL, MARK, {"a": features(), "b": features(d=2)})
        assert cache.has(Batch("validate", 1, index))


# The budget.


def test_a_budget_keeps_the_first_batches_and_says_so_once() -> None:
    cache = ReferenceCache(2.5 * features().nbytes)

    def keep(indices: range) -> None:
        for index in indices:
            cache.keep(Batch("validate", 0, index), CALL, MARK, {"a": features(seed=index)})

    keep(range(2))
    with pytest.warns(UserWarning, match="take more than the .* GiB of `cache_memory`") as seen:
        keep(range(2, 5))
    assert len(seen) == 1
    keep(range(5))  # the next pass
    assert [cache.has(Batch("validate", 0, index)) for index in range(5)] == [True, True, False, False, False]
    again = found(cache, SECOND)
    assert again is not None
    assert torch.equal(again["a"], features(seed=1))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_budget_is_in_bytes_of_what_is_kept(dtype: CacheDtype) -> None:
    n, d, budget = 64, 16, 3.5 * 64 * 16 * 8
    cache = ReferenceCache(budget, dtype)

    def fill() -> None:
        for index in range(40):
            cache.keep(Batch("validate", 0, index), CALL, MARK, {"a": features(n, d, seed=index)})

    with pytest.warns(UserWarning, match="cache_memory"):
        fill()
    kept = sum(cache.has(Batch("validate", 0, index)) for index in range(40))
    # In bfloat16 a quarter, and the batch's mean in float64.
    assert kept == (3 if dtype == "float64" else budget // (n * d * 2 + d * 8))


def test_a_later_smaller_batch_may_still_fit() -> None:
    cache = ReferenceCache(1.5 * features().nbytes)
    cache.keep(FIRST, CALL, MARK, {"a": features()})
    with pytest.warns(UserWarning, match="cache_memory"):
        cache.keep(SECOND, CALL, MARK, {"a": features()})
    cache.keep(THIRD, CALL, MARK, {"a": features(3)})
    assert [cache.has(batch) for batch in (FIRST, SECOND, THIRD)] == [True, False, True]


# Rounding.


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_bfloat16_rounds_the_offsets_from_the_mean_of_the_batch(offset: float) -> None:
    exact = features(50, 6, offset=offset) * torch.tensor([1.0, 1e-3, 1e3, 1.0, 1.0, 1.0])
    cache = ReferenceCache(1e9, "bfloat16")
    assert cache.rounds
    cache.keep(FIRST, CALL, MARK, {"a": exact})
    again = found(cache, FIRST)
    assert again is not None
    assert again["a"].dtype == torch.float64
    offsets = exact - exact.mean(dim=0)
    error = (again["a"] - exact).abs()
    assert (error <= 2**-8 * offsets.abs() + 1e-11 * exact.abs()).all()  # of the spread, whatever the mean
    assert error.max() > 1e-4 * offsets.abs().max()  # it does round
    recalled = cache.recall(FIRST, "a", CPU)
    assert recalled is not None
    assert torch.equal(recalled, again["a"])


def test_bfloat16_leaves_constant_features_and_single_samples_exact() -> None:
    cache = ReferenceCache(1e9, "bfloat16")
    constant = features(1, 3, offset=1e4).repeat(16, 1)  # 16: their mean is exact
    cache.keep(FIRST, CALL, MARK, {"a": constant, "b": features(1, 3), "c": features(0, 3)})
    again = found(cache, FIRST)
    assert again is not None
    assert torch.equal(again["a"], constant)
    assert torch.equal(again["b"], features(1, 3))
    assert again["c"].shape == (0, 3)


def test_float64_does_not_round() -> None:
    assert not ReferenceCache(1e9).rounds


def test_rounding_can_be_given_up() -> None:
    cache = filled(dtype="bfloat16")
    cache.stop_rounding()
    assert not cache.rounds
    for batch in (FIRST, OTHER_LOADER, OTHER_STAGE):
        assert not cache.has(batch)
        assert found(cache, batch) is None
    cache.keep(FIRST, CALL, MARK, {"a": features(offset=1e4)})
    again = found(cache, FIRST)
    assert again is not None
    assert torch.equal(again["a"], features(offset=1e4))
