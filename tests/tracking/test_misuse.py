"""What can't be measured: one clear error before the first batch, or one warning, and never a made-up number."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    NUM_VAL,
    WIDTH,
    Block,
    Classifier,
    Net,
    PlainLogger,
    dataset,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)


def assert_refused(
    folder: Path, module: pl.LightningModule, callback: CKACallback, message: str, **options: Any
) -> None:
    """The error comes before the first training batch, and leaves no hook behind."""
    data = options.pop("data", None) or loader()
    run = trainer(folder, callback, **options)
    with pytest.raises(ValueError, match=message):
        run.fit(module, train_loader(), data)
    assert run.global_step == 0
    assert getattr(module, "losses", []) == []
    assert hooks_of(module) == 0
    assert callback.history == []


def matching(seen: Iterable[warnings.WarningMessage], text: str) -> list[str]:
    return [str(warning.message) for warning in seen if text in str(warning.message)]


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "approximate"}, 'Expected `estimator` to be "exact" or "minibatch", but got \'approximate\''),
        ({"stages": []}, "Expected `stages`"),
        ({"stages": "validate"}, "Expected `stages` to be a sequence"),
        ({"stages": ["fit"]}, r"Expected `stages` .* but got \['fit'\]"),
        ({"dataloaders": []}, "Expected `dataloaders`"),
        ({"dataloaders": [0, -1]}, "Expected `dataloaders`"),
        ({"every_n_validations": 0}, "Expected `every_n_validations` to be at least 1, but got 0"),
        ({"max_batches": 0}, "Expected `max_batches` to be at least 1, but got 0"),
        ({"thresholds": (0.5, 0.9)}, "Expected `thresholds`"),
        ({"pooling": "average"}, "Expected `pooling` to be one of 'mean', .* but got 'average'"),
        ({"pooling": "mean:NHW"}, "Expected the layout"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CKACallback(**options)


# Layers.


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("net.block.1", "Unknown layer 'net.block.1'. Did you mean .*'net.blocks.1'"),
        ("blocks.1", "Unknown layer 'blocks.1'. Did you mean 'net.blocks.1'"),
        ([BLOCKS[0], "net.blocks.3"], "Unknown layer 'net.blocks.3'"),
        ("encoder.*", "No layer matches 'encoder.*'"),
        ([], "Expected `layers` to name at least one layer"),
        (lambda name, module: False, "Expected `layers` to accept at least one"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_unknown_layers(tmp_path: Path, layers: Any, message: str, num_sanity_val_steps: int) -> None:
    callback = CKACallback(layers=layers)
    assert_refused(tmp_path, Classifier(), callback, message, num_sanity_val_steps=num_sanity_val_steps)


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_dataloader_that_is_not_there(tmp_path: Path, num_sanity_val_steps: int) -> None:
    callback = CKACallback(dataloaders=[0, 1])
    message = r"Expected `dataloaders` to be indices below 1, but got \[1\]"
    assert_refused(tmp_path, Classifier(), callback, message, num_sanity_val_steps=num_sanity_val_steps)


class Scale(nn.Module):
    """Says nothing about the axes of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Square(nn.Module):
    """As many tokens as samples in the first batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(), Scale()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] * torch.arange(16)[:, None].sin()
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 1])


def test_an_ambiguous_layout(tmp_path: Path) -> None:
    callback = CKACallback(layers="net.layers.*")
    message = r"Layer 'net.layers.0' returned shape \(16, 16, 6\), .* Say which: pooling=\"mean:NTC\" or"
    assert_refused(tmp_path, Classifier(Square()), callback, message)


def test_a_stated_layout_settles_it(tmp_path: Path) -> None:
    module, callback = Classifier(Square()), CKACallback(layers="net.layers.*", pooling="mean:NTC")
    before, names = frozen(module), ["net.layers.0", "net.layers.1"]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    by_hand = hand_cka(before, module, names, loader(), pool=lambda output, batch: output.double().mean(dim=1))
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


class Odd(Net):
    """A layer that never runs, one whose output is integers, one that returns a string."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.rounding = Rounding()
        self.naming = Naming()

    def forward(self, x: Tensor) -> Tensor:
        self.rounding(x)
        self.naming(x)
        return super().forward(x)


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class Naming(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "x"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("net.unused", "Layer 'net.unused' has not run"),
        ("net.rounding", "Expected layer 'net.rounding' to return floating-point .* tensor of torch.int64"),
        ("net.naming", "Expected layer 'net.naming' to return floating-point features, but it returned str"),
    ],
)
def test_layers_without_features(tmp_path: Path, layer: str, message: str) -> None:
    assert_refused(tmp_path, Classifier(Odd()), CKACallback(layers=[*BLOCKS, layer]), message)


class Repeating(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[1](x))


class TwoViews(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0]), self(-batch[0])


@pytest.mark.parametrize(
    ("module", "layer", "times"),
    [
        (Classifier(Repeating()), BLOCKS[1], "more than once in one call"),
        (TwoViews(), BLOCKS[0], "in more than one call"),
    ],
    ids=["layer", "step"],
)
def test_layers_that_run_twice(tmp_path: Path, module: Classifier, layer: str, times: str) -> None:
    assert_refused(tmp_path, module, CKACallback(), f"Layer '{layer}' has run {times} of the model")


def test_pooling_that_gives_no_features(tmp_path: Path) -> None:
    callback = CKACallback(pooling=lambda output: output.sum())
    assert_refused(tmp_path, Classifier(), callback, r"Expected `pooling` to return .* 'net.blocks.0' .* but got \(\)")


# Steps that feed a part of the network with what they computed from another part.


class EncoderDecoder(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net(num_classes=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x))


class Separate(EncoderDecoder):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.encoder(batch[0])), batch[1])


@pytest.mark.parametrize("layers", [None, "net.blocks.*"])
def test_an_encoder_and_a_decoder_called_separately(tmp_path: Path, layers: str | None) -> None:
    module, callback = Separate(), CKACallback(layers=layers)
    before, names = frozen(module), BLOCKS if layers else [*BLOCKS, *(f"encoder.blocks.{i}" for i in range(3))]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    by_hand = hand_cka(before, module, names, loader(), run=lambda model, batch: model.net(model.encoder(batch[0])))
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


def test_an_encoder_and_a_decoder_called_together(tmp_path: Path) -> None:
    module, callback = EncoderDecoder(), CKACallback()
    before, names = frozen(module), [*BLOCKS, *(f"encoder.blocks.{i}" for i in range(3))]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, names, loader()), abs=1e-9)


def test_an_encoder_alone_of_two_called_separately(tmp_path: Path) -> None:
    module, callback = Separate(), CKACallback(layers="encoder.blocks.*")
    before, names = frozen(module), [f"encoder.blocks.{i}" for i in range(3)]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, names, loader()), abs=1e-9)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # the frozen encoder, on purpose
def test_a_decoder_behind_a_frozen_encoder(tmp_path: Path) -> None:
    module, callback = Separate(), CKACallback()
    module.encoder.requires_grad_(False).eval()
    module.encoder.train = lambda mode=True: module.encoder  # as one does, so that its statistics stay
    before, names = frozen(module), [*BLOCKS, *(f"encoder.blocks.{i}" for i in range(3))]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    by_hand = hand_cka(before, module, names, loader(), run=lambda model, batch: model.net(model.encoder(batch[0])))
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


class Augmented(TensorDataset):
    """Other samples at every pass, so that the reference has to run beside the model."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn(WIDTH), y


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # the frozen encoder, on purpose
@pytest.mark.parametrize(
    ("kind", "expected"), [("frozen", [44, 44]), ("trained later", [44, 0]), ("statistics move", [0, 0])]
)
def test_a_decoder_whose_reference_runs_behind_a_frozen_encoder(tmp_path: Path, kind: str, expected: list[int]) -> None:
    """That is right only as long as the encoder is what it was."""
    module, callback = Separate(), CKACallback(layers="net.blocks.*", debiased=True)
    module.encoder.requires_grad_(False)
    if kind != "statistics move":
        module.encoder.eval()
        module.encoder.train = lambda mode=True: module.encoder
    if kind == "trained later":
        module.on_train_epoch_start = lambda: module.encoder.requires_grad_(module.current_epoch == 1)
    data = DataLoader(Augmented(*loader().dataset.tensors), batch_size=16)
    seen = own_warnings(tmp_path, module, callback, data)
    assert [record["n"] for record in callback.history] == expected
    changed = [text for text in seen if "has changed since the start" in text]
    assert len(changed) == (0 if kind == "frozen" else len(BLOCKS))
    assert all(np.isnan(score) == (kind != "frozen") for score in callback.scores.values())
    name = "running_mean" if kind == "statistics move" else "weight"
    assert all(re.search(rf"'encoder\.[\w.]*{name}' has changed", text) for text in changed)


def test_a_network_fed_through_a_trained_parameter(tmp_path: Path) -> None:
    """No module, but trained: the recording has both as they were."""

    class Prompted(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=1.0)
            self.mixing = nn.Parameter(torch.eye(WIDTH))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0] @ self.mixing), batch[1])

    module, callback = Prompted(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    run = lambda model, batch: model.net(batch[0] @ model.mixing)  # noqa: E731
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader(), run=run), abs=1e-9)


def test_two_encoders_fed_with_what_the_step_computed_from_the_batch(tmp_path: Path) -> None:
    class Scaled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = Net()

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0] / 2) - self.other(batch[0] / 3), batch[1])

    module, callback = Scaled(), CKACallback()
    before, names = frozen(module), [*BLOCKS, *(f"other.blocks.{i}" for i in range(3))]
    run = lambda model, batch: (model.net(batch[0] / 2), model.other(batch[0] / 3))  # noqa: E731
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, names, loader(), run=run), abs=1e-9)


def test_layers_that_the_step_calls_one_by_one(tmp_path: Path) -> None:
    class OneByOne(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = batch[0]
            for block in self.net.blocks:
                x = block(x)

    module, callback = OneByOne(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)
    # A reference that runs beside the model is called as a whole; the way out is in the message.
    callback = CKACallback(reference=Classifier(Net(num_classes=5)))
    assert_refused(tmp_path, OneByOne(), callback, r"The reference did not run for layer 'net.blocks.0'.*`forward`")


# Recordings of nothing, or of something else.


class Returning(Classifier):
    """Leaves its validation out while Lightning checks it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_step_that_returns_early_in_a_sanity_check(tmp_path: Path, num_sanity_val_steps: int) -> None:
    message = r"'net.blocks.0' has not run.* in which `trainer.sanity_checking` is true: does the step return early"
    assert_refused(tmp_path, Returning(), CKACallback(), message, num_sanity_val_steps=num_sanity_val_steps)


class Changing(Net):
    """Has a layer that runs in training only, or also in evaluation later."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.is_on = nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_on or self.training:
            self.is_on = self.is_on or self.training
            self.extra(x)
        return super().forward(x)


def test_a_layer_that_runs_later_alone(tmp_path: Path) -> None:
    callback = CKACallback(layers=[*BLOCKS, "net.extra"])
    assert_refused(tmp_path, Classifier(Changing()), callback, "Layer 'net.extra' has not run")


def own_warnings(folder: Path, module: pl.LightningModule, callback: CKACallback, data: Any, **how: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(folder, callback, **how).fit(module, train_loader(), data)
    return [str(each.message) for each in seen if "lit_cka" in each.filename or "CKA" in str(each.message)]


class Nothing(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_a_dataloader_that_gives_nothing(tmp_path: Path) -> None:
    callback = CKACallback()
    (message,) = own_warnings(tmp_path, Classifier(), callback, DataLoader(Nothing(), 4))
    assert message == "The validate dataloader 0 is empty: it gave no batch, so there is no CKA (NaN)."
    assert [record["n"] for record in callback.history] == [0, 0]
    assert all(np.isnan(score) for score in callback.scores.values())


@pytest.mark.filterwarnings("ignore:Total length of")
def test_one_of_two_dataloaders_is_empty(tmp_path: Path) -> None:
    class Seeing(Classifier):
        num_steps = 0

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            type(self).num_steps += 1

    callback, module = CKACallback(), Seeing()
    before = frozen(module)
    (message,) = own_warnings(tmp_path, module, callback, [loader(), DataLoader(Nothing(), 4)], num_sanity_val_steps=0)
    assert message.startswith("The validate dataloader 1 is empty")
    assert [record["n"] for record in callback.history] == [44, 0] * 2
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)
    assert Seeing.num_steps == 3 + 1 + 2 * 3  # the recording is made once
    known = [loader(), DataLoader(TensorDataset(torch.zeros(0, WIDTH), torch.zeros(0)))]
    assert_refused(tmp_path, Seeing(), CKACallback(), "but the dataset of validate dataloader 1 is empty", data=known)


class Window(IterableDataset):
    """Other samples in every pass, of which some have been there before."""

    def __init__(self, step: int) -> None:
        self.step, self.num_passes = step, -1

    def __iter__(self) -> Iterator[Any]:
        self.num_passes += 1
        start = max(self.num_passes - 2, 0) * self.step  # the first three are the same: two checks, and the recording
        return (dataset(300, 1)[index] for index in range(start, start + 40))


@pytest.mark.parametrize(("step", "expected"), [(10, [40, 40, 30]), (14, [40, 40, 26])])
def test_samples_that_do_not_come_again(tmp_path: Path, step: int, expected: list[int]) -> None:
    module, callback = Classifier(), CKACallback(debiased=True)
    before, data = frozen(module), DataLoader(Window(step), batch_size=16)
    (message,) = own_warnings(tmp_path, module, callback, data, max_epochs=3)
    assert message.startswith(f"{step} samples of validate dataloader 0 were not among those")
    assert "n says how many were compared" in message
    assert [record["n"] for record in callback.history] == expected
    batches = [dataset(300, 1)[step:40]]
    by_hand = hand_cka(before, module, BLOCKS, batches, debiased=True)
    assert callback.scores == pytest.approx(by_hand, abs=1e-7, nan_ok=True)


class Epochal(torch.utils.data.Dataset):
    """Its samples depend on the epoch."""

    def __init__(self) -> None:
        self.data, self.epoch = loader().dataset, 0

    def __len__(self) -> int:
        return NUM_VAL

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x * (1 + self.epoch * torch.arange(WIDTH)), y


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")  # on purpose
@pytest.mark.parametrize("shuffle", [False, True])
def test_samples_that_are_others_in_the_next_epoch(tmp_path: Path, shuffle: bool) -> None:
    """Though they have the same indices: which the batches tell, or, where those are others, the dataset."""
    module, callback, data = Classifier(), CKACallback(debiased=True), Epochal()
    module.on_validation_start = lambda: setattr(data, "epoch", module.current_epoch)
    seen = own_warnings(tmp_path, module, callback, DataLoader(data, batch_size=16, shuffle=shuffle))
    (message,) = [text for text in seen if "shuffling" not in text]
    assert message.startswith(f"{NUM_VAL} samples of validate dataloader 0 ")
    assert ("were not among those" if shuffle else "are not what they were when the reference was recorded") in message
    assert [record["n"] for record in callback.history] == [NUM_VAL, 0]


class Stream(IterableDataset):
    start = 0

    def __iter__(self) -> Iterator[Any]:
        return (dataset(80, 1)[index] for index in range(self.start, self.start + 40))


def test_samples_of_which_none_comes_again(tmp_path: Path) -> None:
    module, callback, stream = Classifier(), CKACallback(debiased=True), Stream()
    module.on_train_epoch_start = lambda: setattr(stream, "start", 40 * (module.current_epoch == 2))
    data = DataLoader(stream, batch_size=16)
    (message,) = own_warnings(tmp_path, module, callback, data, max_epochs=3)
    assert message.startswith("40 samples of validate dataloader 0 were not among those")
    assert [record["n"] for record in callback.history] == [40, 40, 0]
    assert all(np.isnan(score) for score in callback.scores.values())


def test_a_layer_that_misses_batches_of_the_recording(tmp_path: Path) -> None:
    """And runs in all of them later: its samples of those batches have nothing to be compared with."""
    module, other = Classifier(Changing()), Classifier(Changing())
    module.net.is_on = True
    module.on_validation_batch_start = lambda batch, index: setattr(
        module.net, "is_on", index == 0 or not module.trainer.sanity_checking
    )
    callback = CKACallback(layers=[*BLOCKS, "net.extra"], reference=other.state_dict(), debiased=True)
    (message,) = own_warnings(tmp_path, module, callback, loader())
    assert message.startswith("Layer 'net.extra' has not run.")
    assert "This batch is left out for the layer." in message
    by_hand = hand_cka(other, module, BLOCKS, loader(), debiased=True)
    run = lambda model, batch: model.net.extra(batch[0])  # noqa: E731
    of_extra = hand_cka(other, module, ["net.extra"], list(loader())[:1], run=run, debiased=True)
    assert callback.scores == pytest.approx({**by_hand, **of_extra}, abs=1e-9)
    assert of_extra["net.extra"] < 0.9
    assert [record["n"] for record in callback.history] == [16, 16]  # the fewest of any layer


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "bfloat16"}, {"estimator": "minibatch"}], ids=str)
def test_nan_in_the_recording_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    module, callback = SpoiledModule("nan"), CKACallback(**options)
    module.on_train_start = lambda: setattr(module.net.blocks[2], "how", "sound")
    seen = own_warnings(tmp_path, module, callback, loader(400, batch_size=50))
    (message,) = [text for text in seen if "undefined" in text]
    assert message.startswith("CKA of layer 'net.blocks.2' is undefined (NaN): the reference's features, as they were")
    assert np.isnan(callback.scores[BLOCKS[2]])
    assert all(np.isfinite(callback.scores[name]) for name in BLOCKS[:2])


def test_a_recording_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    class Failing(Classifier):
        fails = True

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.fails and batch_idx == 1:
                raise ArithmeticError("The step has failed.")

    module, callback = Failing(), CKACallback()
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, callback, num_sanity_val_steps=0).fit(module, train_loader(), loader())
    module.fails = False
    before = frozen(module.train())
    assert own_warnings(tmp_path, module.train(), callback, loader()) == []
    assert callback.history[-1]["n"] == NUM_VAL
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)


# Features without a CKA.


class Spoiled(Block):
    """A block whose outputs in evaluation are spoiled."""

    how = "sound"

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.training or self.how == "sound":
            return x
        x = x.clone()
        if self.how == "constant":
            x[:] = torch.arange(WIDTH) / 7
        else:
            x[0, 0] = float(self.how)
        return x


class SpoiledModule(Classifier):
    def __init__(self, how: str) -> None:
        net = Net()
        net.blocks = nn.ModuleList(Spoiled(WIDTH) for _ in range(3))
        super().__init__(net)
        net.blocks[2].how = how

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("nan", "hold NaN or infinity"), ("inf", "hold NaN or infinity"), ("constant", "have the same features")],
)
@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"estimator": "minibatch"}], ids=str)
def test_one_layer_without_a_cka(tmp_path: Path, how: str, reason: str, options: dict[str, Any]) -> None:
    module, callback = SpoiledModule(how), CKACallback(**options)
    sound = SpoiledModule("sound")
    sound.load_state_dict(module.state_dict())
    before = frozen(sound)
    run = trainer(tmp_path, callback, max_epochs=3)
    with pytest.warns(UserWarning, match=f"CKA of layer 'net.blocks.2' is undefined .*{reason}") as seen:
        run.fit(module, train_loader(), loader())
    assert len(matching(seen, "undefined")) == 1
    assert run.global_step == 12
    assert len(callback.history) == 3
    sound.load_state_dict(module.state_dict())
    by_hand = hand_cka(before, sound, BLOCKS[:2], loader(), **options)
    assert callback.scores == pytest.approx({**by_hand, BLOCKS[2]: np.nan}, abs=1e-9, nan_ok=True)
    assert run.callback_metrics["cka/mean"].item() == pytest.approx(np.mean(list(by_hand.values())), abs=1e-6)
    assert run.callback_metrics[f"cka/{BLOCKS[2]}"].isnan()


def test_an_undefined_layer_does_not_stop_early_stopping_on_the_mean(tmp_path: Path) -> None:
    stopping = pl.callbacks.EarlyStopping("cka/mean", mode="min", patience=9)
    run = trainer(tmp_path, CKACallback(), stopping)
    with pytest.warns(UserWarning, match="undefined"):
        run.fit(SpoiledModule("nan"), train_loader(), loader())
    assert run.global_step == 8


TOO_FEW = pytest.mark.parametrize(
    ("n", "options", "needed"), [(1, {"debiased": False}, 2), (3, {}, 4), (3, {"estimator": "minibatch"}, 4)], ids=str
)


@TOO_FEW
@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_dataset_too_small(
    tmp_path: Path, n: int, options: dict[str, Any], needed: int, num_sanity_val_steps: int
) -> None:
    message = f"CKA takes at least {needed} samples, but the dataset of validate dataloader 0 has {n}"
    assert_refused(
        tmp_path,
        Classifier(),
        CKACallback(**options),
        message,
        data=loader(n),
        num_sanity_val_steps=num_sanity_val_steps,
    )


@TOO_FEW
def test_too_few_samples_of_a_dataset(tmp_path: Path, n: int, options: dict[str, Any], needed: int) -> None:
    """Nothing is wrong with the training, so it goes on, without numbers."""
    callback = CKACallback(max_batches=1, **options)
    run = trainer(tmp_path, callback)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.fit(Classifier(), train_loader(), loader(8, batch_size=n))
    assert len(matching(seen, f"is undefined (NaN): it takes {needed} samples, and there were")) == len(BLOCKS)
    assert run.global_step == 8
    assert all(np.isnan(score) for score in callback.scores.values())
    assert run.callback_metrics["cka/mean"].isnan()
    assert not matching(seen, "biased upward")  # there is no number to be biased


@pytest.mark.filterwarnings("ignore:CKA is biased upward")
def test_just_enough_samples(tmp_path: Path) -> None:
    for n, options in ((2, {"debiased": False}), (4, {}), (4, {"estimator": "minibatch"})):
        callback = CKACallback(**options)
        trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), train_loader(), loader(n))
        assert all(np.isfinite(score) for score in callback.scores.values())


def test_a_small_last_batch_of_the_minibatch_estimator(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(estimator="minibatch")
    before = frozen(module)
    with pytest.warns(UserWarning, match="fewer than 4 samples are left out of the minibatch estimator") as seen:
        trainer(tmp_path, callback).fit(module, train_loader(), loader(34))
    assert len(matching(seen, "fewer than 4 samples")) == 1
    assert callback.history[-1]["n"] == 32
    by_hand = hand_cka(before, module, BLOCKS, list(loader(34))[:2], estimator="minibatch")
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


# Layers that misbehave later.


class Skipping(Net):
    """Leaves the middle block out for small batches, such as the last one."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i != 1 or len(x) == 16 or self.training:
                x = block(x)
        return self.head(x)


def test_a_layer_that_skips_a_batch(tmp_path: Path) -> None:
    module, callback = Classifier(Skipping()), CKACallback()
    before = frozen(module)
    with pytest.warns(UserWarning, match=r"Layer 'net.blocks.1' has not run.* This batch is left out") as seen:
        trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert len(matching(seen, "left out")) == 1
    assert callback.history[-1]["n"] == 32  # the fewest of any layer
    by_hand = hand_cka(before, module, [BLOCKS[0], BLOCKS[2]], loader())
    by_hand.update(hand_cka(before, module, [BLOCKS[1]], list(loader())[:2]))
    assert callback.scores == pytest.approx(by_hand, abs=1e-9)


class Widening(Net):
    """Features of another width in the last batch: flattened tokens, say, of longer samples."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        self.tail(x if len(x) == 16 or self.training else torch.cat([x, x], dim=1))
        return self.head(x)

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Identity()


def test_a_layer_whose_width_changes(tmp_path: Path) -> None:
    module, callback = Classifier(Widening()), CKACallback(layers=[*BLOCKS, "net.tail"])
    run = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=r"'net\.tail'.* This batch is left out") as seen:
        run.fit(module, train_loader(), loader())
    assert len(matching(seen, "left out")) == 1
    assert run.global_step == 8
    assert callback.history[-1]["n"] == 32


# Hints.


def hints(folder: Path, callback: CKACallback, n: int, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(folder, callback, **options).fit(Classifier(), train_loader(), loader(n))
    return matching(seen, "biased")


def test_few_samples_for_the_width_are_hinted_at_once(tmp_path: Path) -> None:
    (hint,) = hints(tmp_path, CKACallback(debiased=False), n=29, max_epochs=3)
    assert "'net.blocks.0' has 6 features and was measured on 29 samples" in hint
    assert "debiased=True" in hint
    assert hints(tmp_path, CKACallback(debiased=False), n=30) == []
    assert hints(tmp_path, CKACallback(), n=29) == []
    assert hints(tmp_path, CKACallback(estimator="minibatch"), n=29) == []


class Unvalidated(pl.LightningModule):
    """Has nothing to validate with; and knows what was warned of before its first training batch."""

    training_step, loss, forward = Classifier.training_step, Classifier.loss, Classifier.forward
    configure_optimizers = Classifier.configure_optimizers

    def __init__(self, warned: list[warnings.WarningMessage]) -> None:
        super().__init__()
        self.net, self.lr, self.losses = Net(), 0.2, []
        self.warned, self.warned_before = warned, ""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.warned_before = self.warned_before or "\n".join(str(each.message) for each in self.warned)


class Validated(Unvalidated):
    validation_step = Classifier.validation_step


def empty() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(0, WIDTH), torch.zeros(0)))


NO_LOOP, EMPTY = (
    "will track nothing: this `fit` has no validation loop",
    "has nothing to track: .* are empty at the start",
)


@pytest.mark.parametrize(
    ("kind", "data", "options", "message"),
    [
        (Validated, None, {}, NO_LOOP),
        (Unvalidated, loader(), {}, NO_LOOP),
        (Validated, loader(), {"limit_val_batches": 0}, NO_LOOP),
        (Validated, [], {}, EMPTY),
        (Validated, empty(), {}, EMPTY),
        (Validated, [empty(), empty()], {"num_sanity_val_steps": 0}, EMPTY),
    ],
    ids=["no loader", "no step", "no batches", "an empty list", "an empty loader", "two"],
)
def test_that_there_is_nothing_to_track_is_said_before_the_first_batch(
    tmp_path: Path, kind: type[Unvalidated], data: Any, options: dict[str, Any], message: str
) -> None:
    callback = CKACallback()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = kind(seen)
        trainer(tmp_path, callback, **options).fit(module, train_loader(), data)
    assert re.search(message, module.warned_before)
    assert "probe=" in module.warned_before
    assert len(matching(seen, "CKA")) == 1  # and no more at the end
    assert callback.history == []
    assert len(module.losses) == 8


@pytest.mark.parametrize("options", [{"stages": ["test"]}, {"probe": loader()}], ids=["test alone", "probe"])
def test_where_no_validation_is_asked_for_none_is_missed(tmp_path: Path, options: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, CKACallback(**options)).fit(Validated(seen), train_loader())
    assert matching(seen, "CKA") == []


def test_features_of_any_width(tmp_path: Path) -> None:
    """Whose moments would take 14 GB."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 4000)

    class WideNet(Net):
        def __init__(self) -> None:
            super().__init__()
            self.wide = Wide()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.wide(x)[:, :WIDTH])

    for estimator in ("exact", "minibatch"):
        callback = CKACallback(layers="net.wide", debiased=True, estimator=estimator)
        trainer(tmp_path, callback, max_epochs=1).fit(Classifier(WideNet()), train_loader(), loader())
        assert callback.scores == pytest.approx({"net.wide": 1.0})


# Models that can't be copied.


def test_a_model_that_can_not_be_copied(tmp_path: Path) -> None:
    module = Classifier()
    module.lock = threading.Lock()
    before, callback = Classifier(), CKACallback()
    before.load_state_dict(module.state_dict())
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    assert callback.scores == pytest.approx(hand_cka(before, module, BLOCKS, loader()), abs=1e-9)
    # Only where it has to run beside the model, since the data differ at every pass, is that an error.

    augmented = DataLoader(Augmented(*loader().dataset.tensors), batch_size=16)
    message = r"Classifier could not be copied .*cannot pickle '_thread.lock'.* Pass `reference=`"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CKACallback(), max_epochs=1).fit(module.train(), train_loader(), augmented)
    callback = CKACallback(reference=Classifier(Net(num_classes=5)))
    with pytest.warns(UserWarning, match="The data differ at every pass"):
        trainer(tmp_path, callback, max_epochs=1).fit(module.train(), train_loader(), augmented)
    assert len(callback.history) == 1


class Held(torch.utils.data.Dataset):
    """A dataset too large to copy."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise MemoryError("The dataset has been copied.")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return dataset(4)[index]


class HeldModule(pl.LightningDataModule):
    def __deepcopy__(self, memo: Any) -> Any:
        raise MemoryError("The data module has been copied.")


class Config:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    "hold",
    [
        lambda: Held(),
        lambda: DataLoader(Held()),
        lambda: [Held(), Held()],
        lambda: (DataLoader(Held()),),
        lambda: {"train": Held()},
        lambda: [{"train": [Held()]}],
        lambda: torch.utils.data.Subset(Held(), [0]),
        lambda: Config(Held()),
        lambda: HeldModule(),
    ],
    ids=["dataset", "loader", "list", "tuple", "dict", "nested", "subset", "object", "datamodule"],
)
def test_held_data_are_not_copied(tmp_path: Path, hold: Any) -> None:
    module, callback = Classifier(), CKACallback()
    module.held = hold()
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    assert len(callback.history) == 1
    assert module.net.blocks[0].linear.weight.requires_grad


def test_no_trainer_nor_logger_is_copied(tmp_path: Path) -> None:
    class Precious(PlainLogger):
        def __deepcopy__(self, memo: Any) -> Any:
            raise MemoryError("The logger has been copied.")

    callback = CKACallback()
    trainer(tmp_path, callback, logger=Precious(), max_epochs=1).fit(Classifier(), train_loader(), loader())
    assert len(callback.history) == 1
