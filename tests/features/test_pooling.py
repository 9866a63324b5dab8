"""From a layer's output to (samples, features): every layout, every method, and what the shape leaves open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_cka.features import pooling
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.pooling import PoolingSpec, find_layout, parse_pooling, pool

# A layout, and the same axes with the samples first and the channels last.
LAYOUTS = [
    ("NTC", "NTC"),
    ("TNC", "NTC"),
    ("NCT", "NTC"),
    ("NHWC", "NHWC"),
    ("NCHW", "NHWC"),
    ("NTHWC", "NTHWC"),
    ("NCTHW", "NTHWC"),
]
SIZES = {"N": 3, "T": 5, "H": 2, "W": 4, "C": 6}


def values(letters: str) -> Tensor:
    return torch.randn([SIZES[letter] for letter in letters], generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["NumPy", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who takes the means on a CPU: NumPy where torch has few threads."""
    monkeypatch.setattr(pooling, "_THREADS_OF_TORCH", torch.get_num_threads() - (request.param == "torch"))
    return str(request.param)


@pytest.mark.parametrize(("layout", "ordered"), LAYOUTS)
def test_pooling_every_layout(layout: str, ordered: str, by: str) -> None:
    tokens = values(ordered)
    output = torch.einsum(f"{ordered}->{layout}", tokens)
    flat = tokens.reshape(3, -1, 6)
    mean = torch.stack([sample.double().mean(0) for sample in flat])
    torch.testing.assert_close(pool(output, "mean", layout), mean, rtol=0, atol=1e-15)
    assert torch.equal(pool(output, "cls", layout), flat[:, 0])
    assert torch.equal(pool(output, "last", layout), flat[:, -1])
    assert torch.equal(pool(output, "flatten", layout), tokens.reshape(3, -1))


@pytest.mark.parametrize("method", ["mean", "last", "cls", "flatten"])
def test_features_without_positions_are_returned_as_they_are(method: str) -> None:
    features = torch.randn(3, 6)
    assert torch.equal(pool(features, method, "NC"), features)
    assert torch.equal(pool(features.T, method, "CN"), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_are_taken_in_float64(dtype: torch.dtype, by: str) -> None:
    tokens = (1000 + values("NTC")).to(dtype)
    for mask in (None, torch.ones(3, 5)):
        mean = pool(tokens, "mean", "NTC", mask)
        assert mean.dtype == torch.float64
        torch.testing.assert_close(mean, tokens.double().mean(1), rtol=1e-14, atol=0)


def test_means_of_what_is_not_finite_and_of_nothing_are_nan_without_a_warning(by: str) -> None:
    tokens = torch.zeros(2, 3, 1)
    tokens[0, :2, 0] = torch.tensor([torch.inf, -torch.inf])
    assert pool(tokens, "mean", "NTC").isnan().tolist() == [[True], [False]]
    assert pool(tokens[:, :0], "mean", "NTC").isnan().all()
    assert pool(tokens[:0], "mean", "NTC").shape == (0, 1)


def test_means_within_a_transform_whose_tensors_have_no_memory(by: str) -> None:
    tokens = values("NTC")
    means = torch.func.vmap(lambda sample: pool(sample[None], "mean", "NTC")[0])(tokens)
    torch.testing.assert_close(means, tokens.double().mean(1), rtol=1e-14, atol=0)


MASKS = {
    "right padded": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left padded": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "with gaps": [[1, 0, 1, 0, 0], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0]],
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["NTC", "TNC", "NCT"])
@pytest.mark.parametrize("padding", [0.0, 1e30, torch.inf, torch.nan])
def test_masked_positions_do_not_count(padding: float, layout: str, mask: list[list[int]], dtype: torch.dtype) -> None:
    kept = torch.tensor(mask).to(dtype)
    tokens = values("NTC")
    tokens[kept == 0] = padding
    output = torch.einsum(f"NTC->{layout}", tokens)
    samples = [sample[positions.bool()] for sample, positions in zip(tokens, kept, strict=True)]
    mean = torch.stack([sample.double().mean(0) for sample in samples])
    torch.testing.assert_close(pool(output, "mean", layout, kept), mean, rtol=0, atol=1e-15)
    assert torch.equal(pool(output, "last", layout, kept), torch.stack([sample[-1] for sample in samples]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(9, 40, 300), (3, 300, 400), (0, 40, 300)])  # some samples at a time, one, none
def test_means_of_many_samples(shape: tuple[int, int, int], masked: bool) -> None:
    assert shape[1] * shape[2] * 9 > pooling._SUMMED_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator) + 1e3
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    kept = mask if masked else torch.ones_like(mask)
    samples = [tokens[index, kept[index]].double().mean(0) for index in range(len(tokens))]
    expected = torch.stack(samples) if samples else torch.empty(0, shape[2]).double()
    for layout, output in (("NTC", tokens), ("TNC", tokens.transpose(0, 1)), ("NCT", tokens.transpose(1, 2))):
        mean = pool(output, "mean", layout, mask if masked else None)
        torch.testing.assert_close(mean, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["mean", "last"])
def test_a_sample_without_any_position_is_nan(method: str) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    features = pool(values("NTC"), method, "NTC", mask)
    assert features[1].isnan().all()
    assert features[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", ("mean", None)),
        ("last", ("last", None)),
        ("cls", ("cls", None)),
        ("flatten", ("flatten", None)),
        ("mean:NCHW", ("mean", "NCHW")),
        ("last:TNC", ("last", "TNC")),
        ("mean:NCTHW", ("mean", "NCTHW")),
        (torch.sum, (torch.sum, None)),
    ],
)
def test_poolings(pooling: str, expected: tuple[str, str | None]) -> None:
    assert parse_pooling(pooling) == PoolingSpec(*expected)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ("max", """Expected `pooling` to be one of 'mean', 'last', 'cls', 'flatten', .* but got 'max'"""),
        ("", "Expected `pooling` to be one of .* but got ''"),
        ("mean:TC", "Expected the layout to name every axis by its own letter, .* but got 'TC'"),
        ("mean:NT", "Expected the layout .* but got 'NT'"),
        ("mean:NTTC", "Expected the layout .* but got 'NTTC'"),
        ("mean:ntc", "Expected the layout .* but got 'ntc'"),
        ("mean:NtC", "Expected the layout .* but got 'NtC'"),
        ("mean:N TC", "Expected the layout .* but got 'N TC'"),
    ],
)
def test_unknown_poolings_are_an_error(pooling: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pooling(pooling)


CONV = nn.Conv2d(6, 6, 1)
LINEAR = nn.Linear(6, 6)
BOTH = nn.Sequential(CONV, LINEAR)


def encoder_layer(width: int, batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 8, batch_first=batch_first)


@pytest.mark.parametrize(
    ("module", "shape", "batch_size", "layout"),
    [
        # One reading alone has the samples where the inputs' batch size is.
        (LINEAR, (3, 6), 3, "NC"),
        (LINEAR, (3, 5, 6), 3, "NTC"),
        (LINEAR, (5, 3, 6), 3, "TNC"),
        # The axis of the channels follows from what the module is made of.
        (nn.Conv1d(6, 6, 1), (3, 6, 5), 3, "NCT"),
        (nn.Conv1d(6, 6, 1), (3, 6, 3), 3, "NCT"),
        (LINEAR, (3, 7, 7, 7), 3, "NHWC"),
        (CONV, (3, 7, 7, 7), 3, "NCHW"),
        (nn.BatchNorm2d(7), (3, 7, 7, 7), 3, "NCHW"),
        (nn.LayerNorm(7), (3, 7, 7, 7), 3, "NHWC"),
        (Conv1D(7, 7), (3, 7, 7), 3, "NTC"),  # of transformers' GPT-2: a linear layer
        (nn.Conv3d(6, 6, 1), (3, 6, 6, 6, 6), 3, "NCTHW"),
        (LINEAR, (3, 6, 6, 6, 6), 3, "NTHWC"),
        # A module of both kinds: the width of its norms, or height and width being equal.
        (nn.Sequential(CONV, nn.LayerNorm(6)), (3, 6, 4, 8), 3, "NCHW"),
        (nn.Sequential(CONV, nn.LayerNorm(6)), (3, 4, 8, 6), 3, "NHWC"),
        (BOTH, (3, 6, 7, 7), 3, "NCHW"),
        (BOTH, (3, 7, 7, 6), 3, "NHWC"),
        (nn.ReLU(), (3, 6, 7, 7), 3, "NCHW"),
        # As many samples as tokens: what the module says of its batches.
        (encoder_layer(6, batch_first=True), (5, 5, 6), 5, "NTC"),
        (encoder_layer(6, batch_first=False), (5, 5, 6), 5, "TNC"),
        (nn.LSTM(6, 6), (5, 5, 6), 5, "TNC"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_layout_follows_from_shape_and_module(
    module: nn.Module, shape: tuple[int, ...], batch_size: int, layout: str
) -> None:
    assert find_layout("layer", module, torch.zeros(shape), {batch_size}) == layout


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (LINEAR, (5, 5, 6), r"'layer' returned shape \(5, 5, 6\), which can be read as NTC or TNC"),
        (LINEAR, (5, 5, 6), 'Say which: pooling="mean:NTC" or pooling="mean:TNC"'),
        (BOTH, (5, 7, 7, 7), r"'layer' returned shape \(5, 7, 7, 7\), which can be read as NHWC or NCHW"),
        (BOTH, (5, 6, 7, 8), "can be read as NHWC or NCHW"),
        (LINEAR, (35, 6), r"shape \(35, 6\), and no axis that could be the samples .* batch size \(5\)"),
        (LINEAR, (5,), r"returned shape \(5,\), and no axis that could be the samples"),
        (LINEAR, (7, 6, 5), r"returned shape \(7, 6, 5\), and no axis that could be the samples"),
        (nn.ModuleList([encoder_layer(6, True), encoder_layer(6, False)]), (5, 5, 6), "can be read as NTC or TNC"),
    ],
)
def test_an_open_layout_is_an_error_that_asks_for_it(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layout("layer", module, torch.zeros(shape), {5})


@pytest.mark.parametrize("shape", [(20, 5, 6), (1, 5, 6)], ids=["frames in the samples' place", "positions alike"])
def test_samples_first_is_not_read_as_tokens_first(shape: tuple[int, ...]) -> None:
    """Where as many tokens as samples make it look so."""
    with pytest.raises(ValueError, match="no axis that could be the samples has the inputs' batch size"):
        find_layout("layer", encoder_layer(6, batch_first=True), torch.zeros(shape), {5})


class Turning(nn.Module):
    """Samples first outside, tokens first in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lstm(tokens.transpose(0, 1))[0].transpose(0, 1)


def test_a_module_may_turn_its_batches_round_for_a_part_of_it() -> None:
    """As Encodec does for its LSTM."""
    model, tokens = nn.Sequential(Turning()), torch.randn(3, 5, 6)
    with pytest.raises(ValueError, match=r"Layer '0' returned .* can be read as NTC or NCT or TNC"):
        features_of(model, "0", "mean", tokens)
    torch.testing.assert_close(features_of(model, "0", "mean:NTC", tokens), model(tokens).double().mean(1))


def features_of(model: nn.Module, layer: str, pooling: str, *args: Tensor, **kwargs: Tensor) -> Tensor:
    with FeatureExtractor(model, layer, pooling) as extractor:
        model(*args, **kwargs)
        return extractor.collect()[layer]


class Sideways(nn.Module):
    """Samples first outside, tokens first inside, as in OpenAI's CLIP."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=batch_first)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("num_tokens", [4, 5], ids=["as many tokens as samples", "more tokens"])
def test_tokens_first_inside_a_model(num_tokens: int) -> None:
    model = Sideways(batch_first=False)
    tokens = torch.randn(4, num_tokens, 6)
    expected = model(tokens).double().mean(1)
    torch.testing.assert_close(features_of(model, "layer", "mean", tokens), expected)


@pytest.mark.parametrize("num_tokens", [4, 5], ids=["as many tokens as samples", "more tokens"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_model_with_samples_or_tokens_first(batch_first: bool, num_tokens: int) -> None:
    """The first axis of the inputs is the samples' only where `batch_first` says so."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tokens = torch.randn(4, num_tokens, 6) if batch_first else torch.randn(num_tokens, 4, 6)
    expected = model(tokens).double().mean(1 if batch_first else 0)
    torch.testing.assert_close(features_of(model, "layers.1", "mean", tokens), expected)


def test_inside_a_model_with_tokens_first_the_layout_is_asked_for() -> None:
    """The layer's parent takes tokens first, but the inputs' first axis has the size of the layer's."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0)
    model, tokens = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(5, 4, 6)
    with pytest.raises(ValueError, match=r"Layer 'layers\.1\.norm2' .* can be read as NTC or TNC"):
        features_of(model, "layers.1.norm2", "mean", tokens)
    expected = model(tokens).double().mean(0)
    torch.testing.assert_close(features_of(model, "layers.1.norm2", "mean:TNC", tokens), expected)


class Transposing(nn.Module):
    """Samples first outside, tokens first inside, in layers that do not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens.transpose(0, 1)).transpose(0, 1)


def test_the_samples_are_those_of_the_model_s_inputs() -> None:
    model, tokens = Transposing(), torch.randn(4, 5, 6)
    torch.testing.assert_close(features_of(model, "layer", "mean", tokens), model(tokens).double().mean(1))


class AttentionPooled(nn.Module):
    """Samples first, in blocks of its own; only the head behind them, by torch's default, takes tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))
        self.head = nn.MultiheadAttention(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(*[tokens.transpose(0, 1)] * 3)[0].mean(0)


def test_a_head_that_takes_tokens_first_says_nothing_of_the_blocks() -> None:
    model, tokens = AttentionPooled(), torch.randn(4, 5, 6)
    expected = model.blocks[0](tokens).double().mean(1)
    torch.testing.assert_close(features_of(model, "blocks.0", "mean", tokens), expected)


def test_an_open_layout_is_resolved_by_naming_it() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    tokens = torch.randn(5, 5, 6)
    output = model[0](tokens).double()
    with pytest.raises(ValueError, match=r"Layer '0' returned shape .* can be read as NTC or TNC"):
        features_of(model, "0", "mean", tokens)
    torch.testing.assert_close(features_of(model, "0", "mean:NTC", tokens), output.mean(1))
    torch.testing.assert_close(features_of(model, "0", "mean:TNC", tokens), output.mean(0))
    torch.testing.assert_close(features_of(model, "0", "last:TNC", tokens), output[-1])
    torch.testing.assert_close(features_of(model, "0", "cls:NTC", tokens), output[:, 0])


def test_a_named_layout_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"Expected layer '0' to return a tensor with the axes NCHW, but got .*\(4, 5, 6"
    ):
        features_of(nn.Sequential(nn.Linear(6, 6)), "0", "mean:NCHW", torch.randn(4, 5, 6))


def test_a_named_layout_is_no_matter_to_layers_without_positions() -> None:
    features = features_of(nn.Sequential(nn.Linear(6, 6)), "0", "mean:NCHW", torch.randn(4, 6))
    assert features.shape == (4, 6)


def test_a_layout_once_found_is_remembered() -> None:
    """So that a later batch of as many samples as tokens is read like the batches before it."""
    model = nn.Sequential(nn.Linear(6, 6))
    with FeatureExtractor(model) as extractor:
        for n in (4, 5, 3):
            tokens = torch.randn(n, 5, 6)
            expected = model(tokens).double().mean(1)
            torch.testing.assert_close(extractor.collect()["0"], expected)


def test_a_remembered_layout_that_no_longer_fits_is_found_anew() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 6))
    with FeatureExtractor(model, "1") as extractor:
        for shape, axis in (((4, 5, 6), 1), ((4, 2, 3, 6), (1, 2)), ((4, 5, 6), 1)):
            tokens = torch.randn(shape)
            expected = model(tokens).double().mean(axis)
            torch.testing.assert_close(extractor.collect()["1"], expected)


def test_a_callable_pools_as_it_likes() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    tokens = torch.randn(5, 5, 6)
    features = features_of(model, "0", lambda output: output.amax(dim=1), tokens)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, model(tokens).amax(dim=1).double())


def test_a_callable_runs_without_gradients_and_in_the_layer_s_precision() -> None:
    model, weight = nn.Sequential(nn.Linear(6, 6)), nn.Parameter(torch.randn(6, 6))
    outputs = []

    def project(output: Tensor) -> Tensor:
        outputs.append(output)
        return output.float().mean(1) @ weight

    with torch.autocast("cpu", torch.bfloat16):
        features = features_of(model, "0", project, torch.randn(4, 5, 6))
    assert not features.requires_grad
    assert not outputs[0].requires_grad
    assert torch.equal(features, (outputs[0].float().mean(1) @ weight).double())  # not a product in bfloat16


@pytest.mark.parametrize(
    ("pooling", "got"),
    [
        (lambda output: output, r"\(4, 5, 6\)"),
        (lambda output: output.argmax(dim=1), r"\(4, 6\)"),
        (lambda output: None, "NoneType"),
    ],
)
def test_a_callable_that_returns_no_features_is_an_error(pooling: type, got: str) -> None:
    message = rf"Expected `pooling` to return .* for layer '0' of output shape \(4, 5, 6\), but got {got}"
    with pytest.raises(ValueError, match=message):
        features_of(nn.Sequential(nn.Linear(6, 6)), "0", pooling, torch.randn(4, 5, 6))
