"""Which layers are chosen: by default the repeated blocks, of every kind of network; else what the user names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.models import resnet18
from torchvision.models.detection import maskrcnn_resnet50_fpn
from transformers import T5Config, T5Model

from lit_cka.features.layers import Layers, modules_by_name, repeated_blocks, select_layers
from tests import networks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)


class Network(nn.Module):
    """Eleven blocks, so that `blocks.1` is also the beginning of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.head = nn.Linear(4, 4)


BLOCKS = [f"blocks.{i}" for i in range(11)]


def test_modules_have_the_names_of_the_network_as_it_was_written() -> None:
    model = Network()
    inner = model.blocks[3]
    model.blocks[3] = torch.compile(inner, backend="eager")
    modules = modules_by_name(torch.compile(model, backend="eager"))
    assert set(modules) == {"", *(name for name, _ in Network().named_modules())}
    assert isinstance(modules[""], torch._dynamo.OptimizedModule)
    assert modules["blocks.3"] is model.blocks[3] is not inner  # the one that is called
    assert modules["blocks.3.fc1"] is inner.fc1


@pytest.mark.parametrize("name", networks.BLOCKS)
def test_the_default_are_the_repeated_blocks(name: str) -> None:
    model = networks.build(name)
    assert select_layers(model) == networks.BLOCKS[name]
    # Below another module, such as a LightningModule, they are the same ones.
    wrapper = nn.Module()
    wrapper.net, wrapper.loss = model, nn.CrossEntropyLoss()
    assert select_layers(wrapper) == [f"net.{block}" for block in networks.BLOCKS[name]]


def test_a_whole_network_in_a_container_is_no_block() -> None:
    """Two towers by name, or a backbone and its head in a row."""
    model, head = networks.build("BERT"), nn.Sequential(Block(), nn.ReLU())
    assert select_layers(nn.ModuleDict({"net": model})) == [f"net.{block}" for block in networks.BLOCKS["BERT"]]
    assert select_layers(nn.Sequential(model, head)) == [f"0.{block}" for block in networks.BLOCKS["BERT"]]
    plain = nn.Module()
    plain.encoder = Network()
    assert select_layers(nn.Sequential(plain, head)) == [f"0.encoder.{block}" for block in BLOCKS]


@pytest.mark.parametrize("name", ["BERT", "open_clip ViT"])
def test_neither_are_two_networks_of_one_class(name: str) -> None:
    """Question and passage, say, or student and teacher."""
    model = nn.ModuleDict({"first": networks.build(name), "second": networks.build(name)})
    assert select_layers(model) == [f"{tower}.{block}" for tower in model for block in networks.BLOCKS[name]]


def test_blocks_of_torchvision_and_torch() -> None:
    assert repeated_blocks(resnet18()) == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert repeated_blocks(nn.TransformerEncoder(layer, 3)) == ["layers.0", "layers.1", "layers.2"]
    both = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    assert repeated_blocks(nn.Transformer(8, 2, 2, 2, 16, batch_first=True)) == both


def test_blocks_of_an_encoder_and_a_decoder() -> None:
    """T5's blocks hold lists of their own: attention, attention across, and the layers behind."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = T5Model(T5Config(vocab_size=networks.VOCABULARY, **sizes))
    assert repeated_blocks(model) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


class Branched(nn.Module):
    """A block that holds a container of its own."""

    def __init__(self, branches: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.branches = branches


def wide(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)], ids=["list", "sequence"])
@pytest.mark.parametrize(
    "branches",
    [
        lambda: nn.ModuleDict({"first": nn.Linear(4, 40), "second": nn.Linear(4, 40)}),
        lambda: nn.ModuleList([wide(40), Block()]),
        lambda: nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 40))]),
        lambda: nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1))]),
        lambda: nn.ModuleList([wide(1), wide(1)]),
        lambda: nn.ModuleList([wide(40) for _ in range(4)]),
    ],
    ids=["layers", "different branches", "branches with norms", "one branch", "small adapters", "experts"],
)
def test_blocks_are_not_looked_into(branches: Callable[[], nn.Module], container: type) -> None:
    blocks = container([Branched(branches()) for _ in range(3)])
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": blocks})
    assert repeated_blocks(model) == ["blocks.0", "blocks.1", "blocks.2"]


def test_stages_are_looked_into_and_what_lies_between_them_left_out() -> None:
    def stage(depth: int) -> nn.Module:
        return nn.ModuleDict({"downsample": nn.Linear(4, 4), "blocks": nn.Sequential(*(Block() for _ in range(depth)))})

    model = nn.ModuleDict({"stages": nn.ModuleList([stage(1), stage(2)])})
    assert repeated_blocks(model) == ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]


def test_stages_that_are_nothing_but_lists_of_blocks() -> None:
    model = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))
    assert repeated_blocks(model) == ["0.0", "0.1", "1.0"]


def test_blocks_in_a_dictionary() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleDict({"first": Block(), "second": Block()}), "head": nn.Linear(4, 4)})
    assert repeated_blocks(model) == ["blocks.first", "blocks.second"]


def test_a_block_that_does_not_repeat_is_left_out() -> None:
    model = nn.Sequential(Block(), Block(), Branched(Block()))
    assert repeated_blocks(model) == ["0", "1"]


def test_dropout_between_the_blocks_is_no_matter() -> None:
    assert repeated_blocks(nn.Sequential(Block(), nn.Dropout(), Block())) == ["0", "2"]


def test_a_network_without_blocks_gets_its_layers_with_weights() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm([3, 3]), inner, nn.Conv1d(3, 3, 1))
    assert repeated_blocks(plain) == ["1", "3.0", "4"]
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == ["0", "2"]


def test_a_network_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected Sequential to have layers with weights to track, but found none"):
        repeated_blocks(nn.Sequential(nn.ReLU(), nn.LayerNorm(3), nn.Embedding(3, 3)))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.1", ["blocks.1"]),
        ("head", ["head"]),
        ("blocks.*", BLOCKS),
        ("blocks.?", BLOCKS[:10]),
        ("blocks.1?", BLOCKS[10:]),
        ("blocks.[13-5]", ["blocks.1", "blocks.3", "blocks.4", "blocks.5"]),
        ("blocks.[!0-8]", ["blocks.9"]),
        ("blocks.1*", ["blocks.1", "blocks.10"]),
        ("*", ["stem", "blocks", "head"]),
        ("blocks.*.fc1", [f"{block}.fc1" for block in BLOCKS]),
        ("*.fc1", None),
        ("**.fc1", [f"{block}.fc1" for block in BLOCKS]),
        ("**fc1", [f"{block}.fc1" for block in BLOCKS]),
        ("blocks.1**", ["blocks.1", "blocks.1.fc1", "blocks.1.fc2", "blocks.10", "blocks.10.fc1", "blocks.10.fc2"]),
        ("**.blocks.?", BLOCKS[:10]),
        ("blocks.**", [name for block in BLOCKS for name in (block, f"{block}.fc1", f"{block}.fc2")]),
        (re.compile(r"blocks\.\d"), BLOCKS[:10]),
        (re.compile(r"blocks\.\d+\.fc[13]"), [f"{block}.fc1" for block in BLOCKS]),
        (["head", "blocks.3", re.compile("blocks.[24]"), "blocks.[23]"], ["blocks.2", "blocks.3", "blocks.4", "head"]),
        (("stem",), ["stem"]),
        (lambda name, module: isinstance(module, nn.Linear) and "." not in name, ["stem", "head"]),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)  # fmt: skip
def test_layers_by_name_glob_regex_and_callable(layers: Layers, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="No layer matches"):
            select_layers(Network(), layers)
    else:
        assert select_layers(Network(), layers) == expected


def test_a_dot_in_a_glob_is_a_dot() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "axb": nn.Linear(2, 2), "a+b": nn.Linear(2, 2)})
    assert select_layers(model, "a.?") == ["a.b"]
    assert select_layers(model, "a+*") == ["a+b"]
    assert select_layers(model, "a?b") == ["axb", "a+b"]
    assert select_layers(model, "a*b") == ["axb", "a+b"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block.1", r"Unknown layer 'block\.1'\. Did you mean 'blocks\.1'"),
        ("model.blocks.3", r"Unknown layer 'model\.blocks\.3'\. Did you mean .*'blocks\.3'"),
        ("blocks.11", r"Unknown layer 'blocks\.11'\. Did you mean 'blocks\.1"),
        ("fc1", r"Unknown layer 'fc1'\. Did you mean 'blocks\.0\.fc1', 'blocks\.1\.fc1'"),
        (["head", "heat"], r"Unknown layer 'heat'\. Did you mean 'head'\?"),
        ("xyz", r"Unknown layer 'xyz'\. The model has 'stem', 'blocks', 'blocks\.0', .* and 28 more"),
        ("", "Unknown layer ''. The model has 'stem'"),
        ("block.*", r"No layer matches 'block\.\*'. Did you mean 'blocks\.\*'"),
        ("model.blocks.*", r"No layer matches 'model\.blocks\.\*'. Did you mean 'blocks\.\*'"),
        ("*.fc3", r"No layer matches '\*\.fc3'. The model has 'stem', 'blocks', 'blocks\.\*', 'blocks\.\*\.fc1'"),
        ("fc?", r"No layer matches 'fc\?'. Did you mean 'blocks\.0\.fc\?', 'blocks\.1\.fc\?'"),
        ("xyz*", r"No layer matches 'xyz\*'. The model has 'stem'"),
        (re.compile("locks"), "No layer matches 'locks'. Did you mean 'blocks'"),
        (lambda name, module: False, "Expected `layers` to accept at least one of 'stem', .* but it accepted none"),
        ([], "Expected `layers` to name at least one layer, but got an empty sequence"),
        ((), "Expected `layers` to name at least one layer, but got an empty sequence"),
    ],
)
def test_what_matches_nothing_is_an_error_that_suggests_names(layers: Layers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(Network(), layers)


def test_names_are_those_before_compiling() -> None:
    """`torch.compile` wraps modules; nothing is compiled here, as nothing runs."""
    compiled = torch.compile(Network())
    assert select_layers(compiled) == BLOCKS
    assert select_layers(compiled, "blocks.1") == ["blocks.1"]
    blockwise = Network()
    for index, block in enumerate(blockwise.blocks):
        blockwise.blocks[index] = torch.compile(block)
    assert select_layers(blockwise) == BLOCKS
    assert select_layers(blockwise, "**.fc1") == [f"{block}.fc1" for block in BLOCKS]


def test_the_wrapper_of_a_compiled_model_is_no_layer() -> None:
    assert select_layers(torch.compile(Network()), "*") == ["stem", "blocks", "head"]


def test_under_a_wrapper_a_pattern_is_suggested_with_the_wrapper_s_name() -> None:
    wrapped = nn.ModuleDict({"base_model": nn.ModuleDict({"model": Network()})})
    for layers, suggested in (("blocks.*", "base_model.model.blocks.*"), ("blocks.0", "base_model.model.blocks.0")):
        with pytest.raises(ValueError, match=f"Did you mean '{re.escape(suggested)}'"):
            select_layers(wrapped, layers)


class PerceptualLoss(nn.Module):
    """Of the user's own, with a network in it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_losses_and_metrics_are_no_layers_of_the_network() -> None:
    """Whatever networks they hold, and however many there are."""
    measures = {
        "loss": PerceptualLoss(),
        "criterion": nn.CrossEntropyLoss(weight=torch.ones(3)),
        "accuracy": MulticlassAccuracy(3),
        "metrics": MetricCollection({"a": MulticlassAccuracy(3), "b": MulticlassF1Score(3)}),
        "distances": nn.ModuleList([PerceptualLoss(), PerceptualLoss()]),
    }
    plain = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 3), **measures})
    assert repeated_blocks(plain) == ["first", "second"]
    assert repeated_blocks(nn.ModuleDict({"network": Network(), **measures})) == [
        f"network.{name}" for name in repeated_blocks(Network())
    ]


def test_what_a_detector_runs_on_regions_is_no_layer_of_samples() -> None:
    """Its rows are regions, and may by chance be as many as the images."""
    kinds = {"weights": None, "weights_backbone": None, "min_size": 32, "max_size": 32}
    chosen = repeated_blocks(maskrcnn_resnet50_fpn(**kinds))
    assert chosen
    assert not any(name.startswith("roi_heads") for name in chosen)
