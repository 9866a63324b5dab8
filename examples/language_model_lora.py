"""What does LoRA change in a causal language model, layer by layer?

    python examples/language_model_lora.py

trains a small Llama on sums, then adapters on differences, and prints the table of `CKACallback`: each layer against
itself with the adapters off.
"""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_cka import CKACallback

LENGTH = 24  # characters of a text, padded by zeros
PAIRS = [(a, b) for a in range(10, 90, 3) for b in range(0, 90, 4) if b <= a]


class LanguageModel(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def tokens(text: str) -> dict[str, Tensor]:
    """Characters for tokens; with a pretrained model, its tokenizer."""
    ids = torch.tensor(list(text.encode().ljust(LENGTH, b"\0")))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > 0, -100)}


pl.seed_everything(0)
options = {"devices": 1, "logger": False, "enable_checkpointing": False}
sums = [tokens(f"{a} plus {b} is {a + b}.") for a, b in PAIRS]
differences = [tokens(f"{a} minus {b} is {a - b}.") for a, b in PAIRS]
# A pretrained one: AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
pl.Trainer(max_epochs=4, **options).fit(
    LanguageModel(model), DataLoader(sums, 32, shuffle=True), DataLoader(differences, 64)
)

adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
module = LanguageModel(get_peft_model(model, adapters))
train, val = torch.utils.data.random_split(differences, [0.6, 0.4])
callback = CKACallback(reference="adapter-off")
trainer = pl.Trainer(max_epochs=4, callbacks=[callback], **options)
trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(val, 64))
print(f"val_loss: {trainer.callback_metrics['val_loss']:.3f}")
