"""PEFT models against themselves with their adapters off: as against a copy, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lit_cka import CKACallback
from lit_cka.reference.adapters import adapter_modules, adapters_off
from tests.networks import VOCABULARY, texts
from tests.tracking.helpers import Classifier as PlainClassifier
from tests.tracking.helpers import Net, loader, train_loader, trainer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers


class Text(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def data() -> DataLoader:
    inputs = texts([5, 9, 7, 3] * 6)
    samples = [{**{key: value[i] for key, value in inputs.items()}, "labels": torch.tensor(i % 2)} for i in range(24)]
    return DataLoader(samples, batch_size=7)


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


def with_lora(**options: Any) -> Text:
    config = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.1, **options}
    return Text(peft.get_peft_model(bert(), peft.LoraConfig(**config)))


def two_adapters() -> Text:
    """Of which one is frozen, and both are in use."""
    module = with_lora(task_type=None)
    module.model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["key"]))
    module.model.base_model.set_adapter(["default", "second"])
    for name, parameter in module.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.01)
            parameter.requires_grad_(False)
    return module


def of_transformers() -> Text:
    """Adapters without a PeftModel around."""
    model = bert()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"]))
    return Text(model)


def fit(folder: Path, module: Text, *callbacks: CKACallback) -> Text:
    torch.manual_seed(1)
    trainer(folder, *callbacks, max_epochs=3).fit(module, data(), data())
    return module


def state_of(module: nn.Module) -> list[Any]:
    """Everything that switching adapters off and on may change."""
    flags = [(name, parameter.requires_grad) for name, parameter in module.named_parameters()]
    modes = [module.training for module in module.modules()]
    adapters = [(layer.disable_adapters, layer.active_adapter) for layer in adapter_modules(module)]
    return [flags, modes, adapters]


@pytest.mark.parametrize(
    "build", [with_lora, of_transformers, lambda: with_lora(use_dora=True)], ids=["peft", "transformers", "dora"]
)
def test_the_scores_are_those_against_the_initial_weights(tmp_path: Path, build: Any) -> None:
    """A new adapter changes nothing, so the initial model is the one without adapters."""
    callback, copied = CKACallback(reference="adapter-off", debiased=True), CKACallback(prefix="copied", debiased=True)
    fit(tmp_path, build(), callback, copied)
    assert len(callback.scores) == 3
    for record, expected in zip(callback.history, copied.history, strict=True):
        assert record["scores"] == pytest.approx(expected["scores"], abs=1e-9)
    assert max(callback.scores.values()) < 1 - 1e-4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_change_the_base_are_refused(tmp_path: Path, start: str) -> None:
    module = with_lora(init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"start by '{start}'.*reference=\"initial\""):
        fit(tmp_path, module, CKACallback(reference="adapter-off"))
    # Which is right for them.
    callback = CKACallback(debiased=True)
    fit(tmp_path, module, callback)
    assert max(callback.scores.values()) < 1


def test_no_second_model() -> None:
    from lit_cka.features.layers import select_layers
    from lit_cka.reference.reference import LiveReference, make_reference

    module = with_lora()
    reference = make_reference(module, "adapter-off", select_layers(module, None), "mean")
    assert isinstance(reference, LiveReference)
    assert reference.weights is None


@pytest.mark.parametrize("build", [with_lora, two_adapters, of_transformers])
def test_the_training_is_the_same_bit_for_bit(tmp_path: Path, build: Any) -> None:
    tracked, plain = build(), build()
    fit(tmp_path, tracked, CKACallback(reference="adapter-off", debiased=True))
    fit(tmp_path, plain)
    assert tracked.losses == plain.losses
    assert state_of(tracked) == state_of(plain)
    for (name, weight), (_, other) in zip(tracked.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("build", [with_lora, two_adapters, of_transformers])
@pytest.mark.parametrize("fails", [False, True])
def test_switching_off_and_on_restores_everything(build: Any, fails: bool) -> None:
    module = build().train()
    before = state_of(module)
    try:
        with adapters_off(module):
            assert all(layer.disable_adapters for layer in adapter_modules(module))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state_of(module) == before


def test_what_was_off_stays_off() -> None:
    module = with_lora()
    layers = adapter_modules(module)
    layers[0].enable_adapters(False)
    before = state_of(module)
    with adapters_off(module):
        pass
    assert state_of(module) == before
    assert layers[0].disable_adapters


def test_the_reference_of_two_adapters_has_neither(tmp_path: Path) -> None:
    zeroed = two_adapters()
    for name, parameter in zeroed.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    callback, expected = (
        CKACallback(reference=reference, prefix=prefix, debiased=True)
        for reference, prefix in (("adapter-off", "cka"), (zeroed, "zeroed"))
    )
    fit(tmp_path, two_adapters(), callback, expected)
    assert callback.scores == pytest.approx(expected.scores, abs=1e-9)
    assert max(callback.scores.values()) < 1 - 1e-4


def test_a_model_without_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='Expected a PEFT model for reference="adapter-off", but found no adapters'):
        trainer(tmp_path, CKACallback(reference="adapter-off")).fit(PlainClassifier(Net()), train_loader(), loader())


def test_merged_adapters_are_an_error(tmp_path: Path) -> None:
    module = with_lora()
    module.model.merge_adapter()
    with pytest.raises(ValueError, match="The adapters are merged into the weights: unmerge them"):
        fit(tmp_path, module, CKACallback(reference="adapter-off"))


def test_trained_weights_that_are_no_adapter_s_are_an_error(tmp_path: Path) -> None:
    module = with_lora()
    module.model.base_model.model.bert.encoder.layer[1].output.dense.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The weight '.*1\.output\.dense\.weight' is trained and is no adapter's"):
        fit(tmp_path, module, CKACallback(reference="adapter-off"))


@pytest.mark.parametrize("name", ["running_mean", "calls"])
def test_buffers_that_a_validation_changes_are_put_back(tmp_path: Path, name: str) -> None:
    """With adapters off, no weights are exchanged that would bring them along."""

    class Counted(Text):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.calls += 1
            self.norm.train()(self.model(**batch).logits)

    seen = []
    for callbacks in ((), (CKACallback(reference="adapter-off"),)):
        torch.manual_seed(0)
        module = fit(tmp_path, Counted(with_lora().model), *callbacks)
        seen.append(module.norm.running_mean if name == "running_mean" else module.calls)
    assert torch.equal(*seen)
