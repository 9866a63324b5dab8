"""What a fine-tuning is, and two toy ones, of a text encoder and of a vision transformer, pretrained for minutes.

Nothing is downloaded. The text is made: sentences of words with a topic, of which the encoder is first trained to fill
in words left out; then it is to say whether a sentence is good or bad, where a "not" turns a word around. The images
are the digits of scikit-learn: the transformer first reads them as they are, then rotated, noisy and blurred ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lit_cka.data import DigitsDataModule
from lit_cka.data.digit_versions import shifted_versions

NUM_WORDS, NUM_TOKENS, NUM_TOPICS = 300, 16, 8
_MASK, _NOT = 0, 1
_GOOD, _BAD = range(2, 22), range(22, 42)  # words; the others belong to topics


class Task(NamedTuple):
    """What is fine-tuned: the pretrained network, its data for a seed, and how."""

    pretrained: nn.Module
    data: Callable[[int], list[TensorDataset]]  # to train on, to validate on, and to test on
    learning_rate: float
    batch_size: int
    epochs: int
    validations: int  # in an epoch
    is_scheduled: bool  # a warm-up, and a linear decay to 0

    def loaders(self, seed: int) -> list[DataLoader[Any]]:
        train, val, test = self.data(seed)
        order = torch.Generator().manual_seed(seed)
        shuffled = DataLoader(train, self.batch_size, shuffle=True, generator=order)
        return [shuffled, DataLoader(val, 256), DataLoader(test, 256)]

    def module(self, seed: int) -> FineTuning:
        """The pretrained network with a new head."""
        torch.manual_seed(seed)
        network = copy.deepcopy(self.pretrained)
        network.reset_head()
        return FineTuning(network, self.learning_rate, self.is_scheduled)


class Encoder(nn.Module):
    """A transformer's blocks over words, or patches of images, and a linear head on their mean."""

    def __init__(self, stem: nn.Module, num_tokens: int, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(stem, Positions(num_tokens, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.num_classes, self.width = num_classes, width
        self.reset_head()

    def reset_head(self) -> None:
        self.head = nn.Linear(self.width, self.num_classes)

    def tokens(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.tokens(inputs).mean(dim=1))


class Positions(nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.position


class Patches(nn.Module):
    def __init__(self, width: int, size: int = 2) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, width, size, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).flatten(2).transpose(1, 2)


class FineTuning(pl.LightningModule):
    """Cross-entropy and AdamW; logs `val_loss` and `val_acc`."""

    def __init__(self, network: nn.Module, learning_rate: float, is_scheduled: bool) -> None:
        super().__init__()
        self.network, self.learning_rate, self.is_scheduled = network, learning_rate, is_scheduled

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.network(batch[0])
        size = len(batch[1])
        self.log("val_loss", cross_entropy(logits, batch[1]), batch_size=size)
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), batch_size=size)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=0.01)
        if not self.is_scheduled:
            return optimizer
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_warm = max(1, num_steps // 10)
        factor = partial(_warm_up_and_decay, num_steps, num_warm)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]


def _warm_up_and_decay(num_steps: int, num_warm: int, step: int) -> float:
    return min((step + 1) / num_warm, (num_steps - step) / (num_steps - num_warm))


# Text.


def sentences(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sentences (num, 16) of words, and whether each is good: most of its judging words then are, after any "not"."""
    draw = torch.Generator().manual_seed(seed)

    def happens(chance: float) -> Tensor:
        return torch.rand(num, NUM_TOKENS, generator=draw) < chance

    def any_of(words: range) -> Tensor:
        return torch.randint(words.start, words.stop, (num, NUM_TOKENS), generator=draw)

    size = (NUM_WORDS - _BAD.stop) // NUM_TOPICS
    topic = torch.randint(NUM_TOPICS, (num, 1), generator=draw)
    of_topic = topic * size + any_of(range(_BAD.stop, _BAD.stop + size))
    words = torch.where(happens(0.6), of_topic, any_of(range(_BAD.stop, NUM_WORDS)))
    good = torch.randint(2, (num, 1), generator=draw)
    judges = happens(0.4)
    turned = happens(0.4) & judges.roll(-1, 1) & ~judges
    turned[:, -1] = False
    says_good = (good == 1) ^ ~happens(0.85) ^ turned.roll(1, 1)
    words = torch.where(judges, torch.where(says_good, any_of(_GOOD), any_of(_BAD)), words)
    return words.masked_fill(turned, _NOT), good.flatten()


def text_data(seed: int, num_train: int, num_val: int = 300, num_test: int = 1000) -> list[TensorDataset]:
    """Another sample of sentences for each seed."""
    sizes = [num_train, num_val, num_test]
    words, labels = sentences(sum(sizes), 1000 + seed)
    return [TensorDataset(*part) for part in zip(words.split(sizes), labels.split(sizes), strict=True)]


def pretrained_text(num_steps: int, width: int, depth: int) -> nn.Module:
    """An encoder that has learned to fill in words."""
    torch.manual_seed(0)
    network = Encoder(nn.Embedding(NUM_WORDS, width), NUM_TOKENS, width, depth, 2)
    decoder = nn.Linear(width, NUM_WORDS)
    words, _ = sentences(20_000, 0)
    draw = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        batch = words[torch.randint(len(words), (64,), generator=draw)]
        left_out = torch.rand(batch.shape, generator=draw) < 0.2
        tokens = network.tokens(batch.masked_fill(left_out, _MASK))
        return cross_entropy(decoder(tokens[left_out]), batch[left_out])

    trained([network, decoder], loss, num_steps)
    return network


# Images.


def digit_data(seed: int, num_train: int, num_val: int = 300, num_test: int = 1000) -> list[TensorDataset]:
    """Rotated, noisy and blurred digits of the train, val and test parts, other versions for each seed."""
    digits, draw = DigitsDataModule(), torch.Generator().manual_seed(seed)
    digits.setup("fit")
    sets = []
    for part, num in (("train", num_train), ("val", num_val), ("test", num_test)):
        images, labels = digits.loader(part).dataset.tensors
        versions = shifted_versions(images, draw)
        pool = torch.cat(list(versions.values())), labels.repeat(len(versions))
        chosen = torch.randperm(len(pool[0]), generator=draw)[:num]
        sets.append(TensorDataset(pool[0][chosen], pool[1][chosen]))
    return sets


def pretrained_digits(num_steps: int, width: int, depth: int) -> nn.Module:
    """A vision transformer that reads the digits as they are."""
    digits = DigitsDataModule()
    digits.setup("fit")
    images, labels = digits.loader("train").dataset.tensors
    torch.manual_seed(0)
    network = Encoder(Patches(width), 16, width, depth, 10)

    def loss() -> Tensor:
        batch = torch.randint(len(images), (64,))
        return cross_entropy(network(images[batch]), labels[batch])

    trained([network], loss, num_steps)
    return network


def trained(networks: list[nn.Module], loss: Callable[[], Tensor], num_steps: int) -> None:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def kept(path: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """What is made the first time, and read later."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    network: nn.Module = torch.load(path, weights_only=False)
    return network
