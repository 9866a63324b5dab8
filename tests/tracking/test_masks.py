"""Which tokens count in a training: by the mask of the model's call, by a name, or by a callable of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import CKACallback
from lit_cka.features import FeatureExtractor
from lit_cka.functional import linear_cka
from tests.tracking.helpers import trainer

TOKENS = 5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Text(pl.LightningModule):
    """Calls its encoder with a mask under a name, or without."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.name = name

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        x, kept = batch
        masks = {} if self.name is None else {self.name: kept.bool() if self.name == "mask" else kept}
        return self.encoder(x, **masks).square().mean()

    training_step = validation_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def data() -> TensorDataset:
    torch.manual_seed(0)
    kept = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (48, 1))
    x = torch.randn(48, TOKENS, 4)
    return TensorDataset(torch.where(kept[..., None], x, 100.0), kept.long())  # what is padding would drown the rest


def fitted(folder: Path, module: Text, **options: Any) -> tuple[CKACallback, Encoder]:
    """After one step; also the encoder as it was."""
    before = Encoder()
    before.load_state_dict(module.encoder.state_dict())
    callback = CKACallback(layers="encoder.layers.1", log_figures=False, **options)
    loader = DataLoader(data(), 8)
    trainer(folder, callback, max_epochs=1, limit_train_batches=1).fit(module, loader, loader)
    return callback, before


def by_hand(module: Text, before: Encoder, *, masked: bool) -> float:
    x, kept = data().tensors
    weights = (kept if masked else torch.ones_like(kept)).double()[..., None]
    pooled = []
    for encoder in (module.encoder, before):
        with torch.no_grad():
            hidden = x + encoder.layers[0](x).tanh()
            output = encoder.layers[1](hidden).double()
        pooled.append((output * weights).sum(1) / weights.sum(1))
    return linear_cka(*pooled, debiased=True).item()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention_mask", {}),
        ("mask", {"mask": "mask"}),  # the name of an argument
        ("attention_mask", {"mask": lambda batch: batch[1]}),
        (None, {"mask": lambda batch: batch[1]}),
    ],
)
def test_only_tokens_that_count_are_pooled(tmp_path: Path, name: str | None, options: dict[str, Any]) -> None:
    module = Text(name)
    callback, before = fitted(tmp_path, module, **options)
    score = callback.scores["encoder.layers.1"]
    assert score == pytest.approx(by_hand(module, before, masked=True), abs=1e-9)
    assert abs(score - by_hand(module, before, masked=False)) > 1e-3


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_reference_beside_the_model_takes_the_same_tokens(tmp_path: Path) -> None:
    class Other(Encoder):
        """Another architecture, so that it runs."""

        def __init__(self) -> None:
            super().__init__()
            self.layers[1] = nn.Linear(4, 6)

        def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
            return self.layers[1](x + self.layers[0](x).tanh())

    reference = nn.Module()
    reference.encoder = Other()
    module = Text("mask")
    callback, _ = fitted(tmp_path, module, mask="mask", reference=reference)
    x, kept = data().tensors
    weights = kept.double()[..., None]
    pooled = []
    for encoder in (module.encoder, reference.encoder):
        with torch.no_grad():
            output = encoder.layers[1](x + encoder.layers[0](x).tanh()).double()
        pooled.append((output * weights).sum(1) / weights.sum(1))
    assert callback.scores["encoder.layers.1"] == pytest.approx(linear_cka(*pooled, debiased=True).item(), abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("absent", "called with a mask named 'absent', but its arguments are"),
        (lambda batch: batch[0], r"`mask` to be a tensor \(samples, tokens\).*but got shape \(8, 5, 4\)"),
    ],
)
def test_a_mask_that_is_none_is_an_error_before_training(tmp_path: Path, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, Text("attention_mask"), mask=mask)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_mask_that_may_mean_its_opposite_is_said_once(tmp_path: Path) -> None:
    module = Text("mask")
    with pytest.warns(UserWarning, match="not clear what the mask `mask` of torch.bool.*Say with `mask`") as warned:
        callback, before = fitted(tmp_path, module)
    assert sum("not clear" in str(each.message) for each in warned) == 1
    assert callback.scores["encoder.layers.1"] == pytest.approx(by_hand(module, before, masked=False), abs=1e-9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "options", [{"pooling": "cls"}, {"mask": lambda batch: 1 - batch[1] + (batch[1].cumsum(1) == 1)}]
)
def test_a_recording_that_was_pooled_otherwise_is_not_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of the same layers and the same widths: resumed with other options, the initial weights are recorded anew."""
    module, loader = Text("attention_mask"), DataLoader(data(), 8)
    before = Encoder()
    before.load_state_dict(module.encoder.state_dict())
    callback = CKACallback(layers="encoder.layers.1", log_figures=False)
    short = {"limit_train_batches": 1, "enable_checkpointing": True}
    trainer(tmp_path, callback, max_epochs=1, **short).fit(module, loader, loader)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    callback = CKACallback(layers="encoder.layers.1", log_figures=False, **options)
    trainer(tmp_path, callback, max_epochs=2, **short).fit(module, loader, loader, ckpt_path=checkpoint)
    x, kept = data().tensors
    weights = options["mask"]((x, kept)) if "mask" in options else torch.eye(TOKENS)[0].expand(len(x), -1)
    pooled = []
    for encoder in (module.encoder, before):
        with torch.no_grad():
            output = encoder.layers[1](x + encoder.layers[0](x).tanh()).double() * (weights != 0).double()[..., None]
        pooled.append(output.sum(1) / (weights != 0).sum(1, keepdim=True))
    assert callback.scores["encoder.layers.1"] == pytest.approx(linear_cka(*pooled, debiased=True).item(), abs=1e-9)


class WithPositions(Text):
    """Passes a tensor without samples as well."""

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.encoder(batch[0], positions=torch.arange(TOKENS)[:, None]).square().mean()

    training_step = validation_step = step


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_number_of_samples_is_that_of_the_batch(tmp_path: Path) -> None:
    """Not of whatever tensor has a leading axis: by shapes alone, the tokens could be the samples."""
    module = WithPositions(None)
    callback, before = fitted(tmp_path, module)
    assert callback.history[-1]["n"] == 48
    assert callback.scores["encoder.layers.1"] == pytest.approx(by_hand(module, before, masked=False), abs=1e-9)
    x = data().tensors[0][:8]
    with FeatureExtractor(module.encoder, "layers.1") as extractor, torch.no_grad():
        module.encoder(x, positions=torch.arange(TOKENS)[:, None])
        with pytest.raises(ValueError, match="can be read as NTC or TNC"):
            extractor.collect()
