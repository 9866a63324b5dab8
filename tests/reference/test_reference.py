"""The frozen reference: every kind of it gives the features of its own weights, and a wrong one is refused."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import CKACallback
from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.reference.isolation import FollowsLiveWeightsError
from lit_cka.reference.snapshot import snapshot
from lit_cka.samples.random_states import preserved_rng
from tests import oracles
from tests.tracking.helpers import (
    BLOCKS,
    WIDTH,
    Classifier,
    Net,
    features,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The kinds of reference.


class WithHead(Net):
    """The same network with a head for other classes."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes=num_classes)


def lightning_checkpoint(folder: Path, model: Classifier) -> Path:
    run = trainer(folder, max_epochs=1)
    run.fit(copy.deepcopy(model), train_loader(), loader())
    trained, path = run.lightning_module, folder / "lightning.ckpt"
    trained.load_state_dict(model.state_dict())
    run.save_checkpoint(path)
    return path


def saved(save: Callable[[Any, Path], None], content: Callable[[Classifier], Any], name: str) -> Any:
    def write(folder: Path, model: Classifier) -> Path:
        save(content(model), folder / name)
        return folder / name

    return write


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


KINDS: dict[str, Callable[[Path, Classifier], Any]] = {
    "module": lambda folder, model: model,
    "inner module": lambda folder, model: model.net,
    "state dict": lambda folder, model: model.state_dict(),
    "state dict of the inner module": lambda folder, model: model.net.state_dict(),
    "lightning": lightning_checkpoint,
    "safetensors": saved(save_file, lambda model: model.state_dict(), "model.safetensors"),
    "safetensors of the inner module": saved(save_file, lambda model: model.net.state_dict(), "net.safetensors"),
    "torch": saved(torch.save, lambda model: model.state_dict(), "model.pt"),
    "torch as a string": lambda folder, model: str(
        saved(torch.save, lambda model: model.state_dict(), "model.pt")(folder, model)
    ),
    "wrapped by DDP": saved(torch.save, lambda model: prefixed(model.state_dict(), "module."), "ddp.pt"),
    "inner, wrapped by DDP": saved(torch.save, lambda model: prefixed(model.net.state_dict(), "module."), "ddp.pt"),
    "compiled": saved(torch.save, lambda model: prefixed(model.net.state_dict(), "_orig_mod."), "compiled.pt"),
    "under another name": saved(torch.save, lambda model: prefixed(model.net.state_dict(), "visual."), "clip.pt"),
    "nested": saved(torch.save, lambda model: {"model": model.net.state_dict(), "epoch": 3}, "nested.pt"),
    "without a head": saved(
        torch.save,
        lambda model: {name: value for name, value in model.net.state_dict().items() if "head" not in name},
        "headless.pt",
    ),
    "another head": saved(
        torch.save,
        lambda model: {**model.net.state_dict(), "head.weight": torch.ones(9, WIDTH), "head.bias": torch.ones(9)},
        "other_head.pt",
    ),
    "more weights": saved(
        torch.save, lambda model: {**model.net.state_dict(), "text.projection": torch.ones(4, 4)}, "more.pt"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_reference(tmp_path: Path, kind: str) -> None:
    live, other = Classifier(), Classifier()
    reference = KINDS[kind](tmp_path, other)
    expected = frozen(other)
    callback = CKACallback(reference=reference)
    trainer(tmp_path, callback, max_epochs=1).fit(live, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(expected, live, BLOCKS, loader()), abs=1e-9)
    assert callback.scores != pytest.approx(dict.fromkeys(BLOCKS, 1.0), abs=1e-3)
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])


@pytest.mark.parametrize("part", [lambda live: live, lambda live: live.net, lambda live: Tied(live.net)], ids="abc")
def test_a_reference_that_shares_weights_with_the_live_model_is_copied(tmp_path: Path, part: Any) -> None:
    live = Classifier()
    before = frozen(live)
    callback = CKACallback(reference=part(live))
    trainer(tmp_path, callback).fit(live, train_loader(), loader())
    assert live.net.training
    assert all(parameter.requires_grad for parameter in live.parameters())
    assert max(callback.scores.values()) < 0.99
    assert callback.scores == pytest.approx(hand_cka(before, live, BLOCKS, loader()), abs=1e-9)


def test_a_state_dict_of_the_live_model_is_copied(tmp_path: Path) -> None:
    """Its tensors are the live model's own. Data that come after the training are recorded with the weights before."""
    live = Classifier()
    before = frozen(live)
    callback = CKACallback(reference=live.state_dict())
    run = trainer(tmp_path, callback)
    run.fit(live, train_loader(), loader())
    run.test(live, loader(seed=2), verbose=False)
    assert callback.history[-1]["stage"] == "test"
    assert callback.history[-1]["scores"] == pytest.approx(hand_cka(before, live, BLOCKS, loader(seed=2)), abs=1e-9)
    assert max(callback.history[-1]["scores"].values()) < 0.99


def test_weights_that_the_live_model_ties_are_another_architecture(tmp_path: Path) -> None:
    live = Classifier()
    reference = live.state_dict()
    live.net.blocks[1].linear.weight = live.net.blocks[0].linear.weight
    message = r"one value for 'net.blocks.0.linear.weight' and 'net.blocks.1.linear.weight', which are the same tensor"
    assert_refused(tmp_path, reference, message, live=live)
    trainer(tmp_path, CKACallback(reference=live.state_dict()), max_epochs=1).fit(live, train_loader(), loader())


class Tied(nn.Module):
    """Another module around the very same blocks."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.blocks = net.blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_reference_of_other_depth_and_width_outside_the_layers(tmp_path: Path) -> None:
    """It is run on the inputs of the live model's `net`, whose layers it has, and a head of its own."""
    live, other = Classifier(), WithHead(num_classes=11)
    callback = CKACallback(reference=other)
    expected = frozen(other)
    trainer(tmp_path, callback, max_epochs=1).fit(live, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(Classifier(expected), live, BLOCKS, loader()), abs=1e-9)


def test_a_wider_reference(tmp_path: Path) -> None:
    """Linear CKA compares features of different widths."""

    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(WIDTH, width), nn.Linear(width, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x).tanh())

    live, other = Classifier(Wide(4)), Classifier(Wide(7))
    callback = CKACallback(reference=other)
    trainer(tmp_path, callback, max_epochs=1).fit(live, train_loader(), loader())
    names = ["net.blocks.0", "net.blocks.1"]
    assert callback.scores == pytest.approx(hand_cka(other, live, names, loader()), abs=1e-9)


# References that are refused.


def assert_refused(
    folder: Path, reference: Any, message: str, error: type[Exception] = ValueError, live: Classifier | None = None
) -> None:
    module, callback = live or Classifier(), CKACallback(reference=reference)
    run = trainer(folder, callback)
    with pytest.raises(error, match=message):
        run.fit(module, train_loader(), loader())
    assert run.global_step == 0
    assert module.losses == []
    assert hooks_of(module) == 0


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def test_modules_of_another_architecture(tmp_path: Path) -> None:
    assert_refused(tmp_path, Other(), r"Other has another architecture: .*'net.blocks.0'.* it has \['stages'")
    assert_refused(tmp_path, Net(num_blocks=2), r"another architecture: .*'net.blocks.0'")


def test_modules_that_fail_on_the_inputs(tmp_path: Path) -> None:
    message = r"The reference Net failed on the inputs of 'net' \(RuntimeError: .*\(16x6 and 5x5\)|running_mean"
    assert_refused(tmp_path, Net(width=5), message, RuntimeError)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda weights: Other().state_dict(),
            r"another architecture: 18 of the \d+ tensors .*blocks.0.norm.weight \(6,\)",
        ),
        (
            lambda weights: {name: value for name, value in weights.items() if "blocks.1.linear" not in name},
            r"2 of the \d+ tensors needed are missing .* Expected net.blocks.1.linear.weight \(6, 6\), .*bias \(6,\)",
        ),
        (
            lambda weights: {**weights, "net.blocks.0.linear.weight": torch.ones(7, 6)},
            r"1 of the \d+ tensors needed .* Expected net.blocks.0.linear.weight \(6, 6\)\.",
        ),
        (lambda weights: {}, "another architecture|no weights|empty"),
    ],
    ids=["other", "missing", "shape", "empty"],
)
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.timeout(20)
def test_weights_of_another_architecture(tmp_path: Path, spoil: Any, message: str, as_file: bool) -> None:
    reference = spoil(Classifier().state_dict())
    if as_file:
        torch.save(reference, tmp_path / "weights.pt")
        reference, message = tmp_path / "weights.pt", f"{message}|Expected .* to hold a state dict"
    assert_refused(tmp_path, reference, message)


def test_a_path_without_a_file(tmp_path: Path) -> None:
    assert_refused(tmp_path, tmp_path / "none.ckpt", "Expected a checkpoint file at '.*none.ckpt'", FileNotFoundError)
    # A misspelt "initial" is taken for a path.
    assert_refused(tmp_path, "inital", "there is no file 'inital': did you mean 'initial'", FileNotFoundError)


@pytest.mark.parametrize("name", ["damaged.pt", "damaged.ckpt", "damaged.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    weights = Classifier().state_dict()
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(tmp_path, path, f"{name}' is damaged or no")
    path.write_text("not a checkpoint at all")
    assert_refused(tmp_path, path, f"{name}' is damaged or no")
    path.write_bytes(b"")
    assert_refused(tmp_path, path, f"{name}' is damaged or no")


class Custom:
    """What `weights_only` doesn't let through."""

    ran = False

    def __reduce__(self) -> Any:
        return (_run, ())


def _run() -> Custom:
    Custom.ran = True
    return Custom()


def test_pickled_objects_need_an_opt_in(tmp_path: Path) -> None:
    live, other = Classifier(), Classifier()
    path = tmp_path / "pickled.pt"
    torch.save({"state_dict": other.state_dict(), "config": Custom()}, path)
    assert_refused(tmp_path, path, r"holds pickled objects .*weights_only=False\)` and pass the result")
    assert not Custom.ran
    callback = CKACallback(reference=load_state_dict(path, weights_only=False))
    assert Custom.ran
    trainer(tmp_path, callback, max_epochs=1).fit(live, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(other, live, BLOCKS, loader()), abs=1e-9)


def test_a_pickled_module_needs_an_opt_in(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    assert_refused(tmp_path, path, "holds pickled objects")
    path.write_bytes(pickle.dumps({"config": Custom}, protocol=2))
    assert_refused(tmp_path, path, "holds pickled objects")


# References that would follow the live weights.


def patch_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


def patch_network(module: Classifier) -> None:
    patch_forward(module.net)


def patch_root(module: Classifier) -> None:
    patch_forward(module)


def patch_layer(module: Classifier) -> None:
    patch_forward(module.net.blocks[1])


def patch_inside_layer(module: Classifier) -> None:
    patch_forward(module.net.blocks[2].linear)


def close_over_parameter(module: Classifier) -> None:
    linear = module.net.blocks[1].linear
    weight = linear.weight
    linear.forward = lambda x: x @ weight.T


def close_over_buffer(module: Classifier) -> None:
    norm = module.net.blocks[1].norm
    mean = norm.running_mean
    norm.forward = lambda x: x - mean


def close_over_view(module: Classifier) -> None:
    linear = module.net.blocks[1].linear
    rows = linear.weight.detach()[:3]
    linear.forward = lambda x: torch.cat([x @ rows.T, x[:, 3:]], dim=1)


FOLLOWERS = [
    patch_network,
    patch_root,
    patch_layer,
    patch_inside_layer,
    close_over_parameter,
    close_over_buffer,
    close_over_view,
]


class Augmented(TensorDataset):
    """Samples with noise that is drawn each time, so that the reference has to run beside the model."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn(WIDTH), y


@pytest.mark.filterwarnings("ignore:The data differ at every pass")
@pytest.mark.parametrize("frozen_weights", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("follow", FOLLOWERS)
def test_a_copy_that_follows_the_live_weights_is_refused(
    tmp_path: Path, follow: Callable[[Classifier], None], frozen_weights: bool
) -> None:
    module, callback = Classifier(), CKACallback()
    module.net.blocks.requires_grad_(not frozen_weights)
    follow(module)
    run = trainer(tmp_path, callback)
    augmented = DataLoader(Augmented(*loader().dataset.tensors), batch_size=16)
    with pytest.raises(FollowsLiveWeightsError, match=r"follows the live weights: .* Pass `reference=`"):
        run.fit(module, train_loader(), augmented)
    assert run.global_step == 0
    assert hooks_of(module) == 0
    assert callback.history == []


@pytest.mark.parametrize("follow", FOLLOWERS)
def test_a_recording_follows_nothing(tmp_path: Path, follow: Callable[[Classifier], None]) -> None:
    module, callback = Classifier(), CKACallback()
    follow(module)
    recorded = [value[0] for value in features(module, BLOCKS, [next(iter(DataLoader(loader().dataset, 44)))]).values()]
    trainer(tmp_path, callback).fit(module.train(), train_loader(), loader())
    after = [value[0] for value in features(module, BLOCKS, [next(iter(DataLoader(loader().dataset, 44)))]).values()]
    by_hand = [oracles.linear_cka(X, Y, True) for X, Y in zip(recorded, after, strict=True)]
    assert list(callback.scores.values()) == pytest.approx(by_hand, abs=1e-7)  # float32, in other batches
    assert min(by_hand) < 0.99


@pytest.mark.parametrize("follow", FOLLOWERS)
def test_a_reference_built_anew_is_the_way_out(tmp_path: Path, follow: Callable[[Classifier], None]) -> None:
    module, other = Classifier(), Classifier()
    follow(module)
    callback = CKACallback(reference=other)
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(other, module, BLOCKS, loader()), abs=1e-9)


def test_no_follower_among_models_that_hold_tensors_in_other_ways(tmp_path: Path) -> None:
    class Holding(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [torch.ones(WIDTH)]
            self.register_buffer("table", torch.ones(WIDTH), persistent=False)
            self.cached: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.cached = x.detach().mean(dim=0)
            return super().forward(x * self.scales[0] * self.table)

    module, callback = Classifier(Holding()), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)


# The snapshot.


def test_a_snapshot_is_frozen_and_shares_nothing() -> None:
    model = Net(dropout=0.5)
    model.alias = model.blocks[0]  # tied weights stay tied
    copied = snapshot(model)
    assert not copied.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.untyped_storage().data_ptr() in own for tensor in copied.state_dict().values())
    assert copied.alias is copied.blocks[0]


def test_a_snapshot_in_inference_mode_is_of_normal_tensors() -> None:
    model = Net()
    with torch.inference_mode():
        copied = snapshot(model)
    assert not any(tensor.is_inference() for tensor in copied.state_dict().values())


def test_preserved_rng() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    random.seed(0)
    np.random.seed(0)
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with preserved_rng():
        seen = draw()
    assert draw() == seen
    assert expected[:2] == seen[:2]
