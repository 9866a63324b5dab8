"""What a mask keeps, in every form in which models take one; never the opposite of what it means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_cka.features.masks import NAMES, names_of, tokens_kept

KEPT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # samples by tokens
BOOL = KEPT.bool()
MIN = torch.finfo(torch.float32).min
CAUSAL = torch.ones(4, 4).tril().bool()


def additive(drop: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(KEPT.shape, dtype=dtype).masked_fill(~BOOL, drop)


def by_queries(allowed: Tensor, *, heads: int = 1) -> Tensor:
    """(n, queries, keys) as (n, heads, queries, keys)."""
    return allowed[:, None].expand(-1, heads, -1, -1)


SEEN = BOOL[:, None] & torch.ones(4, 4).bool()
# What libraries do for scaled dot products: a query that could see nothing sees all.
CAUSAL_SEEN = BOOL[:, None] & CAUSAL
FINITE = CAUSAL_SEEN | ~CAUSAL_SEEN.any(-1, keepdim=True)


@pytest.mark.parametrize("name", ["attention_mask", "input_mask", "decoder_attention_mask", "mask", "attn_mask"])
@pytest.mark.parametrize(
    "mask",
    [
        *(KEPT.to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16)),
        KEPT * torch.tensor([2, 1, 1, 1]),  # global attention
        KEPT * 3,  # numbers of packed segments
        *(additive(drop) for drop in (-torch.inf, -1e9, -1e4, MIN)),
        additive(-65504.0, torch.float16),
        additive(-1e9).to(torch.int64),
        additive(-1e4) + 1e4 * torch.tensor([1.0, 0, 0, 0]) * BOOL,  # global attention, as it is added
        additive(-torch.inf)[:, None],
        additive(-1e9)[:, None, None],
        KEPT[:, None],
        KEPT[:, None, None],
        KEPT[:, :, None],
        by_queries(SEEN).long(),
        by_queries(SEEN, heads=3).float(),
        torch.where(by_queries(SEEN), 0.0, MIN),
        torch.where(by_queries(CAUSAL_SEEN), 0.0, -torch.inf),
        torch.where(by_queries(FINITE, heads=2), 0.0, MIN),
    ],
)
def test_masks_by_values(name: str, mask: Tensor) -> None:
    before = mask.clone()
    kept = tokens_kept(name, mask)
    assert kept is not None
    assert kept.dtype == torch.bool
    assert torch.equal(kept, BOOL)
    assert torch.equal(mask, before)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", BOOL),
        ("input_mask", BOOL),
        ("attention_mask", by_queries(FINITE)),
        ("key_padding_mask", ~BOOL),
        ("src_key_padding_mask", ~BOOL),
        ("src_key_padding_mask", 1 - KEPT),
        ("tgt_key_padding_mask", additive(-torch.inf)),
        ("key_padding_mask", additive(-1e9)),
        ("padding_mask", ~BOOL),
        ("tokens", KEPT),
        ("tokens", BOOL),
    ],
)
def test_masks_by_names(name: str, mask: Tensor) -> None:
    kept = tokens_kept(name, mask)
    assert kept is not None
    assert torch.equal(kept, BOOL)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("mask", BOOL),  # some libraries keep what is True under this name, torch drops it
        ("attn_mask", ~BOOL),
        ("padding_mask", KEPT),
        ("attention_mask", torch.rand(5, 4)),  # weights
        ("attention_mask", -torch.rand(5, 4)),  # a bias by distance
        ("attention_mask", KEPT * torch.nan),
        ("attention_mask", torch.ones(4)),
        ("attention_mask", torch.ones(1, 1, 1, 4, 4)),
        ("attention_mask", torch.ones(0, 4)),
        ("attention_mask", torch.ones(4, 4, dtype=torch.complex64)),
    ],
)
def test_what_is_not_clear_is_not_assumed(name: str, mask: Tensor) -> None:
    assert tokens_kept(name, mask) is None


def test_transformers_padding_mask_keeps_ones() -> None:
    kept = tokens_kept("padding_mask", KEPT, library="transformers")
    assert kept is not None
    assert torch.equal(kept, BOOL)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 3), torch.zeros(2, 1, 3, 3), torch.ones(2, 3), torch.ones(2, 3).long()]
)
def test_nothing_is_dropped(mask: Tensor) -> None:
    kept = tokens_kept("attention_mask", mask)
    assert kept is not None
    assert kept.all()
    assert kept.shape == (2, 3)


@pytest.mark.parametrize("window", [1, 2])
def test_sliding_windows_keep_every_real_token(window: int) -> None:
    allowed = CAUSAL_SEEN & ~torch.ones(4, 4).tril(-window - 1).bool()
    kept = tokens_kept("attention_mask", torch.where(by_queries(allowed), 0.0, -torch.inf))
    assert kept is not None
    assert torch.equal(kept, BOOL)


def test_torch_s_masks_of_scores_are_no_masks_of_tokens() -> None:
    assert not {"mask", "attn_mask", "attention_mask"} & {*names_of(nn.TransformerEncoder)}
    assert "key_padding_mask" in names_of(nn.MultiheadAttention)
    custom: Any = type("Custom", (nn.Module,), {})
    assert names_of(custom) == NAMES
