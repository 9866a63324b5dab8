"""How far does each block of a Hugging Face classifier move, and each attention in it?

    python examples/text_classifier.py

trains a small DistilBERT to tell good from bad reviews, and prints the table of `CKACallback` and the accuracy. The
features are means over the tokens that the attention mask keeps: padding does not count.
"""

import random

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lit_cka import CKACallback

WORDS = ["[PAD]", "good", "fine", "great", "bad", "dull", "poor", "film", "plot", "cast", "very", "the", "a", "was"]


class TextClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # A pretrained one: AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        config = DistilBertConfig(vocab_size=len(WORDS), dim=32, n_layers=3, n_heads=2, hidden_dim=64)
        self.model = DistilBertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        accuracy = (self.model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-4)


def review(number: int) -> dict[str, Tensor]:
    """A labelled review of 3 to 12 words, with its padding."""
    words = random.choices(WORDS[7:], k=random.randint(2, 11))
    words.insert(random.randint(0, len(words)), random.choice(WORDS[1:4] if number % 2 else WORDS[4:7]))
    # With a pretrained model: AutoTokenizer.from_pretrained("distilbert-base-uncased")(text, padding="max_length")
    ids = torch.tensor([WORDS.index(word) for word in words] + [0] * (12 - len(words)))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(number % 2)}


pl.seed_everything(0)
train, val = [review(i) for i in range(640)], [review(i) for i in range(300)]
module = TextClassifier()
callback = CKACallback(["model.distilbert.transformer.layer.*", "model.distilbert.transformer.layer.*.attention"])
trainer = pl.Trainer(max_epochs=4, devices=1, callbacks=[callback], logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(val, 64))

print(f"val_acc: {trainer.callback_metrics['val_acc']:.3f}")
