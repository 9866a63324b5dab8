"""What data take from the model that they are for: its preprocessing of images, its tokenizer, its padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_cka.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


def attached_model(data: pl.LightningDataModule) -> pl.LightningModule | None:
    """Returns the LightningModule of the trainer that the data are attached to; None while there is none."""
    return None if data.trainer is None else data.trainer.lightning_module


def transform_of(model: nn.Module | None, name: str, *, whose: str = "the LightningModule") -> Callable[[Any], Any]:
    """Returns the model's preprocessing `name`, "train_transform" or "eval_transform".

    Raises:
        ValueError: if it has none, which says `whose` is missing.
    """
    transform: Callable[[Any], Any] | None = getattr(model, name, None)
    if transform is None:
        article = "an" if name[0] in "aeiou" else "a"
        raise ValueError(
            f"Expected {whose} to have {article} `{name}`, the preprocessing that its weights were trained with, but "
            "it has none. The models of lit_cka.models do; set it on your own."
        )
    return transform


def tokenizer_for(data: pl.LightningDataModule, tokenizer: str | None) -> Any:
    """Returns the tokenizer of this name or folder; for None that of the model (`tokenizer_name`).

    Raises:
        ValueError: if the model names none either, or there is none where it should be.
    """
    model = attached_model(data)
    name = tokenizer or getattr(model, "tokenizer_name", None)
    if name is None:
        raise ValueError("Expected `tokenizer` to name a tokenizer, since the LightningModule has none.")
    is_of_model = name == getattr(model, "tokenizer_name", None)
    return load_tokenizer(name, trust_remote_code=is_of_model and getattr(model, "trust_remote_code", False))


def padding_token(tokenizer: Any, num_tokens: float = float("inf")) -> int:
    """Returns a token to pad with: the tokenizer's, or one that every model knows. It is masked, so any will do.

    Args:
        tokenizer: of transformers.
        num_tokens: the model knows tokens below this number.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token < num_tokens), 0)
