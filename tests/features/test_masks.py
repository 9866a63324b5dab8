"""Which mask a module is called with, whatever way it is passed; what marks a token is nonzero in what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_cka.features.masks import find_mask

KEPT = torch.tensor([[1, 1, 0], [1, 0, 0]])  # samples by tokens


class Text(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return input_ids


class Encoder(nn.Module):
    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return src


class Open(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


class Images(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


IDS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("module", "args", "kwargs"),
    [
        (Text, (IDS, KEPT), {}),
        (Text, (IDS,), {"attention_mask": KEPT}),
        (Text, (), {"scale": 2.0, "attention_mask": KEPT, "input_ids": IDS}),
        (Open, (IDS,), {"attention_mask": KEPT}),
        (Open, ({"input_ids": IDS, "attention_mask": KEPT},), {}),
        (Images, ({"input_ids": IDS, "attention_mask": KEPT},), {}),
        (Encoder, (IDS,), {"src_key_padding_mask": KEPT == 0}),
        (Encoder, (IDS, None, KEPT == 0), {}),
        (nn.TransformerEncoderLayer, (IDS,), {"src_key_padding_mask": KEPT == 0}),
        (nn.MultiheadAttention, (IDS, IDS, IDS), {"key_padding_mask": KEPT == 0}),
    ],
)
def test_the_mask_that_is_passed(module: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    takes_mask, mask = find_mask(module, args, kwargs)
    assert takes_mask
    assert mask is not None
    assert torch.equal(mask != 0, KEPT != 0)


@pytest.mark.parametrize(
    ("module", "args", "kwargs", "takes_mask"),
    [
        (Text, (IDS,), {}, True),
        (Text, (IDS, None), {}, True),
        (Text, (IDS,), {"attention_mask": [1, 1, 0]}, True),
        (Encoder, (IDS, KEPT), {}, True),  # `mask` there is one of positions by positions
        (Images, (IDS,), {}, False),
        (Open, (IDS,), {"images": IDS}, False),
    ],
)
def test_no_mask(module: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], takes_mask: bool) -> None:
    assert find_mask(module, args, kwargs) == (takes_mask, None)


def test_arguments_that_do_not_fit_are_read_by_name() -> None:
    _, mask = find_mask(Text, (IDS, KEPT, 1.0, "too", "many"), {"attention_mask": KEPT})
    assert mask is KEPT
