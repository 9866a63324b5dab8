"""Which of the masks that modules are called with counts for a layer, whatever way it is passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.models.mask2former.modeling_mask2former
from torch import Tensor, nn

from lit_cka.features.given_masks import (
    MaskCall,
    checked_tokens,
    mask_call,
    mask_for,
    named_arguments,
    said_tokens,
)

KEPT = torch.tensor([[1, 1, 0], [1, 0, 0]])  # samples by tokens
OTHER = torch.tensor([[1, 1, 1], [0, 1, 1]])
IDS = torch.zeros(2, 3)


class Text(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return input_ids


class Either(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return x


class Encoder(nn.Module):
    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return src


class Open(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


class Images(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def no_warning(name: str, message: str) -> None:
    raise AssertionError(message)


def kept_by(call: MaskCall | None, warn: Callable[[str, str], None] = no_warning) -> Tensor | None:
    return None if call is None else mask_for("layer", (2, 3), {"": call}, warn)


@pytest.mark.parametrize(
    ("module", "args", "kwargs"),
    [
        (Text, (IDS, KEPT), {}),
        (Text, (IDS,), {"attention_mask": KEPT}),
        (Text, (), {"scale": 2.0, "attention_mask": KEPT, "input_ids": IDS}),
        (Text, (IDS, KEPT, 1.0, "too", "many"), {"attention_mask": KEPT}),
        (Either, (IDS,), {"mask": KEPT}),
        (Either, (IDS, None, KEPT), {}),
        (Open, (IDS,), {"attention_mask": KEPT}),
        (Open, ({"input_ids": IDS, "attention_mask": KEPT},), {}),
        (Images, ({"input_ids": IDS, "attention_mask": KEPT},), {}),
        (Images, ({"patches": IDS, "patch_valid": KEPT == 1},), {}),  # as timm's NaFlexViT
        (Images, (IDS,), {"patch_attention_mask": KEPT[:, None] == 1}),
        (Encoder, (IDS,), {"src_key_padding_mask": KEPT == 0}),
        (Encoder, (IDS, None, KEPT == 0), {}),
        (nn.TransformerEncoderLayer, (IDS,), {"src_key_padding_mask": KEPT == 0}),
        (nn.MultiheadAttention, (IDS, IDS, IDS), {"key_padding_mask": KEPT == 0}),
    ],
)
def test_the_mask_that_is_passed(module: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kept_by(mask_call(module, named_arguments(module, args, kwargs)))
    assert mask is not None
    assert torch.equal(mask != 0, KEPT != 0)


@pytest.mark.parametrize(
    ("module", "args", "kwargs"),
    [
        (Text, (IDS,), {}),
        (Text, (IDS, None), {}),
        (Text, (IDS,), {"attention_mask": [1, 1, 0]}),
        (nn.TransformerEncoderLayer, (IDS, torch.zeros(3, 3)), {}),  # `src_mask` is one of positions by positions
        (nn.TransformerEncoder, (IDS,), {"mask": torch.zeros(3, 3)}),
        (Images, (IDS,), {}),
        (Open, (IDS,), {"images": IDS}),
    ],
)
def test_no_mask(module: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert mask_call(module, named_arguments(module, args, kwargs)) is None


def test_the_outermost_mask_of_the_layer_s_tokens_counts() -> None:
    calls = {
        "": MaskCall({"attention_mask": KEPT}),
        "a": MaskCall({"attention_mask": OTHER}),
        "b": MaskCall({"mask": OTHER}),
    }
    for layer in ("a.layer", "b.layer", "c"):
        mask = mask_for(layer, (2, 3), calls, no_warning)
        assert mask is not None
        assert torch.equal(mask, KEPT.bool())
    calls[""] = MaskCall({"attention_mask": torch.ones(2, 8)})  # of the tokens before they were merged
    mask = mask_for("a.layer", (2, 3), calls, no_warning)
    assert mask is not None
    assert torch.equal(mask, OTHER.bool())


@pytest.mark.parametrize("name", ["a", "a.b"])
def test_a_decoder_has_a_mask_of_its_own(name: str) -> None:
    """With as many tokens as the encoder."""
    outside = {"": MaskCall({"attention_mask": OTHER})}
    own = MaskCall({}, "encoder_hidden_states")
    assert mask_for("a.b.layer", (2, 3), {**outside, name: own}, no_warning) is None
    calls = {**outside, name: own._replace(masks={"attention_mask": KEPT})}
    for each in (calls, {"": MaskCall({"attention_mask": OTHER, "decoder_attention_mask": KEPT}), name: own}):
        mask = mask_for("a.b.layer", (2, 3), each, no_warning)
        assert mask is not None
        assert torch.equal(mask, KEPT.bool())
    both = {"": MaskCall({"decoder_attention_mask": KEPT})}
    assert mask_for("encoder.layer", (2, 3), both, no_warning) is None


class Predictor(nn.Module):
    """Runs on the encoder's states themselves, as that of pitches in FastSpeech 2 does."""

    def forward(self, encoder_hidden_states: Tensor, padding_masks: Tensor | None = None) -> Tensor:
        return encoder_hidden_states


def test_what_runs_on_the_encoder_s_states_alone_is_no_decoder() -> None:
    given = {"encoder_hidden_states": torch.zeros(2, 3, 6), "padding_masks": KEPT == 0}
    assert mask_call(Predictor, given) is None
    assert mask_call(Predictor, {**given, "hidden_states": torch.zeros(2, 5, 6)}) == MaskCall(
        {}, "encoder_hidden_states", "tests"
    )


def test_masks_that_mean_the_opposite_in_one_architecture() -> None:
    """Nothing is padded there as a rule, so that all would be dropped."""
    encoder = transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoderEncoderOnly
    mask = kept_by(mask_call(encoder, {"inputs_embeds": IDS, "attention_mask": KEPT == 0}))
    assert mask is not None
    assert torch.equal(mask, KEPT.bool())


def test_a_tower_for_images_has_none_of_the_text() -> None:
    calls = {"": MaskCall({"attention_mask": KEPT}, "pixel_values"), "vision": MaskCall({}, "pixel_values")}
    assert mask_for("vision.layer", (2, 3), calls, no_warning) is None
    assert mask_for("text.layer", (2, 3), calls, no_warning) is not None


@pytest.mark.parametrize(
    ("name", "mask", "text"),
    [
        (
            "attention_mask",
            torch.ones(2, 5),
            r"'layer' has 3 positions, but the mask `attention_mask` is of shape \(2, 5\)",
        ),
        ("mask", KEPT.bool(), r"it is not clear what the mask `mask` of torch.bool and shape \(2, 3\) keeps"),
    ],
)
def test_a_mask_that_is_of_no_use_is_said(name: str, mask: Tensor, text: str) -> None:
    said: list[tuple[str, str]] = []
    assert kept_by(MaskCall({name: mask}), lambda *args: said.append(args)) is None
    ((mask_name, message),) = said
    assert mask_name == name
    with pytest.raises(ValueError, match=f"{text}.*: all positions are pooled. Say with `mask` which count"):
        raise ValueError(message)


def test_what_the_user_says() -> None:
    assert torch.equal(said_tokens("mask", Either, (IDS,), {"mask": KEPT.bool()}), KEPT.bool())
    assert torch.equal(said_tokens("tokens", Open, ({"tokens": KEPT},), {}), KEPT.bool())
    padding = {"key_padding_mask": KEPT == 0}
    assert torch.equal(said_tokens("key_padding_mask", nn.MultiheadAttention, (IDS,) * 3, padding), KEPT.bool())
    assert said_tokens(lambda x, attention_mask: attention_mask, Text, (IDS, OTHER), {}) is OTHER
    with pytest.raises(ValueError, match="called with a mask named 'tokens', but its arguments are input_ids"):
        said_tokens("tokens", Text, (IDS,), {})
    with pytest.raises(ValueError, match=r"`mask` to be a tensor \(samples, tokens\).*but got shape \(2,\)"):
        checked_tokens(torch.ones(2))
    with pytest.raises(ValueError, match="but got list"):
        said_tokens(lambda x: [1], Images, (IDS,), {})


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(("n", "name"), [(2, "attn_mask"), (4, "attn_mask"), (4, "mask")])
def test_which_positions_see_which_says_nothing_of_padding(n: int, name: str, scores: bool) -> None:
    """The same for all samples, of which there may be as many as tokens."""
    causal = torch.ones(4, 4).tril().bool()
    mask = torch.zeros(4, 4).masked_fill(~causal, -torch.inf) if scores else causal
    for each in (mask, mask if scores else ~mask):
        assert mask_for("layer", (n, 4), {"": MaskCall({name: each})}, no_warning) is None
    said: list[tuple[str, str]] = []
    banded = mask.clone()
    banded[3, 0] = -torch.inf if scores else False
    assert mask_for("layer", (4, 4), {"": MaskCall({name: banded})}, lambda *args: said.append(args)) is None
    assert len(said) == 1
