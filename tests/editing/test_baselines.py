"""Interpolation, soups and LiNeS against their formulas, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.editing.baselines import interpolate, lines, uniform_soup
from tests.oracles import float64

Weights = dict[str, Tensor]
BLOCKS = ["net.blocks.0", "net.blocks.1", "net.blocks.2"]


def models() -> tuple[Weights, Weights]:
    """A network of three blocks and a stem; with names that start like a block's, and a head of another size."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {
        "net.stem.weight": (4, 3, 2, 2),
        "net.stem.bias": (4,),
        **{f"net.blocks.{i}.{name}": (4, 5) for i in range(3) for name in ("fc.weight", "norm")},
        "net.blocks.10.fc.weight": (4, 5),
        "net.blocks.1_extra": (4, 5),
        "other.net.blocks.2.weight": (4, 5),
        "running_mean": (4,),
    }
    W0, W1 = ({name: randn(*shape) for name, shape in shapes.items()} for _ in range(2))
    for number, weights in enumerate((W0, W1)):
        weights["num_batches_tracked"] = torch.tensor(10 + 10 * number)
        weights["head.weight"] = randn(7 + number, 4)
    W1["new.weight"] = randn(2, 2)
    del W1["net.stem.bias"]
    W1["net.stem.bias"] = randn(4)  # in another place than in W0
    W0["gone.weight"] = randn(2, 2)
    return W0, W1


FINETUNED = {"num_batches_tracked", "head.weight", "new.weight"}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation(alpha: float, dtype: torch.dtype) -> None:
    W0, W1 = ({name: W.to(dtype) if W.is_floating_point() else W for name, W in held.items()} for held in models())
    made = interpolate(W0, W1, alpha)
    assert list(made) == list(W1)
    for name, value in made.items():
        assert value.dtype == W1[name].dtype
        if name in FINETUNED:
            assert value is W1[name]
        else:
            expected = (1 - alpha) * float64(W0[name]) + alpha * float64(W1[name])
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
            if alpha == 0:
                assert torch.equal(value, W0[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W0, W1 = ({"W": (5 + torch.randn(300, generator=generator)).to(dtype)} for _ in range(2))
    for alpha in (0.0, 0.3, 0.9, 1.0, 1.5):
        (value,) = interpolate(W0, W1, alpha).values()
        expected = torch.lerp(W0["W"].double(), W1["W"].double(), alpha)
        assert value.dtype == dtype
        step = torch.finfo(dtype).eps
        assert ((value.double() - expected).abs() <= (0.5 * step + 1e-6) * expected.abs()).all()
        (mean,) = uniform_soup([W0, W1, W1]).values()
        assert mean.dtype == dtype
        assert torch.equal(mean, ((W0["W"].double() + 2 * W1["W"].double()) / 3).to(dtype))


def test_dtypes_of_the_two_models_may_differ() -> None:
    start, end = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])
    made = interpolate({"W": start.bfloat16()}, {"W": end.double()}, 0.25)["W"]
    assert made.dtype == torch.float64
    assert made.tolist() == [[1.5, 3.0]]
    for whole, other in ((start.int(), end), (start, end.int())):
        assert interpolate({"W": whole}, {"W": other}, 0.25)["W"] is other


def test_quantised_weights_are_the_fine_tuned_with_their_scales() -> None:
    def model(scale: float) -> Weights:
        whole = torch.full((4, 4), int(scale), dtype=torch.int8)
        return {"l.qweight": whole, "l.scales": torch.full((4, 1), scale), "m.weight": torch.full((4, 4), scale)}

    W0, W1 = model(1.0), model(3.0)
    made = {
        "wise_ft": interpolate(W0, W1, 0.5),
        "lines": lines(W0, W1, ["m"], alpha=0.5, beta=0.0),
        "soup": uniform_soup([W1, W0]),
    }
    for weights in made.values():
        assert weights["l.qweight"] is W1["l.qweight"]
        assert weights["l.scales"] is W1["l.scales"]
        assert torch.equal(weights["m.weight"], torch.full((4, 4), 2.0))


def test_parameters_are_left_alone_and_no_model_is_changed() -> None:
    held, before = models(), models()
    interpolate(*held, 0.3)
    lines(*held, BLOCKS, alpha=0.3, beta=0.7)
    uniform_soup([held[1], held[1]])
    for weights, copies in zip(held, before, strict=True):
        assert all(torch.equal(weights[name], copies[name]) for name in copies)


# Soups


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_soup_is_the_mean(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    checkpoints = [
        {name: torch.randn(W.shape, generator=generator) if W.is_floating_point() else W + i for name, W in W1.items()}
        for i, W1 in enumerate([models()[1]] * number)
    ]
    soup = uniform_soup(checkpoints)
    assert list(soup) == list(checkpoints[0])
    for name, value in soup.items():
        assert value.dtype == checkpoints[0][name].dtype
        if name == "num_batches_tracked":
            assert value.item() == 20  # of the first
        else:
            expected = np.mean([float64(weights[name]) for weights in checkpoints], axis=0)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_a_soup_is_summed_in_float64() -> None:
    (mean,) = uniform_soup([{"W": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]).values()
    assert mean.item() == pytest.approx(1 / 3, rel=1e-6)


def test_the_order_of_names_in_a_soup_does_not_matter() -> None:
    first, second = ({"a": torch.tensor([value]), "b": torch.tensor([3 * value])} for value in (1.0, 2.0))
    soup = uniform_soup([first, dict(reversed(second.items()))])
    assert {name: value.tolist() for name, value in soup.items()} == {"a": [1.5], "b": [4.5]}


def test_soups_of_nothing_or_of_different_models() -> None:
    with pytest.raises(ValueError, match="Expected `checkpoints` to hold at least one state dict, but it is empty"):
        uniform_soup([])
    W0, W1 = models()
    message = (
        r"Expected checkpoints of one architecture, but number 2 differs in gone.weight, head.weight, new.weight\."
    )
    with pytest.raises(ValueError, match=message):
        uniform_soup([W1, W1, W0])
    lacking = {name: value for name, value in W1.items() if not name.startswith("net.blocks")}
    with pytest.raises(ValueError, match=r"number 1 differs in net.blocks.0.fc.weight, (net\S+, ){3}net\S+\.$"):
        uniform_soup([W1, lacking])
    with pytest.raises(ValueError, match=r"number 1 differs in net.blocks.0.fc.weight"):
        uniform_soup([lacking, W1])


# LiNeS


def scaled(W0: Weights, W1: Weights, name: str, scale: float) -> np.ndarray:
    return float64(W0[name]) + scale * (float64(W1[name]) - float64(W0[name]))


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.6), (0.0, 1.0), (1.0, 0.0), (0.5, 1.5)])
def test_lines_scales_each_block_by_its_depth(alpha: float, beta: float) -> None:
    W0, W1 = models()
    made = lines(W0, W1, BLOCKS, alpha=alpha, beta=beta)
    assert list(made) == list(W1)
    by_hand = {"net.blocks.0.": alpha, "net.blocks.1.": alpha + beta / 2, "net.blocks.2.": alpha + beta}
    seen = set()
    for name, value in made.items():
        if name in FINETUNED:
            assert value is W1[name]
            continue
        start = name[: len("net.blocks.0.")]
        seen.add(start)
        # Outside of the blocks, net.blocks.10 and net.blocks.1_extra among it, by alpha.
        expected = scaled(W0, W1, name, by_hand.get(start, alpha))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    assert set(by_hand) < seen


def test_depth_is_the_order_of_the_names() -> None:
    W0, W1 = models()
    names = ["net.blocks.10", "net.blocks.2", "net.blocks.0", "net.stem", "net.blocks.1"]
    made = lines(W0, W1, names, alpha=0.1, beta=0.8)
    for depth, name in enumerate(
        ["net.blocks.10.fc.weight", "net.blocks.2.norm", "net.blocks.0.norm", "net.stem.bias"]
    ):
        np.testing.assert_allclose(made[name], scaled(W0, W1, name, 0.1 + 0.2 * depth), rtol=0, atol=1e-6)
    np.testing.assert_allclose(made["net.blocks.1.norm"], scaled(W0, W1, "net.blocks.1.norm", 0.9), rtol=0, atol=1e-6)
    np.testing.assert_allclose(made["running_mean"], scaled(W0, W1, "running_mean", 0.1), rtol=0, atol=1e-6)


def test_a_single_block_is_the_first() -> None:
    W0, W1 = models()
    made = lines(W0, W1, BLOCKS[1:2], alpha=0.3, beta=0.5)
    for name in ("net.blocks.1.norm", "net.blocks.0.norm"):
        np.testing.assert_allclose(made[name], scaled(W0, W1, name, 0.3), rtol=0, atol=1e-6)


def test_lines_without_slope_is_interpolation() -> None:
    W0, W1 = models()
    made, expected = lines(W0, W1, BLOCKS, alpha=0.7, beta=0.0), interpolate(W0, W1, 0.7)
    assert all(torch.equal(made[name], expected[name]) for name in W1)


def test_blocks_that_the_model_has_not() -> None:
    W0, W1 = models()
    with pytest.raises(ValueError, match="Expected `layer_names` to name the model's blocks, but it is empty"):
        lines(W0, W1, [], alpha=0.5, beta=0.5)
    for name in ("net.blocks.3", "blocks.0", "net.block", "net.blocks.0.", "running_mean"):
        with pytest.raises(ValueError, match=f"but no parameter is in '{name}'"):
            lines(W0, W1, ["net.blocks.0", name], alpha=0.5, beta=0.5)
