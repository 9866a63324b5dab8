"""What data take from their model, or the error that says what it lacks."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from torch import nn

from lit_cka.data.digits import DigitsDataModule
from lit_cka.data.from_model import attached_model, padding_token, transform_of


def test_the_model_is_that_of_the_trainer() -> None:
    data, model = DigitsDataModule(), pl.LightningModule()
    assert attached_model(data) is None
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert attached_model(data) is None
    data.trainer.strategy.connect(model)
    assert attached_model(data) is model


def test_the_preprocessing_is_the_model_s() -> None:
    model = nn.Identity()
    model.eval_transform = str.lower
    assert transform_of(model, "eval_transform") is str.lower
    with pytest.raises(ValueError, match="Expected the LightningModule to have a `train_transform`"):
        transform_of(model, "train_transform")
    with pytest.raises(ValueError, match="Expected 'mine' to have an `eval_transform`"):
        transform_of(nn.Identity(), "eval_transform", whose="'mine'")
    with pytest.raises(ValueError, match="Expected the LightningModule"):
        transform_of(None, "eval_transform")


@pytest.mark.parametrize(
    ("pad", "eos", "num_tokens", "expected"),
    [(5, 7, 10, 5), (None, 7, 10, 7), (None, None, 10, 0), (5, 3, 5, 3), (5, 7, 5, 0), (0, 7, 10, 0)],
)
def test_padding_is_a_token_that_the_model_knows(pad: int, eos: int, num_tokens: int, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert padding_token(tokenizer, num_tokens) == expected
