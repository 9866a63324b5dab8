"""Features of one layer's output: which layout and which mask, in float64, in memory of their own."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_cka.features.given_masks import MaskCall
from lit_cka.features.layer_pooling import LayerPooling, main_tensor

LAYER, PARENT = nn.Linear(6, 6), nn.Sequential()


def features(pooling: Any, output: Any, batch_sizes: set[int], masks: dict[str, Tensor] | None = None) -> Tensor:
    calls = {name: MaskCall({"attention_mask": mask}) for name, mask in (masks or {}).items()}
    return LayerPooling(pooling).features("a.b.c", LAYER, PARENT, output, batch_sizes, calls)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 100


def test_the_outermost_mask_of_the_right_shape_counts() -> None:
    output = randn(2, 3, 6)
    mask, other = torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = torch.stack([output[0, 0], output[1, 1:].mean(0)]).double()
    for masks in ({"": mask, "a": other}, {"": torch.ones(2, 5), "a": mask, "a.b": other}, {"x": other, "a": mask}):
        torch.testing.assert_close(features("mean", output, {2}, masks), expected)
    assert torch.equal(features("last", output, {2}, {"": other})[0], output[0, 1].double())


def test_a_mask_for_other_tokens_is_left_alone_with_one_warning() -> None:
    pooling, output = LayerPooling("mean"), randn(2, 3, 6)
    calls = {"": MaskCall({"attention_mask": torch.ones(2, 5)})}
    with pytest.warns(
        UserWarning, match=r"'a\.b\.c' has 3 positions, but the mask `attention_mask` is of shape \(2, 5\)"
    ):
        seen = pooling.features("a.b.c", LAYER, PARENT, output, {2}, calls)
    torch.testing.assert_close(seen, output.double().mean(1))
    pooling.features("a.b.c", LAYER, PARENT, output, {2}, calls)


def test_a_layout_is_found_once() -> None:
    """A batch of as many samples as tokens is read as those before it."""
    pooling, module = LayerPooling("mean"), nn.Identity()
    pooling.features("a", module, PARENT, randn(3, 2, 6), {2}, {})
    square = randn(2, 2, 6)
    assert torch.equal(pooling.features("a", module, PARENT, square, {2}, {}), square.double().mean(0))
    with pytest.raises(ValueError, match="can be read as NTC or TNC"):
        LayerPooling("mean").features("a", module, PARENT, square, {2}, {})


@pytest.mark.parametrize("pooling", ["cls", "flatten", lambda output: output[:, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_are_no_view_of_what_the_layer_returned(pooling: Any, dtype: torch.dtype) -> None:
    output = randn(2, 3, 6).to(dtype).requires_grad_()
    seen = features(pooling, output, {2})
    assert seen.dtype == torch.float64
    assert not seen.requires_grad
    before = seen.clone()
    with torch.no_grad():
        output.zero_()
    assert torch.equal(seen, before)


@pytest.mark.parametrize(
    ("pooling", "output", "message"),
    [
        ("mean", torch.ones(2, 3, dtype=torch.int64), r"layer 'a\.b\.c' to return .* a tensor of torch.int64"),
        ("mean", {"logits": randn(2, 3)}, "but it returned dict"),
        ("mean:NCHW", randn(2, 3, 6), r"the axes NCHW, but got shape \(2, 3, 6\)"),
        (lambda output: output[0, 0], randn(2, 3, 6), r"`pooling` to return .* shape \(2, 3, 6\), but got \(6,\)"),
        (lambda output: "none", randn(2, 3, 6), "but got str"),
    ],
)  # fmt: skip
def test_what_cannot_be_pooled(pooling: Any, output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features(pooling, output, {2})


def test_where_the_hidden_states_are() -> None:
    hidden = randn(2, 3)
    assert main_tensor(hidden) is hidden
    assert main_tensor((hidden, randn(1))) is hidden
    assert main_tensor([hidden]) is hidden
    assert main_tensor(OrderedDict(last_hidden_state=hidden, pooler_output=randn(1))) is hidden
    assert main_tensor(()) is main_tensor(None) is main_tensor({}) is main_tensor(((hidden,),)) is None
