"""A script for `test_editor.py`: the memory that an evaluation of five variants holds, in sizes of the model.

python tests/editing/memory_worker.py sequential|together RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka import MonoSoupEditor

WIDTH, WIDE = 100, 200_000  # 160 MB of weights that are split fast


class Watch(Callback):
    """The most memory of this process's own, files left out, that there is in a batch."""

    most = 0

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self.most = max(self.most, own_memory())


def own_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def network(file: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save({"0.weight": torch.randn(WIDE, WIDTH), "1.weight": torch.randn(WIDTH, WIDE)}, file)


def main(mode: str, result: str) -> None:
    files = [Path(result).with_name(f"{mode}-{index}.pt") for index in range(2)]
    for seed, file in enumerate(files):
        network(file, seed)
    torch.linalg.eigh(torch.eye(3, dtype=torch.float64))  # loads libraries
    data = DataLoader(TensorDataset(torch.randn(8, WIDTH), torch.randint(WIDTH, (8,))), 4)
    trainer_options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "barebones": False}
    watch = Watch()
    before = own_memory()
    model = nn.Sequential(nn.Linear(WIDTH, WIDE, bias=False), nn.Linear(WIDE, WIDTH, bias=False))
    options: dict[str, Any] = {"layers": ["0", "1"], "max_cka_batches": 0, "sequential": mode == "sequential"}
    editor = MonoSoupEditor(*files, model, **options)
    del model
    trainer = Trainer(callbacks=[watch], enable_progress_bar=False, enable_checkpointing=False, **trainer_options)
    trainer.test(editor, data, verbose=False)
    assert editor.results is not None
    size = 2 * WIDTH * WIDE * 4
    metrics = {name: values["test_0"] for name, values in editor.results.metrics.items()}
    Path(result).write_text(json.dumps({"models": (watch.most - before) / size, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
