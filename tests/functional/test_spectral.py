"""The split of an update against a full SVD in NumPy, on the shapes of real models and on what updates can be like."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_cka.functional import spectral, update_gram
from lit_cka.functional.rank_rules import RULES, RankRule, split_rank
from lit_cka.functional.spectral import Coefficients, SpectralSplit, coefficients, low_rank_split, spectral_split
from tests import oracles
from tests.oracles import float64

# Every shape of a weight that is edited in CLIP's ViT-B-32, convnext_small and GPT-2; of Llama, at an eighth.
SHAPES = {
    "ViT-B-32 conv1": (768, 3, 32, 32),
    "ViT-B-32 in_proj": (2304, 768),
    "ViT-B-32 out_proj": (768, 768),
    "ViT-B-32 c_proj": (768, 3072),
    "ViT-B-32 proj": (768, 512),
    "ViT-B-32 positional": (50, 768),
    "convnext stem": (96, 3, 4, 4),
    "convnext depthwise": (96, 1, 7, 7),
    "convnext fc1": (384, 96),
    "convnext fc2": (96, 384),
    "convnext downsample": (192, 96, 2, 2),
    "convnext depthwise, last": (768, 1, 7, 7),
    "convnext fc1, third": (1536, 384),
    "GPT-2 positions": (1024, 768),
    "Llama q_proj": (256, 256),
    "Llama k_proj": (64, 256),
    "Llama gate_proj": (704, 256),
    "Llama down_proj": (256, 704),
}
LARGE = {
    "ViT-B-32 c_fc": (3072, 768),
    "GPT-2 c_attn": (768, 2304),
    "Llama q_proj": (2048, 2048),
    "Llama k_proj": (512, 2048),
    "Llama gate_proj": (5632, 2048),
    "Llama down_proj": (2048, 5632),
    "GPT-2 tokens": (50257, 768),
}
SETTINGS: list[tuple[RankRule, float]] = [
    ("effective_rank", 0.9), ("freevariance", 0.9), ("vetterli", 0.1),
    ("energy", 0.8), ("variance", 0.8), ("energy", 0.9), ("energy", 0.5), ("energy", 1.0), ("energy", 1e-9),
]  # fmt: skip
SMALL_SHAPES = [(48, 80), (80, 48), (32, 32), (24, 3, 5, 5), (40, 1, 3, 3), (6, 50, 2)]
VARIANTS = ("monosoup", "highonly", "lowonly")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def low_rank(shape: tuple[int, ...], rank: int, seed: int = 1) -> Tensor:
    """Of the given rank, with a spectral norm around 1 and singular values that fall off."""
    rest = math.prod(shape[1:])
    rank = min(rank, shape[0], rest)
    falling = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    left, right = randn(shape[0], rank, seed=seed), randn(rank, rest, seed=seed + 1)
    return (left * falling @ right / math.sqrt(shape[0] * rest)).reshape(shape)


def noise(shape: tuple[int, ...], seed: int = 2) -> Tensor:
    """Without structure, with a Frobenius norm around 1."""
    return randn(*shape, seed=seed) / math.sqrt(math.prod(shape))


def weights(shape: tuple[int, ...], update: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A pretrained weight whose entries are about as large as those of a linear layer, and the fine-tuned one."""
    W0 = (randn(*shape, seed=3) / math.sqrt(math.prod(shape[1:]))).to(dtype)
    return W0, (W0.double() + update).to(dtype)


def matrix_norm(W: np.ndarray) -> float:
    return float(np.linalg.norm(W.ravel()))


def assert_is_the_oracle_s(
    W0: Tensor,
    W1: Tensor,
    settings: list[tuple[RankRule, float]],
    tolerance: float = 1e-5,
    lambda_tolerance: float = 1e-5,
    scale: float | None = None,
) -> None:
    """Ranks, coefficients and the three edited weights; differences relative to the weight, or to `scale`."""
    svd = oracles.update_svd(W0, W1)
    for rule, R in settings:
        split = spectral_split(W0, W1, rule=rule, R=R)
        assert isinstance(split, SpectralSplit)
        k = oracles.monosoup_rank(svd[1], rule, R)
        assert (split.rank, split.num_singular_values) == (k, len(svd[1])), (rule, R)
        expected = oracles.monosoup_coefficients(svd[1], k)
        np.testing.assert_allclose(split.coefficients, expected, rtol=0, atol=lambda_tolerance, err_msg=f"{rule} {R}")
        change = matrix_norm(svd[1]) / matrix_norm(float64(W0)) if W0.any() else math.inf
        assert split.relative_change == pytest.approx(change, rel=1e-7)
        made = edited(split, W0, W1)
        for variant, oracle in oracles.monosoup_weights(W0, svd, k, *expected[2:]).items():
            assert (made[variant].shape, made[variant].dtype) == (W1.shape, W1.dtype)
            difference = matrix_norm(float64(made[variant]) - oracle)
            assert difference <= tolerance * (scale or matrix_norm(oracle)), (variant, rule, R)


def edited(split: SpectralSplit, W0: Tensor, W1: Tensor) -> dict[str, Tensor]:
    _, _, high, low = split.coefficients
    return dict(zip(VARIANTS, split.edited_weights(W0, W1, [(high, low), (1.0, 0.0), (0.0, 1.0)]), strict=True))


def split_of(W0: Tensor, W1: Tensor, rule: RankRule = "effective_rank", R: float = 0.9) -> SpectralSplit:
    split = spectral_split(W0, W1, rule=rule, R=R)
    assert isinstance(split, SpectralSplit)
    return split


def orthonormal(rows: int, columns: int, seed: int = 4) -> Tensor:
    size = max(rows, columns)
    return torch.linalg.qr(randn(size, size, seed=seed))[0][:rows, :columns].contiguous()


# Formulas


def test_the_formulas_by_hand() -> None:
    """s = 4, 2, 1."""
    W0, W1 = torch.zeros(3, 4), torch.tensor([[0.0, 2, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1]])
    split = split_of(W0, W1, "energy", 0.8)
    assert (split.rank, split.num_singular_values) == (2, 3)
    low = 1 / 16 + 15 / 16 * math.sqrt(1 / 21)
    assert split.coefficients == pytest.approx((20 / 21, 1 / 16, 1 - low, low), abs=1e-12)
    made = edited(split, W0, W1)
    assert split.coefficients._fields == Coefficients._fields == ("energy", "rho", "lambda_high", "lambda_low")
    high, rest = torch.tensor([[0.0, 2, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]]), torch.zeros(3, 4)
    rest[2, 3] = 1
    torch.testing.assert_close(made["highonly"], high, atol=1e-6, rtol=0)
    torch.testing.assert_close(made["lowonly"], rest, atol=1e-6, rtol=0)
    torch.testing.assert_close(made["monosoup"], (1 - low) * high + low * rest, atol=1e-6, rtol=0)


def test_the_effective_rank_by_hand() -> None:
    """s = 10, 2, 1: exp(H) = 1.988, but 4, 2, 1: 2.6, where all is high and rho is 0."""
    p = np.array([10, 2, 1]) / 13
    assert np.exp(-(p * np.log(p)).sum()) == pytest.approx(1.988, abs=1e-3)
    low = 1 / 100 + 99 / 100 * math.sqrt(1 / 105)
    split = split_of(torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 10, 2])))
    assert split.rank == 2
    assert split.coefficients == pytest.approx((104 / 105, 1 / 100, 1 - low, low), abs=1e-12)
    split = split_of(torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 4, 2])))
    assert split.rank == 3
    assert split.coefficients == (1, 0, 1, 0)


def test_coefficients_by_hand() -> None:
    s = torch.tensor([4.0, 2, 1])
    low = 1 / 4 + 3 / 4 * math.sqrt(5 / 21)
    assert coefficients(s, 1) == pytest.approx((16 / 21, 1 / 4, 1 - low, low), abs=1e-15)
    assert coefficients(s, 3) == (1, 0, 1, 0)
    assert coefficients(torch.tensor([3.0]), 1) == (1, 0, 1, 0)
    tiny = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert coefficients(tiny, 1).lambda_low == pytest.approx(1e-9 + 1e-18, rel=1e-9)  # 1 - P_k would cancel to 0


@pytest.mark.parametrize(
    ("values", "R", "k"),
    [
        ([3, 1], 0.9, 1),  # reached exactly
        ([3, 1], 0.9 + 1e-9, 2),
        ([3, 1], 0.9 - 1e-9, 1),
        ([1, 1, 1, 1], 0.5, 2),
        ([1, 1, 1], 1 / 3, 1),
        ([3, 1, 0], 1, 2),
        ([3, 2, 1], 1, 3),
        ([3, 2, 1], 1e-300, 1),
        ([5], 0.5, 1),
        ([1, 1e-3, 1e-5], 1, 3),
        ([0.1] * 10, 0.7, 7),  # whose sums are no whole numbers
    ],
)
@pytest.mark.parametrize("rule", ["energy", "variance"])
def test_the_energy_rule(values: list[float], R: float, k: int, rule: RankRule) -> None:
    assert split_rank(torch.tensor(values, dtype=torch.float64), rule, R) == k


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([7], 1),
        ([7, 0, 0], 1),
        ([2, 2], 2),
        ([1] * 768, 768),
        ([0.1] * 5 + [0] * 9, 5),
        ([4, 2, 1], 3),
        ([10, 2, 1], 2),
        ([1, 1, 1e-3], 3),
        ([1, 1 - 1e-3, 0], 2),
        ([1e-30, 1e-30], 2),
        ([1e30, 1e30, 1e30], 3),
    ],
)
@pytest.mark.parametrize("rule", ["effective_rank", "freevariance", "vetterli"])
def test_the_effective_rank(values: list[float], k: int, rule: RankRule) -> None:
    assert split_rank(torch.tensor(values, dtype=torch.float64), rule) == k


def test_defaults() -> None:
    """The effective rank, and 0.9 of the energy."""
    values = torch.tensor([10.0, 5, 2])
    assert split_rank(values) == split_rank(values, "effective_rank") == 3
    assert split_rank(values, "energy") == split_rank(values, "energy", 0.9) == 2
    assert split_of(torch.zeros(3, 3), torch.diag(values)).rank == 3
    assert set(RULES) == {"effective_rank", "freevariance", "vetterli", "energy", "variance"}


# Against the oracle


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            shape, id=name, marks=[pytest.mark.slow] if name in ("ViT-B-32 c_proj", "ViT-B-32 in_proj") else []
        )
        for name, shape in SHAPES.items()
    ],
)
def test_shapes_of_real_models(shape: tuple[int, ...]) -> None:
    W0, W1 = weights(shape, low_rank(shape, 24) + 0.3 * noise(shape))
    assert_is_the_oracle_s(W0, W1, [("effective_rank", 0.9), ("energy", 0.8)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large_shapes_of_real_models(shape: tuple[int, ...]) -> None:
    W0, W1 = weights(shape, low_rank(shape, 64) + 0.3 * noise(shape))
    assert_is_the_oracle_s(W0, W1, [("effective_rank", 0.9), ("energy", 0.8)])


def kinds(shape: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    size, rest = shape[0], math.prod(shape[1:])
    W0, adapted = weights(shape, low_rank(shape, 4))
    lora = W0 + 2.0 * (randn(size, 4, seed=5).float() @ randn(4, rest, seed=6).float()).reshape(shape) / 300
    dead = (randn(*shape, seed=7) / 10).float()
    dead[::3] = 0
    spread = torch.logspace(0, -6, min(size, rest), dtype=torch.float64)
    falling = (orthonormal(size, len(spread)) * spread) @ orthonormal(len(spread), rest, seed=8)
    return {
        "low rank, rounded": (W0, adapted),
        "low rank and noise": weights(shape, low_rank(shape, 4) + 0.05 * noise(shape)),
        "noise": weights(shape, noise(shape)),
        "noise alone": (torch.zeros(shape), noise(shape).float() + 0.1 * low_rank(shape, 3).float()),
        "merged LoRA": (W0, lora),
        "rows unchanged": (W0, W0 + dead),
        "falling by six digits": weights(shape, falling.reshape(shape)),
        "tiny": weights(shape, 1e-7 * W0.double() * (1 + noise(shape))),
        "pretrained norm is huge": (1e4 * W0, 1e4 * W0 + low_rank(shape, 4).float()),
        "update is large": (W0, W0 + 100 * (low_rank(shape, 4) + 0.2 * noise(shape)).float()),
    }


KINDS = list(kinds((2, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_kinds_of_updates_under_all_rules(shape: tuple[int, ...], kind: str) -> None:
    W0, W1 = kinds(shape)[kind]
    assert_is_the_oracle_s(W0, W1, SETTINGS)


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_float64_keeps_its_digits(shape: tuple[int, ...]) -> None:
    W0, W1 = weights(shape, low_rank(shape, 4) + 0.1 * noise(shape), torch.float64)
    assert_is_the_oracle_s(W0, W1, SETTINGS, tolerance=1e-12, lambda_tolerance=1e-12)


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_more(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """No more is lost than by rounding the result, once."""
    W0, W1 = weights(shape, 0.3 * (low_rank(shape, 4) + 0.2 * noise(shape)), dtype)
    svd = oracles.update_svd(W0, W1)
    for rule, R in SETTINGS:
        split = split_of(W0, W1, rule, R)
        k = oracles.monosoup_rank(svd[1], rule, R)
        assert split.rank == k
        expected = oracles.monosoup_coefficients(svd[1], k)
        np.testing.assert_allclose(split.coefficients, expected, rtol=0, atol=1e-5)
        made = edited(split, W0, W1)
        for variant, oracle in oracles.monosoup_weights(W0, svd, k, *expected[2:]).items():
            assert made[variant].dtype == dtype
            half_a_step = np.spacing(np.abs(oracle).astype(np.float32)) * 2 ** (
                23 - (7 if dtype == torch.bfloat16 else 10)
            )
            smallest = 2.0**-25 if dtype == torch.float16 else 0.0  # half a step below its normal numbers
            allowed = np.maximum(half_a_step / 2, smallest) + 1e-6 * np.abs(float64(W1)).max()
            assert (np.abs(float64(made[variant]) - oracle) <= allowed).all()


def test_a_pretrained_weight_of_another_dtype() -> None:
    W0, W1 = weights((20, 30), low_rank((20, 30), 4) + 0.1 * noise((20, 30)))
    assert_is_the_oracle_s(W0.double(), W1, SETTINGS)
    assert_is_the_oracle_s(W0.bfloat16(), W1, SETTINGS)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 12),
    level=st.sampled_from([0.0, 1e-5, 1e-2, 1.0]),
    setting=st.sampled_from(SETTINGS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_small_update(
    rows: int, columns: int, rank: int, level: float, setting: tuple[RankRule, float], seed: int
) -> None:
    shape = (rows, columns)
    update = low_rank(shape, rank, seed=seed) + level * noise(shape, seed=seed + 3)
    W0, W1 = weights(shape, update)
    scale = matrix_norm(float64(W0)) + matrix_norm(float64(W1))  # one entry of an edited weight may be next to 0
    assert_is_the_oracle_s(W0, W1, [setting], scale=scale)


# Degenerate updates


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (64, 64), (300, 400)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_of_rank_one_from_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of whole numbers, so that it is of rank one to the last digit; rounding in the Gram matrix is not."""
    W1 = torch.outer(torch.arange(1, shape[0] + 1), torch.arange(3, shape[1] + 3) % 17 + 1).to(dtype)
    for rule, R in SETTINGS:
        split = split_of(torch.zeros_like(W1), W1, rule, R)
        assert split.rank == 1, (rule, R)
        assert split.relative_change == math.inf
        assert split.coefficients == pytest.approx((1, 0, 1, 0), abs=1e-6)
        torch.testing.assert_close(edited(split, torch.zeros_like(W1), W1)["monosoup"], W1)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_equal_singular_values(rank: int) -> None:
    """The effective rank is then the rank, whatever rounding does."""
    update = orthonormal(20, rank) @ orthonormal(rank, 30, seed=5)
    split = split_of(torch.zeros(20, 30, dtype=torch.float64), update)
    assert (split.rank, split.num_singular_values) == (rank, 20)
    assert split.coefficients == pytest.approx((1, 0, 1, 0), abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_an_orthogonal_update_is_high_in_full(size: int) -> None:
    W0 = randn(size, size)
    for update in (orthonormal(size, size), torch.eye(size, dtype=torch.float64)):
        for dtype in (torch.float32, torch.float64):
            start, end = W0.to(dtype), (W0 + update).to(dtype)
            split = split_of(start, end, "energy", 1.0)
            assert split.rank == size
            assert split.coefficients == (1, 0, 1, 0)
            torch.testing.assert_close(edited(split, start, end)["monosoup"], end)
            torch.testing.assert_close(edited(split, start, end)["lowonly"], start, rtol=0, atol=1e-6)
        assert split_of(torch.zeros_like(update), update).rank == size
        assert split_of(W0, W0 + update, "energy", 0.5).rank == math.ceil(size / 2)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (1, 3, 2, 2), (5, 1, 1, 1)], ids=str)
def test_a_single_singular_value(shape: tuple[int, ...]) -> None:
    W0, W1 = weights(shape, noise(shape))
    for rule, R in SETTINGS:
        split = split_of(W0, W1, rule, R)
        assert (split.rank, split.num_singular_values, split.coefficients) == (1, 1, (1, 0, 1, 0))
        made = edited(split, W0, W1)
        for variant, expected in {"monosoup": W1, "highonly": W1, "lowonly": W0}.items():
            torch.testing.assert_close(made[variant], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 17])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_updates_that_lack_ranks_in_float64(shape: tuple[int, int], rank: int) -> None:
    """What rounding leaves of the missing singular values moves lambda by 1e-8, and no weight by more."""
    W0, W1 = weights(shape, low_rank(shape, rank), torch.float64)
    assert_is_the_oracle_s(W0, W1, SETTINGS[:6], tolerance=1e-7, lambda_tolerance=1e-7)


def test_rounding_that_could_change_the_rank_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Gram matrix alone, singular values of 0 come out near 1e-8, and each counts as a bit of rank."""
    W1 = torch.outer(torch.arange(1, 51), torch.arange(3, 73) % 17 + 1).float()
    W0 = torch.zeros_like(W1)
    assert split_of(W0, W1).rank == oracles.monosoup_rank(oracles.update_svd(W0, W1)[1], "effective_rank", 1) == 1
    monkeypatch.setattr(spectral, "is_rank_doubtful", lambda s, errors: False)
    assert split_of(W0, W1).rank == 2


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)], ids=str)
@pytest.mark.parametrize("rank", [2, 5, 9])
@pytest.mark.parametrize(("last", "next_one", "more"), [(1 - 5e-4, 0.0, 0), (1.0, 1e-9, 1)], ids=["below", "above"])
def test_ranks_next_to_a_whole_number(
    last: float, next_one: float, more: int, rank: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near enough to it that rounding in the Gram matrix would matter; not to what an SVD takes for it."""
    values = torch.zeros(30, dtype=torch.float64)
    values[: rank - 1], values[rank - 1], values[rank] = 1, last, next_one
    W1 = (orthonormal(shape[0], 30) * values) @ orthonormal(30, shape[1], seed=5)
    W0 = torch.zeros_like(W1)
    assert oracles.monosoup_rank(oracles.update_svd(W0, W1)[1], "effective_rank", 1) == rank + more
    assert split_of(W0, W1).rank == rank + more
    asked: list[Tensor] = []
    monkeypatch.setattr(spectral, "is_rank_doubtful", lambda s, errors: asked.append(s))
    assert split_of(W0, W1).rank == rank + 1
    split_of(W0, W1, "energy")
    assert len(asked) == 1  # small singular values don't matter to the energy


@pytest.mark.parametrize("shape", [(96, 384), (300, 200)], ids=str)
def test_real_updates_need_no_second_decomposition(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("a second decomposition")

    monkeypatch.setattr(torch.linalg, "svdvals", refuse)
    for update in (low_rank(shape, 8) + 0.1 * noise(shape), noise(shape), low_rank(shape, 8)):
        split_of(*weights(shape, update))


# Memory layout, chunks, devices


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (12, 4, 3, 3), (30, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("rule", ["effective_rank", "energy"])
def test_chunks_change_nothing(
    shape: tuple[int, ...], size: int, rule: RankRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    W0, W1 = weights(shape, low_rank(shape, 5) + 0.1 * noise(shape), torch.float64)
    whole = split_of(W0, W1, rule)
    expected = edited(whole, W0, W1)
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", size)
    split = split_of(W0, W1, rule)
    assert split.rank == whole.rank
    assert split.coefficients == pytest.approx(whole.coefficients, abs=1e-12)
    assert split.relative_change == pytest.approx(whole.relative_change, rel=1e-13)
    for variant, value in edited(split, W0, W1).items():
        torch.testing.assert_close(value, expected[variant], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_the_last_may_take_the_memory_of_the_finetuned_weight(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", 100)  # several, each of which is read before it is written
    W0, W1 = weights(shape, low_rank(shape, 5) + 0.1 * noise(shape), dtype)
    split = split_of(W0, W1)
    wanted: list[tuple[float, float]] = [(1.0, 0.0), (0.3, 0.6), (0.0, 1.0)]
    for order in (wanted, wanted[::-1], wanted[1:2]):
        expected, own = split.edited_weights(W0, W1, order), W1.clone()
        found = split.edited_weights(W0, own, order, overwrite=True)
        assert [value.data_ptr() == own.data_ptr() for value in found] == [False] * (len(order) - 1) + [True]
        for value, wish in zip(found, expected, strict=True):
            assert torch.equal(value, wish)
    aside = W1.T.contiguous().T  # no place to write rows to
    assert split.edited_weights(W0, aside, wanted, overwrite=True)[-1].data_ptr() != aside.data_ptr()
    assert torch.equal(aside, W1)


def test_weights_that_are_not_contiguous() -> None:
    W0, W1 = weights((12, 4, 3, 3), low_rank((12, 4, 3, 3), 5) + 0.1 * noise((12, 4, 3, 3)))
    expected = edited(split_of(W0, W1), W0, W1)
    last = torch.channels_last
    for start, end in ((W0.to(memory_format=last), W1), (W0, W1.to(memory_format=last))):
        for variant, value in edited(split_of(start, end), start, end).items():
            assert torch.equal(value, expected[variant])
    start, end = (W.reshape(12, 36).T.contiguous().T for W in (W0, W1))
    assert not end.is_contiguous()
    for variant, value in edited(split_of(start, end), start, end).items():
        assert torch.equal(value, expected[variant].reshape(12, 36))


def test_parameters_are_left_alone_and_no_gradient_follows() -> None:
    W0, W1 = (torch.nn.Parameter(W) for W in weights((9, 12), noise((9, 12))))
    before = [W.detach().clone() for W in (W0, W1)]
    made = edited(split_of(W0, W1), W0, W1)
    assert torch.equal(W0, before[0])
    assert torch.equal(W1, before[1])
    assert not any(value.requires_grad or isinstance(value, torch.nn.Parameter) for value in made.values())


# Properties

some_updates = st.tuples(
    st.integers(1, 10), st.integers(1, 10), st.sampled_from([0.0, 1e-3, 0.3]), st.integers(0, 2**32 - 1)
)


def small(rows: int, columns: int, level: float, seed: int) -> tuple[Tensor, Tensor]:
    shape = (rows, columns)
    return weights(shape, low_rank(shape, 3, seed=seed) + level * noise(shape, seed=seed + 5), torch.float64)


@settings(max_examples=40, deadline=None)
@given(update=some_updates, setting=st.sampled_from(SETTINGS))
def test_the_parts_add_up(update: tuple[int, int, float, int], setting: tuple[RankRule, float]) -> None:
    W0, W1 = small(*update)
    split = split_of(W0, W1, *setting)
    finetuned, pretrained, high, low, twice = split.edited_weights(W0, W1, [(1, 1), (0, 0), (1, 0), (0, 1), (2, -0.5)])
    close = {"rtol": 0, "atol": 1e-13 * max(len(W0), 5)}
    torch.testing.assert_close(finetuned, W1, **close)
    torch.testing.assert_close(pretrained, W0, **close)
    torch.testing.assert_close(high + low - W0, W1, **close)
    torch.testing.assert_close(twice, W0 + 2 * (high - W0) - 0.5 * (low - W0), **close)
    # Orthogonal parts, of which the high one has the share P_k of the energy.
    assert ((high - W0) * (low - W0)).sum().item() == pytest.approx(0, abs=1e-8)
    energy = ((high - W0).square().sum() / (W1 - W0).square().sum()).item()
    assert energy == pytest.approx(split.coefficients.energy, abs=1e-9)
    assert torch.linalg.matrix_rank(high - W0, atol=1e-7).item() <= split.rank


@settings(max_examples=40, deadline=None)
@given(update=some_updates, setting=st.sampled_from(SETTINGS), exponent=st.integers(-20, 20))
def test_scaled_updates_are_split_alike(
    update: tuple[int, int, float, int], setting: tuple[RankRule, float], exponent: int
) -> None:
    W0, W1 = small(*update)
    nothing = torch.zeros_like(W0)
    split, scaled = split_of(nothing, W1 - W0, *setting), split_of(nothing, 2.0**exponent * (W1 - W0), *setting)
    assert scaled.rank == split.rank
    assert scaled.coefficients == pytest.approx(split.coefficients, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(update=some_updates, setting=st.sampled_from(SETTINGS[:6]))
def test_transposed_and_rotated_updates_are_split_alike(
    update: tuple[int, int, float, int], setting: tuple[RankRule, float]
) -> None:
    W0, W1 = small(*update)
    Q = orthonormal(len(W0), len(W0))
    split = split_of(W0, W1, *setting)
    ways = {"transposed": (W0.T, W1.T, lambda W: W.T), "rotated": (Q @ W0, Q @ W1, lambda W: Q.T @ W)}
    for way, (start, end, back) in ways.items():
        other = split_of(start, end, *setting)
        assert other.rank == split.rank, way
        assert other.coefficients == pytest.approx(split.coefficients, abs=1e-6), way
        assert other.relative_change == pytest.approx(split.relative_change, rel=1e-9), way
        for variant, value in edited(split, W0, W1).items():
            torch.testing.assert_close(back(edited(other, start, end)[variant]), value, rtol=0, atol=1e-6)


# No split


def test_no_update_and_small_ones() -> None:
    W0, W1 = weights((9, 12), 0.01 * noise((9, 12)), torch.float64)
    change = matrix_norm(float64(W1 - W0)) / matrix_norm(float64(W0))
    assert spectral_split(W1, W1) == 0.0
    assert spectral_split(torch.zeros(3, 2), torch.zeros(3, 2)) == 0.0
    assert spectral_split(torch.zeros(3, 2), torch.zeros(3, 2), min_rel_update=1.0) == 0.0
    assert spectral_split(W0, W1, min_rel_update=1.01 * change) == pytest.approx(change, rel=1e-9)
    assert isinstance(spectral_split(W0, W1, min_rel_update=0.99 * change), SpectralSplit)
    assert isinstance(spectral_split(torch.zeros_like(W1), W1, min_rel_update=1e9), SpectralSplit)  # from nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["W0", "W1", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite(bad: float, where: str, dtype: torch.dtype) -> None:
    W0, W1 = weights((5, 6), noise((5, 6)), dtype)
    for W, name in ((W0, "W0"), (W1, "W1")):
        if where in (name, "both"):
            W[2, 3] = bad
    with pytest.raises(ValueError, match=r"Expected finite weights, but got NaN or infinity\."):
        spectral_split(W0, W1)


@pytest.mark.parametrize("rule", ["Energy", "", "rank"])
def test_rules_that_are_none(rule: str) -> None:
    W = torch.ones(2, 2)
    for call in (
        lambda: spectral_split(W, 2 * W, rule=rule),  # type: ignore[arg-type]
        lambda: low_rank_split(W, W, W0_norm=1.0, rule=rule),  # type: ignore[arg-type]
        lambda: split_rank(W[0], rule),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=f"Expected `rule` to be one of 'effective_rank', .*, but got '{rule}'"):
            call()


@pytest.mark.parametrize("R", [0.0, -0.1, 1.0001, 80.0, math.nan])
def test_shares_that_are_none(R: float) -> None:
    W = torch.ones(2, 2)
    for call in (
        lambda: spectral_split(W, 2 * W, R=R),
        lambda: low_rank_split(W, W, W0_norm=1.0, R=R),
        lambda: split_rank(W[0], "energy", R),
    ):
        with pytest.raises(ValueError, match=r"Expected `R`, a share of the energy, to be in \(0, 1\], but got"):
            call()


@pytest.mark.parametrize(
    ("W0", "W1", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"but got \(2, 3\) and \(3, 2\)"),
        (torch.ones(2, 3), torch.ones(2, 3, 1), r"but got \(2, 3\) and \(2, 3, 1\)"),
        (torch.ones(3), torch.ones(3), r"of two or more dimensions, but got \(3,\) and \(3,\)"),
        (torch.ones(()), torch.ones(()), r"but got \(\) and \(\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"but got \(0, 3\) and \(0, 3\)"),
        (torch.ones(2, 2).int(), torch.ones(2, 2), r"floating-point weights, but got torch.int32 and torch.float32"),
        (torch.ones(2, 2), torch.ones(2, 2).int(), r"floating-point weights, but got torch.float32 and torch.int32"),
    ],
)
def test_weights_that_have_no_split(W0: Tensor, W1: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_split(W0, W1)


# Low rank


@pytest.mark.parametrize(
    ("out", "rank", "rest"), [(30, 4, 50), (50, 4, 30), (20, 1, 20), (5, 8, 6), (4, 8, 9), (9, 8, 4)]
)
@pytest.mark.parametrize(("rule", "R"), SETTINGS)
def test_a_product_is_split_by_its_factors(out: int, rank: int, rest: int, rule: RankRule, R: float) -> None:
    spread = torch.logspace(0, -1, rank, dtype=torch.float64)
    B, A = randn(out, rank) * spread, randn(rank, rest, seed=1)
    W0 = randn(out, rest, seed=2)
    W1 = W0 + B @ A
    split = low_rank_split(B, A, W0_norm=float(W0.norm()), rule=rule, R=R)
    assert isinstance(split, SpectralSplit)
    U, s, Vh = np.linalg.svd(float64(B) @ float64(A), full_matrices=False)
    s[rank:] = 0
    k = oracles.monosoup_rank(s, rule, R)
    assert (split.rank, split.num_singular_values) == (k, min(out, rest))
    expected = oracles.monosoup_coefficients(s, k)
    assert split.coefficients == pytest.approx(expected, abs=1e-12)
    assert split.relative_change == pytest.approx(float((W1 - W0).norm() / W0.norm()), rel=1e-12)
    made = edited(split, W0, W1)
    for variant, oracle in oracles.monosoup_weights(W0, (U, s, Vh), k, *expected[2:]).items():
        np.testing.assert_allclose(made[variant], oracle, rtol=0, atol=1e-12)
    product = split_of(W0, W1, rule, R)
    assert product.rank == split.rank
    assert product.coefficients == pytest.approx(split.coefficients, abs=1e-6)
    for variant, value in edited(product, W0, W1).items():
        torch.testing.assert_close(value, made[variant], rtol=0, atol=1e-6)


def test_a_split_of_factors_edits_merged_weights() -> None:
    """As of LoRA in float32."""
    B, A, W0 = randn(40, 4).float(), randn(4, 60, seed=1).float(), randn(40, 60, seed=2).float()
    W1 = W0 + B @ A
    split = low_rank_split(B, A, W0_norm=float(W0.norm()), rule="energy", R=0.8)
    assert isinstance(split, SpectralSplit)
    product = edited(split_of(W0, W1, "energy", 0.8), W0, W1)
    for variant, value in edited(split, W0, W1).items():
        assert float((value - product[variant]).norm() / value.norm()) < 1e-5


def test_factors_without_update() -> None:
    zeros, B, A = torch.zeros(5, 2), torch.ones(5, 2), torch.ones(2, 6)
    assert low_rank_split(zeros, A, W0_norm=2.0) == 0.0
    assert low_rank_split(zeros, A, W0_norm=0.0) == 0.0
    split = low_rank_split(B, A, W0_norm=0.0)
    assert isinstance(split, SpectralSplit)
    assert (split.rank, split.relative_change) == (1, math.inf)


def test_factors_that_are_none() -> None:
    B, A = torch.ones(5, 2), torch.ones(2, 6)
    for first, second in ((B, B), (A, A), (B[0], A), (B, A[0]), (B[None], A)):
        with pytest.raises(ValueError, match=r"Expected `B` \(out, r\) and `A` \(r, rest\), but got \("):
            low_rank_split(first, second, W0_norm=1.0)
    for bad in (math.nan, math.inf):
        for first, second in ((torch.full_like(B, bad), A), (B, torch.full_like(A, bad))):
            with pytest.raises(ValueError, match=r"Expected finite weights, but got NaN or infinity\."):
                low_rank_split(first, second, W0_norm=1.0)
