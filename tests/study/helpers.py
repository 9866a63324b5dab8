"""A small network, checkpoints of it, and test sets: what the tests of a study are about."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from lit_cka.data.test_sets import TestSet, TestSetsDataModule

NUM_CLASSES = 4
SETS = ("plain", "shifted", "grouped")


class Net(nn.Module):
    """Two blocks, a norm with buffers, and a head."""

    num_classes = NUM_CLASSES

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        logits: Tensor = self.head(self.norm(x))
        return logits


class Sets(TestSetsDataModule):
    """Three test sets; of the third, samples are versions of 20 originals.

    Args:
        batch_size: samples per batch.
        shuffled: other samples at each pass.
        absent: a class that no sample has; None for all of them.
        num_sets: how many sets.
    """

    def __init__(
        self, batch_size: int = 16, shuffled: bool = False, absent: int | None = None, num_sets: int = 3
    ) -> None:
        super().__init__(batch_size)
        self.shuffled, self.absent, self.num_sets = shuffled, absent, num_sets
        self.num_passes = 0

    @override
    def read_test_sets(self) -> list[TestSet]:
        self.num_passes += 1
        seed = int(torch.randint(1000, ()).item()) + 1000 * self.num_passes if self.shuffled else 0
        sets = []
        for number, name in enumerate(SETS[: self.num_sets]):
            generator = torch.Generator().manual_seed(seed + number)
            n = 50 if name == "plain" else 40
            labels = torch.randint(NUM_CLASSES, (n,), generator=generator)
            if self.absent is not None:
                labels[labels == self.absent] = (self.absent + 1) % NUM_CLASSES
            x = torch.randn(n, 8, generator=generator)
            x[:, :NUM_CLASSES] += 2 * nn.functional.one_hot(labels, NUM_CLASSES)
            groups = torch.arange(n) % 20 if name == "grouped" else None
            sets.append(TestSet(name, TensorDataset(x, labels), groups=groups))
        return sets


def trained(seed: int, start: nn.Module | None = None, steps: int = 15) -> Net:
    """A network that was trained a little on samples like the first set's."""
    torch.manual_seed(seed)
    model = Net()
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(seed + 100)
    for _ in range(steps):
        labels = torch.randint(NUM_CLASSES, (32,), generator=generator)
        x = torch.randn(32, 8, generator=generator)
        x[:, :NUM_CLASSES] += 2 * nn.functional.one_hot(labels, NUM_CLASSES)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


def write_checkpoints(folder: Path, number: int = 3) -> None:
    """`pretrained.pt`, and `tuned_0.pt`, `tuned_1.pt`, ... from there."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained = trained(0)
    torch.save(pretrained.state_dict(), folder / "pretrained.pt")
    for index in range(number):
        torch.save(trained(1 + index, pretrained).state_dict(), folder / f"tuned_{index}.pt")
