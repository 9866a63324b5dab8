"""The callback in real trainings: the numbers are those taken by hand, and the training is what it was without it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_cka import CKACallback
from lit_cka.tracking.history import BOUNDS
from tests.tracking.helpers import (
    BLOCKS,
    NUM_VAL,
    WIDTH,
    Block,
    Classifier,
    Keeper,
    Net,
    dataset,
    frozen,
    hand_cka,
    hooks_of,
    loader,
    train_loader,
    trainer,
)

ESTIMATORS = pytest.mark.parametrize(
    "options",
    [{}, {"debiased": True}, {"estimator": "minibatch"}],
    ids=["exact", "debiased", "minibatch"],
)


def close(scores: Mapping[str, float]) -> Any:
    return pytest.approx(dict(scores), abs=1e-9)


# The numbers.


@ESTIMATORS
def test_the_scores_are_those_taken_by_hand(tmp_path: Path, options: dict[str, Any]) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback(**options)
    before = frozen(module)
    assert callback.scores == {}
    trainer(tmp_path, callback, keeper).fit(module, train_loader(), loader())
    assert len(callback.history) == len(keeper.models) == 2  # the sanity check is none of them
    for epoch, (record, after) in enumerate(zip(callback.history, keeper.models, strict=True)):
        by_hand = hand_cka(before, after, BLOCKS, loader(), **options)
        assert {key: value for key, value in record.items() if key not in BOUNDS} == {
            "step": 4 * (epoch + 1),
            "epoch": epoch,
            "stage": "validate",
            "dataloader": 0,
            "n": NUM_VAL,
            "scores": close(by_hand),
        }
    assert callback.scores == callback.history[-1]["scores"]
    assert min(callback.scores.values()) < 0.9  # far from the trivial answer
    assert all(type(score) is float for score in callback.scores.values())


def test_logged_values_are_the_scores_and_their_mean(tmp_path: Path) -> None:
    callback = CKACallback()
    run = trainer(tmp_path, callback)
    run.fit(Classifier(), train_loader(), loader())
    logged = {key: value.item() for key, value in run.callback_metrics.items() if key.startswith("cka/")}
    expected = {f"cka/{name}": score for name, score in callback.scores.items()}
    others = {"cka/mean": np.mean(list(expected.values())), "cka/num_samples": 44}
    assert logged == pytest.approx({**expected, **others}, abs=1e-6)


def test_max_batches(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(max_batches=2)
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.history[-1]["n"] == 32
    assert callback.scores == close(hand_cka(before, module, BLOCKS, list(loader())[:2]))


def test_limit_val_batches_is_in_n(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback, limit_val_batches=2).fit(module, train_loader(), loader())
    assert [record["n"] for record in callback.history] == [32, 32]
    assert callback.scores == close(hand_cka(before, module, BLOCKS, list(loader())[:2]))


def test_every_dataloader_by_its_own_samples(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback()
    before, loaders = frozen(module), [loader(44, seed=1), loader(37, seed=2)]
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, train_loader(), loaders)
    assert [(record["dataloader"], record["n"]) for record in callback.history] == [(0, 44), (1, 37)]
    for record, batches in zip(callback.history, loaders, strict=True):
        assert record["scores"] == close(hand_cka(before, module, BLOCKS, batches))
        logged = run.callback_metrics[f"cka/{BLOCKS[1]}/dataloader_idx_{record['dataloader']}"]
        assert logged.item() == pytest.approx(record["scores"][BLOCKS[1]], abs=1e-6)
    assert callback.scores == callback.history[0]["scores"]
    keys = {key for key in run.callback_metrics if key.startswith("cka/")}
    assert keys == {f"cka/{name}/dataloader_idx_{i}" for name in [*BLOCKS, "mean", "num_samples"] for i in (0, 1)}
    assert run.callback_metrics["cka/num_samples/dataloader_idx_1"] == 37


def test_one_dataloader_of_several(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(dataloaders=[1])
    before, loaders = frozen(module), [loader(44, seed=1), loader(37, seed=2)]
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, train_loader(), loaders)
    assert [(record["dataloader"], record["n"]) for record in callback.history] == [(1, 37)]
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loaders[1]))
    assert {"cka/mean", f"cka/{BLOCKS[0]}"} <= set(run.callback_metrics)


def test_dataloaders_in_a_mapping(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback()
    before, loaders = frozen(module), {"a": loader(44, seed=1), "b": loader(37, seed=2)}
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loaders)
    assert [(record["dataloader"], record["n"]) for record in callback.history] == [(0, 44), (1, 37)]
    assert callback.history[1]["scores"] == close(hand_cka(before, module, BLOCKS, loaders["b"]))


def test_batches_combined_of_two_loaders_are_one_dataloader(tmp_path: Path) -> None:
    class Combining(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch["a"]), batch_size=len(batch["a"][0]))

    module, callback = Combining(), CKACallback()
    before, combined = frozen(module), CombinedLoader({"a": loader(44, 1), "b": loader(44, 2)}, "min_size")
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, train_loader(), combined)
    assert [(record["dataloader"], record["n"]) for record in callback.history] == [(0, 44)]
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader(44, 1)))
    assert "cka/mean" in run.callback_metrics


def test_every_n_validations(tmp_path: Path) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback(every_n_validations=2)
    before = frozen(module)
    trainer(tmp_path, callback, keeper, max_epochs=4).fit(module, train_loader(), loader())
    assert [record["epoch"] for record in callback.history] == [0, 2]
    assert callback.scores == close(hand_cka(before, keeper.models[2], BLOCKS, loader()))


def test_every_n_validations_warns_who_monitors(tmp_path: Path) -> None:
    callbacks = [CKACallback(every_n_validations=2), EarlyStopping("cka/mean", patience=5), EarlyStopping("val_loss")]
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'cka/mean', which changes only every 2") as seen:
        trainer(tmp_path, *callbacks, max_epochs=1).fit(Classifier(), train_loader(), loader())
    assert not any("monitors 'val_loss'" in str(warning.message) for warning in seen)


def test_several_validations_an_epoch(tmp_path: Path) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback, keeper, val_check_interval=2).fit(module, train_loader(), loader())
    assert [(record["step"], record["epoch"]) for record in callback.history] == [(2, 0), (4, 0), (6, 1), (8, 1)]
    for record, after in zip(callback.history, keeper.models, strict=True):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, loader()))


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = CKACallback()
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(Classifier(), train_loader(), loader())
    assert [record["step"] for record in callback.history] == [2, 4]


# Validation and test without a fit, and after one.


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_alone_starts_from_itself(tmp_path: Path, stage: str) -> None:
    callback = CKACallback()
    getattr(trainer(tmp_path, callback), stage)(Classifier(), loader(), verbose=False)
    (record,) = callback.history
    assert (record["stage"], record["n"], record["step"]) == (stage, NUM_VAL, 0)
    assert callback.scores == pytest.approx(dict.fromkeys(BLOCKS, 1.0))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_of_a_checkpoint_compares_with_the_weights_before_it(tmp_path: Path, stage: str) -> None:
    trained = Classifier()
    training = trainer(tmp_path)
    training.fit(trained, train_loader(), loader())
    training.save_checkpoint(tmp_path / "trained.ckpt")
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    evaluate = getattr(trainer(tmp_path, callback), stage)
    evaluate(module, loader(), ckpt_path=tmp_path / "trained.ckpt", verbose=False)
    assert callback.scores == close(hand_cka(before, trained, BLOCKS, loader()))
    assert max(callback.scores.values()) < 0.99


def test_stage_test_alone_compares_with_the_weights_before_fit(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback(stages=["test"])
    before = frozen(module)
    run = trainer(tmp_path, callback)
    run.fit(module, train_loader(), loader())
    assert callback.history == []
    assert not any(key.startswith("cka/") for key in run.callback_metrics)
    run.test(module, loader(30, seed=5), verbose=False)
    assert [(record["stage"], record["n"]) for record in callback.history] == [("test", 30)]
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader(30, seed=5)))


def test_stage_validate_alone_leaves_tests_out(tmp_path: Path) -> None:
    callback = CKACallback(stages=["validate"])
    run, module = trainer(tmp_path, callback, max_epochs=1), Classifier()
    run.fit(module, train_loader(), loader())
    run.test(module, loader(), verbose=False)
    assert [record["stage"] for record in callback.history] == ["validate"]


def test_a_test_of_the_best_weights_keeps_reference_and_history(tmp_path: Path) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback()
    best = ModelCheckpoint(tmp_path, monitor="cka/mean", mode="max")
    before = frozen(module)
    run = trainer(tmp_path, callback, keeper, best, enable_checkpointing=True, max_epochs=3)
    run.fit(module, train_loader(), loader())
    fitted = list(callback.history)
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert callback.scores == close(hand_cka(before, keeper.models[0], BLOCKS, loader()))
    assert [record["stage"] for record in callback.history] == ["validate"] * 3 + ["test"]
    assert callback.history[:3] == fitted


def test_a_second_fit_goes_on_from_the_first_reference(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader(), loader())
    assert len(callback.history) == 2
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader()))


def test_the_callback_follows_another_module_in_the_next_fit(tmp_path: Path) -> None:
    callback = CKACallback()
    trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), train_loader(), loader())
    second = Classifier()
    before = frozen(second)
    trainer(tmp_path, callback, max_epochs=1).fit(second, train_loader(), loader())
    assert callback.scores == close(hand_cka(before, second, BLOCKS, loader()))


# When the training begins.


class Late(Classifier):
    """Loads its weights by one of its hooks."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.start = {name: value + 0.3 for name, value in Net().state_dict().items() if value.is_floating_point()}
        setattr(self, hook, self.load)

    def load(self) -> None:
        if not self.losses:
            self.net.load_state_dict(self.start, strict=False)


class Adapting(Classifier):
    """Takes the running statistics from data of its own, before it is trained."""

    def on_train_start(self) -> None:
        self.net(dataset(40, seed=8).tensors[0] * 3)


def test_running_statistics_that_a_hook_takes_are_what_a_training_starts_from(tmp_path: Path) -> None:
    module, keeper, callback = Adapting(), Keeper(), CKACallback()
    before = Classifier()
    before.load_state_dict(module.state_dict())
    before.net(dataset(40, seed=8).tensors[0] * 3)
    trainer(tmp_path, callback, keeper).fit(module, train_loader(), loader())
    for record, after in zip(callback.history, keeper.models, strict=True):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, loader()))


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_weights_that_hooks_load_are_what_a_training_starts_from(
    tmp_path: Path, hook: str, num_sanity_val_steps: int
) -> None:
    """For a test after it, too, whose data have not been there at the start."""
    module, keeper, callback = Late(hook), Keeper(), CKACallback()
    before = Classifier()
    before.load_state_dict(module.state_dict())
    before.net.load_state_dict(module.start, strict=False)
    run = trainer(tmp_path, callback, keeper, num_sanity_val_steps=num_sanity_val_steps)
    run.fit(module, train_loader(), loader())
    for record, after in zip(callback.history, keeper.models, strict=True):
        assert record["scores"] == close(hand_cka(before, after, BLOCKS, loader()))
    run.test(module, loader(37, seed=5), verbose=False)
    assert callback.history[-1]["stage"] == "test"
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader(37, seed=5)))


def test_a_probe_starts_from_them_too(tmp_path: Path) -> None:
    module, callback = Late("on_train_start"), CKACallback(probe=loader())
    before = Classifier()
    before.load_state_dict(module.state_dict())
    before.net.load_state_dict(module.start, strict=False)
    trainer(tmp_path, callback).fit(module, train_loader(), loader(20, seed=9))
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader()))


class Counting(Classifier):
    num_steps = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        type(self).num_steps += 1


class Touching(Counting):
    """Writes its weights anew, as they are."""

    def on_train_start(self) -> None:
        self.load_state_dict(self.state_dict())


@pytest.mark.parametrize("kind", [Counting, Touching])
def test_the_reference_is_recorded_once_where_nothing_has_changed(tmp_path: Path, kind: type[Counting]) -> None:
    kind.num_steps = 0
    trainer(tmp_path, CKACallback(), num_sanity_val_steps=0, max_epochs=1).fit(kind(), train_loader(), loader())
    assert kind.num_steps == 3 + 1 + 3  # the first batch of the recording is repeated


class Watching(pl.Callback):
    """Looks at the weights when something has gone wrong, before others do."""

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.seen = {name: value.clone() for name, value in module.state_dict().items()}


class Failing(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            raise ArithmeticError("The step has failed.")


@pytest.mark.parametrize("reference", [lambda other: other, lambda other: other.state_dict()], ids=["beside", "within"])
def test_a_recording_that_fails_leaves_the_weights_to_whoever_hears_of_it(tmp_path: Path, reference: Any) -> None:
    """Who might write them to a checkpoint."""
    module, watching, other = Failing(), Watching(), Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(tmp_path, watching, CKACallback(reference=reference(other)), num_sanity_val_steps=0)
    with pytest.raises(ArithmeticError):
        run.fit(module, train_loader(), loader())
    assert before.keys() == watching.seen.keys()
    assert all(torch.equal(value, watching.seen[name]) for name, value in before.items())


def test_the_model_that_has_played_the_reference_is_itself_again(tmp_path: Path) -> None:
    live, other = Classifier(lr=0.0), Classifier()
    before = {name: weight.clone() for name, weight in live.named_parameters()}
    callback = CKACallback(reference=other.state_dict())
    trainer(tmp_path, callback, max_epochs=1).fit(live, train_loader(), loader())
    assert max(callback.scores.values()) < 0.99
    assert all(torch.equal(weight, before[name]) for name, weight in live.named_parameters())


# Modules of others.


@pytest.mark.parametrize("kind", [BoringModel, ManualOptimBoringModel])
def test_lightnings_boring_modules(tmp_path: Path, kind: type[BoringModel]) -> None:
    module, callback = kind(), CKACallback()
    before = frozen(module)
    run = trainer(tmp_path, callback)
    run.fit(module)
    assert [record["n"] for record in callback.history] == [64, 64]
    assert list(callback.scores) == ["layer"]
    assert callback.scores == close(hand_cka(before, module, ["layer"], run.val_dataloaders))


class ValidatedTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """Nothing to download."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


def test_lightnings_transformer(tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (2, 22, 7))
    data = DataLoader(TensorDataset(*tokens), batch_size=8)
    module, callback = ValidatedTransformer(vocab_size=20), CKACallback(debiased=True)
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, data, data)
    names = [f"model.transformer.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)]
    by_hand = hand_cka(
        before,
        module,
        names,
        data,
        debiased=True,
        run=lambda model, batch: model(*batch),
        pool=lambda output, batch: output.double().mean(dim=1),
    )
    assert list(callback.scores) == names
    assert callback.scores == close(by_hand)
    assert [record["n"] for record in callback.history] == [22, 22]


class TextModule(pl.LightningModule):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.bert(**batch).loss

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def text_batches(kind: str = "bert") -> tuple[nn.Module, list[str], DataLoader]:
    transformers = pytest.importorskip("transformers")
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        )
        model, names = transformers.BertForSequenceClassification(config), "bert.bert.encoder.layer"
    else:
        config = transformers.DistilBertConfig(
            vocab_size=40, dim=8, n_layers=3, n_heads=2, hidden_dim=12, max_position_embeddings=16
        )
        model, names = transformers.DistilBertForSequenceClassification(config), "bert.distilbert.transformer.layer"
    lengths = torch.arange(44) % 8 + 2
    samples = [
        {
            "input_ids": torch.randint(1, 40, (9,)),
            "attention_mask": (torch.arange(9) < length).long(),
            "labels": length % 2,
        }
        for length in lengths
    ]
    return model, [f"{names}.{i}" for i in range(3)], DataLoader(samples, batch_size=16)  # type: ignore[arg-type]


def masked_mean(output: Any, batch: dict[str, Tensor]) -> Tensor:
    hidden = (output if isinstance(output, Tensor) else output[0]).double()
    kept = batch["attention_mask"].double()[:, :, None]
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_hugging_face_model_with_padding(tmp_path: Path, kind: str) -> None:
    model, names, data = text_batches(kind)
    module, callback = TextModule(model), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, data, data)
    by_hand = hand_cka(before, module, names, data, run=lambda model, batch: model.bert(**batch), pool=masked_mean)
    assert list(callback.scores) == names
    assert callback.scores == close(by_hand)
    plain = hand_cka(
        before,
        module,
        names,
        data,
        run=lambda model, batch: model.bert(**batch),
        pool=lambda output, batch: masked_mean(output, {"attention_mask": torch.ones_like(batch["attention_mask"])}),
    )
    assert callback.scores != pytest.approx(plain, abs=1e-4)  # padding would show


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # torch's own use of them
def test_torchs_encoder_with_padding(tmp_path: Path) -> None:
    """Its fast path hands nested tensors from layer to layer."""

    class Padded(Classifier):
        def __init__(self) -> None:
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            super().__init__(nn.TransformerEncoder(layer, 2))
            self.embedding = nn.Linear(WIDTH, 5 * 8)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.arange(5) >= 3 + (x[:, :1] > 2).long()
            return self.net(self.embedding(x).view(-1, 5, 8), src_key_padding_mask=padding)[:, 0]

    module, callback = Padded(), CKACallback()
    before, names = frozen(module), ["net.layers.0", "net.layers.1"]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())

    def mean_of_tokens(output: Tensor, batch: Any) -> Tensor:
        samples = output.unbind() if output.is_nested else output
        lengths = 3 + (batch[0][:, 0] > 2).long()
        return torch.stack([tokens[:length].mean(dim=0) for tokens, length in zip(samples, lengths, strict=True)])

    by_hand = hand_cka(before, module, names, loader(), pool=mean_of_tokens)
    assert callback.scores == pytest.approx(by_hand, abs=1e-5)


class GAN(pl.LightningModule):
    """Manual optimisation, two networks, two optimizers; `forward` is the generator, as in Lightning's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Net(num_classes=WIDTH)
        self.discriminator = Net(num_classes=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, ones = batch[0], torch.ones(len(batch[0]), 1)
        loss = nn.functional.binary_cross_entropy_with_logits
        fake = self(torch.randn_like(real))
        for optimizer, value in zip(
            self.optimizers(),
            (
                lambda: loss(self.discriminator(fake), ones),
                lambda: loss(self.discriminator(real), ones) + loss(self.discriminator(fake.detach()), 0 * ones),
            ),
            strict=True,
        ):
            optimizer.zero_grad()
            self.manual_backward(value())
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.discriminator(batch[0])
        self(batch[0])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.3) for net in (self.generator, self.discriminator)]


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_a_gan(tmp_path: Path, part: str) -> None:
    module, callback = GAN(), CKACallback(layers=f"{part}.blocks.*")
    before, names = frozen(module), [f"{part}.blocks.{i}" for i in range(3)]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    by_hand = hand_cka(before, module, names, loader(), run=lambda model, batch: getattr(model, part)(batch[0]))
    assert callback.scores == close(by_hand)


def test_both_networks_of_a_gan(tmp_path: Path) -> None:
    module, callback = GAN(), CKACallback()
    before, names = frozen(module), [f"{part}.blocks.{i}" for part in ("generator", "discriminator") for i in range(3)]
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    run = lambda model, batch: (model.discriminator(batch[0]), model(batch[0]))  # noqa: E731
    assert callback.scores == close(hand_cka(before, module, names, loader(), run=run))


class Built(Classifier):
    """Has no network before `configure_model` (or `setup`), perhaps some other weights."""

    def __init__(self, where: str, partly: bool = False) -> None:
        super().__init__(nn.Identity())
        self.where = where
        self.other = nn.Linear(2, 2) if partly else None

    def _build(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(7)
            self.net = Net()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self._build()

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self._build()


BUILT = pytest.mark.parametrize("where", ["configure_model", "setup"])


@BUILT
def test_a_module_built_late(tmp_path: Path, where: str) -> None:
    module, callback = Built(where), CKACallback()
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    before = Built(where)
    before._build()
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader()))


@BUILT
@pytest.mark.parametrize("partly", [False, True])
def test_an_evaluation_alone_of_a_module_built_late(tmp_path: Path, where: str, partly: bool) -> None:
    other = Net()
    module, callback = Built(where, partly), CKACallback(reference=other)
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.scores == close(hand_cka(Classifier(other), module, BLOCKS, loader()))


class TwoNets(pl.LightningModule):
    """An image and a text encoder, say: both are fed from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Net()
        self.right = Net()

    def forward(self, batch: Any) -> Tensor:
        return self.left(batch[0]) - self.right(batch[0].flip(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.left(batch[0]) - self.right(batch[1]), batch[2])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def pairs() -> DataLoader:
    x, y = dataset(NUM_VAL).tensors
    return DataLoader(TensorDataset(x, x.flip(1), y), batch_size=16)


def test_a_dual_encoder_fed_from_the_batch(tmp_path: Path) -> None:
    module, callback = TwoNets(), CKACallback()
    before, names = frozen(module), [f"{side}.blocks.{i}" for side in ("left", "right") for i in range(3)]
    trainer(tmp_path, callback).fit(module, pairs(), pairs())
    run = lambda model, batch: (model.left(batch[0]), model.right(batch[1]))  # noqa: E731
    assert list(callback.scores) == names
    assert callback.scores == close(hand_cka(before, module, names, pairs(), run=run))


# Batches, inputs and steps of all kinds.


def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {"inputs": {"x": torch.stack([x for x, _ in items])}, "out": [{"y": torch.stack([y for _, y in items])}]}


def nested(n: int, seed: int) -> DataLoader:
    return DataLoader(dataset(n, seed), batch_size=16, collate_fn=collate)


def test_nested_batches_that_are_changed_on_the_way(tmp_path: Path) -> None:
    class Popping(Net):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return super().forward(inputs.pop("x").mul_(2))

    class Nested(Classifier):
        def loss(self, batch: Any) -> Tensor:
            batch["inputs"]["x"].add_(1)
            return nn.functional.cross_entropy(self.net(batch["inputs"]), batch.pop("out")[0]["y"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    module, callback = Nested(Popping()), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, nested(32, 0), nested(NUM_VAL, 1))
    assert callback.history[-1]["n"] == NUM_VAL
    run = lambda model, batch: model.net({"x": batch[0] + 1})  # noqa: E731
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader(), run=run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_whose_output_is_overwritten(tmp_path: Path, dtype: torch.dtype) -> None:
    class Overwriting(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                x[:, 0] = 1
            return self.head(x)

    class Trained(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(Net.forward(self.net, batch[0]), batch[1])

    module, callback = Trained(Overwriting()), CKACallback()
    before = frozen(module).to(dtype)
    trainer(tmp_path, callback, precision="32-true" if dtype == torch.float32 else "64-true").fit(
        module, train_loader(), loader()
    )
    assert callback.scores == close(
        hand_cka(before, module, BLOCKS, loader(), run=lambda model, batch: model(batch[0].to(dtype)))
    )


def test_a_forward_that_logs(tmp_path: Path) -> None:
    class Logging(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x)
            self.log("logits", logits.mean())
            self.log_dict({"first": logits[:, 0].mean()})
            return logits

    values = []
    for callbacks in ([], [CKACallback()]):
        torch.manual_seed(0)
        run = trainer(tmp_path, *callbacks)
        run.fit(Logging(), train_loader(), loader())
        values.append({name: run.callback_metrics[name].item() for name in ("logits", "first")})
    assert values[0] == values[1]  # what the reference would log isn't in there


def test_a_forward_that_asks_its_trainer(tmp_path: Path) -> None:
    class Asking(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (1 + self.trainer.current_epoch)

    module, callback = Asking(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    run = lambda model, batch: model.net(batch[0])  # noqa: E731
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader(), run=run))


def test_a_step_that_calls_forward_past_the_hooks(tmp_path: Path) -> None:
    class Direct(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])

    module, callback = Direct(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), loader())
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader()))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from dataset(NUM_VAL, 1)


def test_an_iterable_dataset_without_length(tmp_path: Path) -> None:
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback).fit(module, train_loader(), DataLoader(Stream(), batch_size=16))
    assert callback.history[-1]["n"] == NUM_VAL
    assert callback.scores == close(hand_cka(before, module, BLOCKS, loader()))


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"inference_mode": False}], ids=str)
def test_ways_to_train(tmp_path: Path, options: dict[str, Any]) -> None:
    module, callback = Classifier(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback, **options).fit(module, loader(), loader())
    batches = list(loader())[: options.get("overfit_batches")]
    assert callback.scores == close(hand_cka(before, module, BLOCKS, batches))


def test_fast_dev_run(tmp_path: Path) -> None:
    callback = CKACallback(debiased=True)
    trainer(tmp_path, callback, fast_dev_run=True).fit(Classifier(), train_loader(), loader())
    assert [record["n"] for record in callback.history] == [16]


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precisions(tmp_path: Path, precision: Any) -> None:
    module, keeper, callback = Classifier(), Keeper(), CKACallback()
    before = frozen(module)
    trainer(tmp_path, callback, keeper, precision=precision).fit(module, train_loader(), loader())
    dtype = {"64-true": torch.float64, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}[precision]

    def run(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model(batch[0].to(dtype))

    by_hand = hand_cka(before.to(dtype), keeper.models[-1], BLOCKS, loader(), run=run)
    assert callback.scores == close(by_hand)


def test_an_untouched_model_in_low_precision_scores_one(tmp_path: Path) -> None:
    callback = CKACallback()
    trainer(tmp_path, callback, precision="bf16-mixed").validate(Classifier(), loader(), verbose=False)
    assert callback.scores == pytest.approx(dict.fromkeys(BLOCKS, 1.0), abs=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft on transformers
def test_lora_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, names, data = text_batches()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=True)
    module, callback = TextModule(peft.get_peft_model(model, config)), CKACallback()
    before, names = frozen(module), [name.replace("bert.", "bert.base_model.model.", 1) for name in names]
    trainer(tmp_path, callback).fit(module, data, data)
    run = lambda model, batch: model.bert(**batch)  # noqa: E731
    assert callback.scores == close(hand_cka(before, module, names, data, run=run, pool=masked_mean))
    assert max(callback.scores.values()) < 1 - 1e-6


# The training is the same, bit for bit.


class Noisy(Block):
    """Draws random numbers of all three kinds, in training and evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x + 0.01 * torch.randn_like(x))
        return x * (1 + 0.01 * random.random()) + 0.01 * float(np.random.rand())


def train_once(folder: Path, *callbacks: pl.Callback) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    net = Net(dropout=0.3)
    net.blocks = nn.ModuleList(Noisy(WIDTH, 0.3) for _ in range(3))

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    module = Scheduled(net)
    saving = ModelCheckpoint(folder, monitor="val_loss", filename="last", save_last=False)
    run = trainer(
        folder, *callbacks, saving, EarlyStopping("val_loss", patience=9), enable_checkpointing=True, max_epochs=3
    )
    run.fit(module, train_loader(), loader())
    run.save_checkpoint(folder / "end.ckpt")
    numpy_state = np.random.get_state()
    return {
        "losses": module.losses,
        "val_loss": run.callback_metrics["val_loss"].item(),
        "weights": module.state_dict(),
        "training": [part.training for part in module.modules()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
        "python": random.getstate(),
        "checkpoint": torch.load(folder / "end.ckpt", weights_only=True),
        "hooks": hooks_of(module),
    }


def assert_equal(one: Any, other: Any, folders: tuple[str, str], where: str = "") -> None:
    """Equality of nested values, with one folder in place of the other in strings."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert [*map(str, one)] == [str(key).replace(folders[1], folders[0]) for key in other], where
        for key, a, b in zip(one, one.values(), other.values(), strict=True):
            assert_equal(a, b, folders, f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, folders, f"{where}/{i}")
    elif isinstance(one, str):
        assert one == other.replace(folders[1], folders[0]), where
    else:
        assert one == other, where


@pytest.mark.filterwarnings("ignore:The reference's model does not give the same features")  # as it does
@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"estimator": "minibatch", "max_batches": 1}], ids=str)
def test_the_training_is_the_same_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = CKACallback(**options)
    without = train_once(tmp_path / "without")
    with_it = train_once(tmp_path / "with", callback)
    assert len(callback.history) == 3
    assert len(without["losses"]) == 12
    own = [key for key in with_it["checkpoint"]["callbacks"] if key.startswith("CKACallback")]
    assert len(own) == 1
    del with_it["checkpoint"]["callbacks"][own[0]]
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(without["checkpoint"])
    assert_equal(without, with_it, (str(tmp_path / "without"), str(tmp_path / "with")))


def test_features_are_not_rounded_where_that_costs_too_much(tmp_path: Path) -> None:
    """The pivot is the mean of the first rows; far from it bfloat16 tells few values apart."""
    values = 300 + torch.randn(NUM_VAL, WIDTH, generator=torch.Generator().manual_seed(0))
    values[:16] -= 300
    data = DataLoader(TensorDataset(values, torch.zeros(NUM_VAL, dtype=torch.long)), 16)
    scores = []
    for dtype in ("auto", "bfloat16"):
        torch.manual_seed(0)
        callback = CKACallback(layers="net", cache_dtype=dtype, log_figures=False)
        module = Classifier(nn.Linear(WIDTH, 3))
        run = trainer(tmp_path, callback, max_epochs=1)
        if dtype == "bfloat16":
            with pytest.warns(UserWarning, match=r"in bfloat16 can change CKA by .* they are kept in float32"):
                run.fit(module, train_loader(), data)
        else:
            run.fit(module, train_loader(), data)
        scores.append(callback.scores["net"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
