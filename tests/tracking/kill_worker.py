"""A script for `test_resume.py`: a tracked fit that is killed, and resumed, again and again.

    python tests/tracking/kill_worker.py FOLDER CHAINS RANKS [RANKS ...]

does a fit CHAINS times: on as many ranks as the first number says, until it is killed at a random moment, then on as
many as the second says, and so on; the last part comes to the end. Where the numbers are not all 1, the validation data
also come in another order, and in batches of another size, after each kill. Each rank writes its history to
`FOLDER/<chain>-<rank>.json`. `FOLDER/whole-0.json` is that of a fit of one process that was not killed,
`FOLDER/stopped-<rank>.json` that of one whose parts ended after so many epochs, and `FOLDER/damaged-<rank>.json` that
of the same with a recording damaged before the last part. The processes are forked from one that has imported
everything, since that takes the most time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lit_cka import CKACallback
from tests.tracking.helpers import Classifier, Net, dataset, loader, trainer

SECONDS, MAX_EPOCHS = 60, 12
BATCH_SIZES = (16, 5, 7, 3)  # of the validation data, before the first kill, after it, and so on


class SameOnAnyRanks(Classifier):
    """Its loss is a mean over samples, in float64: the batches of two ranks are as good as one of all."""

    def __init__(self) -> None:
        net = Net()
        for block in net.blocks:
            block.norm = nn.Identity()
        super().__init__(net)
        self.double()  # at once: Lightning would load a checkpoint's weights into float32 before

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def fit(name: str, part: int, folder: Path, world_size: int, moves: bool, max_epochs: int, rank: int) -> None:
    """Train from the last checkpoint, or from the start, to the end: this rank's share of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    options: dict[str, Any] = {"precision": "64-true"} if moves else {}
    if world_size > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning, which takes it that all are started
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
        options.update(strategy="ddp", devices=world_size)
    module = SameOnAnyRanks() if moves else Classifier()
    callback = CKACallback(every_n_validations=2, log_figures=False)
    checkpoint = ModelCheckpoint(folder / name / "checkpoints", save_last=True, save_top_k=2, monitor="val_loss")
    run = trainer(folder / name, callback, checkpoint, max_epochs=max_epochs, enable_checkpointing=True, **options)
    data = loader(batch_size=BATCH_SIZES[part] if moves else BATCH_SIZES[0], shuffle=moves and part > 0)
    samples = dataset(64, seed=0)
    in_order = DistributedSampler(samples, world_size, rank, shuffle=False)  # Lightning's own would shuffle
    run.fit(module, DataLoader(samples, 8 // world_size, sampler=in_order), data, ckpt_path="last", weights_only=True)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(callback.history))


def run_part(
    name: str,
    part: int,
    folder: Path,
    world_size: int,
    moves: bool,
    *,
    seconds: float = SECONDS,
    max_epochs: int = MAX_EPOCHS,
) -> bool:
    """Do a part of a fit in a process per rank, for so many seconds; return whether it came to its end.

    Raises:
        RuntimeError: if a process has failed before that.
    """
    (folder / "meeting").unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    arguments = (name, part, folder, world_size, moves, max_epochs)
    ranks = [fork.Process(target=fit, args=(*arguments, rank)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in ranks]
    for process in random.sample(ranks, len(ranks)):
        process.kill()
        process.join()
    if not set(codes) <= {0, None}:
        raise RuntimeError(f"A process of {name}, part {part}, has failed: {codes}.")
    return set(codes) == {0}


def main(folder: Path, num_chains: int, sizes: Sequence[int]) -> None:
    random.seed(0)
    moves = set(sizes) != {1}
    fit("first", 0, folder, 1, moves, 1, 0)
    durations = {}
    for world_size in sorted({1, *sizes}, reverse=True):  # the last one stays
        forget("whole", folder)
        start = time.monotonic()
        assert run_part("whole", 0, folder, world_size, moves)
        durations[world_size] = time.monotonic() - start
    for part, world_size in enumerate(sizes):
        max_epochs = MAX_EPOCHS * (part + 1) // len(sizes)
        if part == len(sizes) - 1:
            damage("stopped", "damaged", folder, sizes[part - 1])
            assert run_part("damaged", part, folder, world_size, moves)
        assert run_part("stopped", part, folder, world_size, moves, max_epochs=max_epochs)
    chain = 0
    while chain < num_chains:
        is_through = False
        for part, world_size in enumerate(sizes[:-1]):
            seconds = random.uniform(0, durations[world_size] / (len(sizes) - 1))
            is_through = is_through or run_part(str(chain), part, folder, world_size, moves, seconds=seconds)
        if is_through:  # before it was killed: another try
            forget(str(chain), folder)
            continue
        assert run_part(str(chain), len(sizes) - 1, folder, sizes[-1], moves)
        chain += 1


def damage(name: str, copied: str, folder: Path, world_size: int) -> None:
    """Copy a fit, and cut off what its last rank has recorded."""
    shutil.copytree(folder / name, folder / copied)
    last = f"cka_recording_*_{world_size - 1}_of_{world_size}.safetensors"
    (file,) = (folder / copied / "checkpoints").glob(last)
    file.write_bytes(file.read_bytes()[:-1])


def forget(name: str, folder: Path) -> None:
    shutil.rmtree(folder / name, ignore_errors=True)
    for file in folder.glob(f"{name}-*.json"):
        file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(size) for size in sys.argv[3:]])
