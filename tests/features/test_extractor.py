"""The extractor: the features that the models' own interfaces give, and no trace of it in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.nested import tensors_in
from tests import networks


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def pooled(tokens: Tensor, method: str, mask: Tensor | None = None) -> Tensor:
    """Sample by sample, from tokens (n, positions, d)."""
    if method == "cls":
        return tokens[:, 0].double()
    kept = tokens if mask is None else [sample[row.bool()] for sample, row in zip(tokens, mask, strict=True)]
    return torch.stack([sample.double().mean(0) if method == "mean" else sample[-1].double() for sample in kept])


# Models of the libraries


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("left", [False, True], ids=["right padded", "left padded"])
@pytest.mark.parametrize("name", networks.TEXT)
def test_text_features_are_the_pooled_hidden_states(name: str, left: bool, pooling: str) -> None:
    model, batch = networks.build(name), networks.texts([7, 3, 1, 6], left=left)
    with torch.no_grad(), FeatureExtractor(model, pooling=pooling) as extractor:
        output = model(**batch, output_hidden_states=True)
        features = extractor.collect()
    assert list(features) == networks.BLOCKS[name]
    for layer, hidden in zip(features.values(), output.hidden_states[1:], strict=True):
        assert layer.dtype == torch.float64
        torch.testing.assert_close(layer, pooled(hidden, pooling, batch["attention_mask"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", networks.TEXT)
def test_text_without_a_mask_counts_every_token(name: str) -> None:
    model, ids = networks.build(name), networks.texts([5, 5, 5, 5, 5])["input_ids"]  # as many samples as tokens
    with torch.no_grad(), FeatureExtractor(model) as extractor:
        output = model(ids, output_hidden_states=True)
        features = extractor.collect()
    for layer, hidden in zip(features.values(), output.hidden_states[1:], strict=True):
        torch.testing.assert_close(layer, pooled(hidden, "mean"), rtol=0, atol=1e-12)


def test_a_mask_of_an_earlier_call_is_forgotten() -> None:
    model, x = ByAttentionMask(), torch.randn(3, 5, 4)
    with FeatureExtractor(model, "layer") as extractor:
        model(x, MASK)
        extractor.collect()
        output = model.layer(x)
        torch.testing.assert_close(extractor.collect()["layer"], pooled(output, "mean"))


def test_a_mask_of_an_earlier_batch_is_forgotten() -> None:
    model, batch = networks.build("Llama"), networks.texts([6, 2])
    with torch.no_grad(), FeatureExtractor(model, "layers.0") as extractor:
        model(**batch)
        extractor.collect()
        hidden = model(batch["input_ids"], output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(extractor.collect()["layers.0"], pooled(hidden, "mean"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("name", ["timm ViT", "open_clip ViT", "transformers ViT"])
def test_vit_features_are_the_pooled_tokens(name: str, pooling: str) -> None:
    model, images = networks.build(name), networks.images(name)
    with torch.no_grad(), FeatureExtractor(model, pooling=pooling) as extractor:
        model(images)
        features = extractor.collect()
        hidden = vit_tokens(model, images)
    assert list(features) == networks.BLOCKS[name]
    for layer, tokens in zip(features.values(), hidden, strict=True):
        assert tokens.shape[:2] == (3, 17)
        torch.testing.assert_close(layer, pooled(tokens, pooling), rtol=0, atol=1e-6)


def vit_tokens(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every block's tokens (n, 1 + patches, d), the class token first, by the library's own function."""
    match type(model).__module__.partition(".")[0]:
        case "transformers":
            return list(model(images, output_hidden_states=True).hidden_states[1:])
        case "timm":
            options = {"return_prefix_tokens": True, "output_fmt": "NLC", "intermediates_only": True}
            return [
                torch.cat([prefix, patches], 1) for patches, prefix in model.forward_intermediates(images, **options)
            ]
        case "open_clip":
            found = model.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
            both = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
            return [torch.cat(tokens, 1) for tokens in both]
    raise AssertionError(type(model))


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
@pytest.mark.parametrize(
    ("name", "last_blocks"),
    [
        ("timm Swin", ["layers.0.blocks.0", "layers.1.blocks.1", "layers.2.blocks.1"]),
        ("timm ConvNeXt", ["stages.0.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.3.blocks.0"]),
        ("timm ResNet", ["layer1.0", "layer2.1", "layer3.0", "layer4.0"]),
    ],
)
def test_features_of_stages_are_their_pooled_maps(name: str, last_blocks: list[str], pooling: str) -> None:
    """A stage returns what its last block does: maps with the channels first (ConvNeXt, ResNet) or last (Swin)."""
    model, images = networks.build(name), networks.images(name)
    with torch.no_grad(), FeatureExtractor(model, pooling=pooling) as extractor:
        model(images)
        features = extractor.collect()
        maps = model.forward_intermediates(images, intermediates_only=True)
    assert list(features) == networks.BLOCKS[name]
    for layer, map_NCHW in zip(last_blocks, maps[-len(last_blocks) :], strict=True):
        tokens = map_NCHW.flatten(2).mT
        expected = tokens.flatten(1).double() if pooling == "flatten" else pooled(tokens, "mean")
        torch.testing.assert_close(features[layer], expected, rtol=0, atol=1e-6)


def test_features_of_both_towers_of_clip() -> None:
    model, images = networks.build("open_clip CLIP"), networks.images("open_clip CLIP")
    texts = torch.arange(24).reshape(3, 8)
    with torch.no_grad(), FeatureExtractor(model) as extractor:
        model(images, texts)
        features = extractor.collect()
        expected = vit_tokens(model.visual, images) + model.forward_intermediates(text=texts)["text_intermediates"]
    assert list(features) == networks.BLOCKS["open_clip CLIP"]
    for layer, tokens in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(layer, pooled(tokens, "mean"), rtol=0, atol=1e-6)


def run(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The model's outputs for three samples."""
    if name in networks.TEXT:
        output = model(**networks.texts([5, 2, 3]))
    elif name == "open_clip CLIP":
        output = model(networks.images(name), torch.arange(24).reshape(3, 8))
    else:
        output = model(networks.images(name).to(dtype))
    return list(tensors_in(output))


@pytest.mark.parametrize("name", networks.BLOCKS)
def test_the_model_s_outputs_stay_the_same_bit_for_bit(name: str) -> None:
    model = networks.build(name)
    hooks = num_hooks(model)
    with torch.no_grad():
        plain = run(name, model)
        with FeatureExtractor(model) as extractor:
            watched = run(name, model)
            features = extractor.collect()
    assert plain
    assert all(map(torch.equal, plain, watched))
    assert num_hooks(model) == hooks
    for layer in features.values():
        assert layer.shape[0] == 3
        assert layer.ndim == 2
        assert layer.isfinite().all()


@pytest.mark.parametrize("name", ["timm ViT", "timm ResNet", "BERT", "Llama"])
@pytest.mark.parametrize("mode", ["inference", "autocast", "bfloat16"])
def test_features_in_other_modes(name: str, mode: str) -> None:
    model = networks.build(name)
    with FeatureExtractor(model) as extractor:
        run(name, model)
        expected = extractor.collect()
        with (
            torch.inference_mode(mode == "inference"),
            torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
        ):
            dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
            run(name, model.to(dtype), dtype)
            features = extractor.collect()
    for layer, value in expected.items():
        assert features[layer].dtype == value.dtype == torch.float64
        assert not features[layer].requires_grad
        error = (features[layer] - value).norm() / value.norm()
        assert error == 0 if mode == "inference" else 0 < error < 0.1


# Hooks


class Doubled(nn.Module):
    """Every kind of call that a layer can get."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.bypassed = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bypassed.forward(self.twice(self.twice(self.used(x))))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("unused", "Layer 'unused' has not run. Either the model does not use it, or"),
        ("bypassed", "Layer 'bypassed' has not run. .* its `forward` is called directly"),
        ("twice", "Layer 'twice' has run more than once in one call of the model"),
    ],
)
def test_a_layer_that_does_not_run_just_once_is_an_error_that_names_it(layer: str, message: str) -> None:
    model = Doubled()
    with FeatureExtractor(model, ["used", layer]) as extractor:
        for _ in range(2):  # the error does not stick to the layers around, nor go away
            model(torch.randn(3, 4))
            with pytest.raises(ValueError, match=message):
                extractor.collect()
        model(torch.randn(3, 4))
        features, problems = extractor.drain()
    assert list(features) == ["used"]
    assert list(problems) == [layer]


def test_two_forward_passes_in_one_step_are_an_error() -> None:
    model = Doubled()
    with FeatureExtractor(model, "used") as extractor:
        model(torch.randn(3, 4))
        model(torch.randn(3, 4))
        message = r"Layer 'used' has run in more than one call of the model.* Call `collect\(\)` after each call"
        with pytest.raises(ValueError, match=message):
            extractor.collect()
        x = torch.randn(3, 4)
        model(x)
        torch.testing.assert_close(extractor.collect()["used"], model.used(x).double())


class Returning(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (None, "NoneType"),
        ("text", "str"),
        ((), "tuple"),
        ((None, torch.ones(3, 4)), "tuple"),
        ({"logits": torch.ones(3, 4)}, "dict"),
        (torch.ones(3, 4).long(), r"a tensor of torch\.int64"),
        (torch.ones(3, 4).bool(), r"a tensor of torch\.bool"),
    ],
)
def test_a_layer_that_returns_no_features_is_an_error_that_names_it(output: Any, got: str) -> None:
    model = nn.Sequential(nn.Identity(), Returning(output))
    message = rf"Expected layer '1' to return floating-point features, but it returned {got}"
    with FeatureExtractor(model, ["0", "1"]) as extractor:
        model(torch.randn(3, 4))
        with pytest.raises(ValueError, match=message):
            extractor.collect()
        model(torch.randn(3, 4))
        features, problems = extractor.drain()
    assert (list(features), list(problems)) == (["0"], ["1"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden: hidden,
        lambda hidden: (hidden, None),
        lambda hidden: [hidden, torch.ones(7)],
        lambda hidden: {"last_hidden_state": hidden, "cache": torch.ones(7)},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_the_hidden_states_in_a_layer_s_output(wrap: Callable[[Tensor], Any]) -> None:
    hidden = torch.randn(3, 4)
    model = nn.Sequential(Returning(wrap(hidden)))
    with FeatureExtractor(model, "0") as extractor:
        model(torch.randn(3, 4))
        assert torch.equal(extractor.collect()["0"], hidden.double())


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        raise self.error


def test_hooks_are_removed_after_the_block() -> None:
    model = Doubled()
    extractor = FeatureExtractor(model, "used")
    assert num_hooks(model) == 0
    for _ in range(2):
        with extractor:
            assert num_hooks(model) > 0
            x = torch.randn(3, 4)
            model(x)
            torch.testing.assert_close(extractor.collect()["used"], model.used(x).double())
            model.used(x)  # never collected, and forgotten
        assert num_hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_exception(error: type[BaseException]) -> None:
    model = Failing(error)
    with pytest.raises(error), FeatureExtractor(model):
        model(torch.randn(3, 4))
    assert num_hooks(model) == 0


def test_after_a_forward_pass_that_failed_the_next_is_sound() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with FeatureExtractor(model) as extractor:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(3, 7))
        for n in (3, 2):
            extractor.drain()
            model(torch.randn(n, 4))
            assert extractor.collect()["1"].shape == (n, 4)


def test_a_forward_pass_that_failed_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with FeatureExtractor(model) as extractor:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(5, 7))
        model(torch.randn(3, 4))
        assert extractor.collect()["1"].shape == (3, 4)


def test_entering_twice_is_an_error_that_keeps_the_first() -> None:
    model = Doubled()
    with FeatureExtractor(model, "used") as extractor:
        hooks = num_hooks(model)
        with pytest.raises(RuntimeError, match="This FeatureExtractor is already active"):
            extractor.__enter__()
        assert num_hooks(model) == hooks
        model(torch.randn(3, 4))
        assert extractor.collect()["used"].shape == (3, 4)
    assert num_hooks(model) == 0


def test_two_extractors_on_one_model() -> None:
    model = networks.build("timm ViT")
    with torch.no_grad(), FeatureExtractor(model) as first, FeatureExtractor(model, "blocks.1", "cls") as second:
        model(networks.images("timm ViT"))
        assert list(first.collect()) == networks.BLOCKS["timm ViT"]
        assert list(second.collect()) == ["blocks.1"]


def test_a_copy_made_while_hooked_does_not_report() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with FeatureExtractor(model) as extractor:
        twin = copy.deepcopy(model)
        twin(torch.randn(9, 4))
        with pytest.raises(ValueError, match="Layer '0' has not run"):
            extractor.collect()
        x = torch.randn(3, 4)
        twin(torch.randn(9, 4))
        model(x)
        twin(torch.randn(9, 4))
        torch.testing.assert_close(extractor.collect()["0"], model[0](x).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "flatten"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)], ids=str)
def test_an_in_place_operation_behind_the_layer_changes_nothing(
    shape: tuple[int, ...], pooling: str, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with FeatureExtractor(model, "0", pooling) as extractor:
        model(x)
        features = extractor.collect()["0"]
    output = model[0](x)
    if output.ndim == 3:
        output = output.flatten(1) if pooling == "flatten" else pooled(output, pooling)
    torch.testing.assert_close(features, output.double())
    assert features.min() < 0


def test_training_goes_on_as_without() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with FeatureExtractor(model) as extractor:
        model(x).square().sum().backward()
        features = extractor.collect()
    assert not any(layer.requires_grad for layer in features.values())
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected, strict=True))


def test_a_disabled_extractor_sees_nothing() -> None:
    model = Doubled()
    with FeatureExtractor(model, "used") as extractor:
        extractor.enabled = False
        model(torch.randn(9, 4))
        extractor.enabled = True
        model(torch.randn(3, 4))
        assert extractor.collect()["used"].shape == (3, 4)


def test_calls_on_the_way_to_a_layer_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    seen: list[Any] = []
    returned: list[Any] = []

    def on_call(name: str, outermost: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((name, outermost, args[0].shape, kwargs))

    def on_return(name: str, outermost: bool, output: Tensor) -> None:
        returned.append((name, outermost, output.shape))

    with FeatureExtractor(model, "1.0", on_call=on_call, on_return=on_return):
        model(torch.randn(3, 4))
        model[1](torch.randn(5, 4))
    assert returned == [("1", False, (3, 4)), ("", True, (3, 4)), ("1", True, (5, 4))]
    assert seen == [("", True, (3, 4), {}), ("1", False, (3, 4), {}), ("1", True, (5, 4), {})]


def test_calls_are_reported_with_the_inputs_as_they_came() -> None:
    """And not as a hook of the user's has changed them."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda module, args: (args[0][:2],))
    seen: list[torch.Size] = []
    with FeatureExtractor(model, "0", on_call=lambda name, outermost, args, kwargs: seen.append(args[0].shape)):
        model(torch.randn(3, 4))
    assert seen == [(3, 4)]


# Masks


class MeanOfTokens(nn.Module):
    """Takes its mask by any name and in any way; the layer leaves padding in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class ByAttentionMask(MeanOfTokens):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


class ByPaddingMask(MeanOfTokens):
    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self.layer(x)


class ByBatch(MeanOfTokens):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layer(batch["x"])


class ByKeywords(MeanOfTokens):
    def forward(self, **kwargs: Tensor) -> Tensor:
        return self.layer(kwargs["x"])


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (ByAttentionMask(), lambda model, x: model(x, MASK)),
        (ByAttentionMask(), lambda model, x: model(x, attention_mask=MASK)),
        (ByAttentionMask(), lambda model, x: model(x, attention_mask=MASK.bool())),
        (ByAttentionMask(), lambda model, x: model(x=x, attention_mask=MASK.float())),
        (ByPaddingMask(), lambda model, x: model(x, ~MASK.bool())),
        (ByPaddingMask(), lambda model, x: model(x, key_padding_mask=torch.where(MASK.bool(), 0.0, -torch.inf))),
        (ByBatch(), lambda model, x: model({"x": x, "attention_mask": MASK})),
        (ByKeywords(), lambda model, x: model(x=x, attention_mask=MASK)),
    ],
    ids=["positional", "keyword", "bool", "float", "inverse", "additive", "in a batch", "in keywords"],
)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_masks_by_every_way(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], pooling: str) -> None:
    x = torch.randn(3, 5, 4)
    with FeatureExtractor(model, "layer", pooling) as extractor:
        output = call(model, x)
        features = extractor.collect()["layer"]
    torch.testing.assert_close(features, pooled(output, pooling, MASK))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_fully_masked_sample_is_nan(pooling: str) -> None:
    model, mask = ByAttentionMask(), MASK.clone()
    mask[1] = 0
    with FeatureExtractor(model, "layer", pooling) as extractor:
        model(torch.randn(3, 5, 4), mask)
        features = extractor.collect()["layer"]
    assert features[1].isnan().all()
    assert features[[0, 2]].isfinite().all()


def encoder(*, batch_first: bool = True, nested: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.parametrize("layer", ["layers.0", "layers.1", "layers.1.norm2"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_torch_s_encoder_with_its_inverse_mask(pooling: str, batch_first: bool, layer: str) -> None:
    """Inside the encoder the mask is no longer bool but what is added to the scores, 0 for tokens, -inf for padding."""
    model = encoder(batch_first=batch_first)
    x = torch.randn(3, 5, 4)
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with FeatureExtractor(model, layer, pooling) as extractor:
        model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~MASK.bool())
        features = extractor.collect()[layer]
    handle.remove()
    output = outputs[0] if batch_first else outputs[0].transpose(0, 1)
    torch.testing.assert_close(features, pooled(output.detach(), pooling, MASK))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_torch_s_encoder_on_nested_tensors() -> None:
    """What the encoder does by default with a padding mask, in eval mode and without gradients."""
    model, x = encoder(nested=True).eval(), torch.randn(3, 5, 4)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    with torch.no_grad():
        expected = pooled(model(x, src_key_padding_mask=padding), "mean", ~padding)
        with FeatureExtractor(model, "layers.1") as extractor:
            model(x, src_key_padding_mask=padding)
            features = extractor.collect()["layers.1"]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


class Downsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.after(self.before(x)[:, ::2])


def test_a_mask_for_other_positions_is_left_out_with_one_warning() -> None:
    model, x = Downsampling(), torch.randn(3, 8, 4)
    mask = (torch.arange(8) < torch.tensor([[8], [2], [5]])).long()
    message = r"Layer 'after' has 4 positions, but the mask `attention_mask` is of shape \(3, 8\): all positions"
    with FeatureExtractor(model, ["before", "after"]) as extractor:
        with pytest.warns(UserWarning, match=message):
            output = model(x, mask)
        features = extractor.collect()
        torch.testing.assert_close(features["after"], pooled(output, "mean"))
        torch.testing.assert_close(features["before"], pooled(model.before(x), "mean", mask))
        extractor.drain()
        model(x, mask)  # a second warning would be an error


class Rewriting(nn.Module):
    """Makes of the mask what it needs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ByAttentionMask()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x, (1 - attention_mask) * 7)


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), torch.where(MASK.bool(), 0.0, -1e9)])
def test_the_mask_of_the_outermost_call_counts(mask: Tensor) -> None:
    model, x = Rewriting(), torch.randn(3, 5, 4)
    with FeatureExtractor(model, "inner.layer") as extractor:
        output = model(x, mask.long() if mask.dtype == torch.bool else mask)
        features = extractor.collect()
    torch.testing.assert_close(features["inner.layer"], pooled(output, "mean", MASK))


def test_which_tokens_count_may_be_said() -> None:
    """By a name that tells nothing, a callable, or by who watches; with one warning where it is for other tokens."""
    model, x = ByKeywords(), torch.randn(3, 5, 4)
    for mask in ("mask", "valid", lambda **kwargs: kwargs["valid"]):
        with FeatureExtractor(model, "layer", mask=mask) as extractor:
            output = model(x=x, mask=MASK.bool(), valid=MASK)
            torch.testing.assert_close(extractor.collect()["layer"], pooled(output, "mean", MASK))
    with FeatureExtractor(model, "layer", mask="absent") as extractor:
        model(x=x)
        with pytest.raises(ValueError, match="called with a mask named 'absent', but its arguments are kwargs, x"):
            extractor.collect()
        extractor.tokens = MASK
        model(x=x)
        torch.testing.assert_close(extractor.collect()["layer"], pooled(output, "mean", MASK))
        extractor.tokens = MASK[:, :4]
        with pytest.warns(
            UserWarning, match=r"5 positions of 3 samples, but `mask` is of shape \(3, 4\): all positions"
        ):
            model(x=x)
        torch.testing.assert_close(extractor.collect()["layer"], pooled(output, "mean"))


def test_a_mask_that_may_mean_its_opposite_is_not_used() -> None:
    model, x = ByKeywords(), torch.randn(3, 5, 4)
    with FeatureExtractor(model, "layer") as extractor:
        with pytest.warns(UserWarning, match="not clear what the mask `mask` of torch.bool.*all positions are pooled"):
            output = model(x=x, mask=MASK.bool())
        torch.testing.assert_close(extractor.collect()["layer"], pooled(output, "mean"))
        model(x=x, mask=MASK.bool())  # a second warning would be an error


class Detector(nn.Module):
    """Takes a list of images, and pads them, as those of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: list[Tensor]) -> Tensor:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = torch.zeros(len(images), 3, height, width)
        for image, place in zip(images, padded, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return self.conv(padded)


def test_a_list_of_images_is_as_many_samples() -> None:
    model, images = Detector(), [torch.randn(3, 5, 6) for _ in range(2)]
    with torch.no_grad(), FeatureExtractor(model, "conv") as extractor:
        expected = model(images).double().mean((2, 3))
        torch.testing.assert_close(extractor.collect()["conv"], expected)
        model([*images, torch.randn(3, 5, 4)])
        with pytest.raises(ValueError, match="Expected images of one size, but the model was called with a list of"):
            extractor.collect()
    with torch.no_grad(), FeatureExtractor(model, "conv", lambda output: output[:, :, 0, 0]) as extractor:
        model([*images, torch.randn(3, 5, 4)])
        assert extractor.collect()["conv"].shape == (3, 4)
