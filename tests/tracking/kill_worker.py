"""A script for `test_resume.py`: a tracked fit that is killed, and resumed, again and again.

    python tests/tracking/kill_worker.py FOLDER KILLS

writes `FOLDER/whole.json`, the history of an uninterrupted fit, and for each kill `FOLDER/<i>.json`, that of one that
was killed at a random moment. The processes are forked from one that has imported everything, since that
takes the most time.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_cka import CKACallback
from tests.tracking.helpers import Classifier, loader, trainer

SECONDS = 60


def fit(folder: Path, result: Path, max_epochs: int = 12) -> None:
    """Train from the last checkpoint in `folder`, or from the start, to the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, callback = Classifier(), CKACallback(every_n_validations=2, log_figures=False)
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=2, monitor="val_loss")
    run = trainer(folder, callback, checkpoint, max_epochs=max_epochs, enable_checkpointing=True)
    run.fit(module, loader(64, seed=0, batch_size=8), loader(), ckpt_path="last", weights_only=True)
    result.write_text(json.dumps(callback.history))


def main(folder: Path, kills: int) -> None:
    fork = multiprocessing.get_context("fork")

    def run(name: str, seconds: float) -> float:
        start = time.monotonic()
        process = fork.Process(target=fit, args=(folder / name, folder / f"{name}.json"))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return time.monotonic() - start

    fit(folder / "first", folder / "first.json", max_epochs=1)
    duration = run("whole", SECONDS)
    moments, index = random.Random(0), 0
    while index < kills:
        run(str(index), moments.uniform(0, duration))
        if (folder / f"{index}.json").exists():  # it was through by then: another try
            shutil.rmtree(folder / str(index))
            (folder / f"{index}.json").unlink()
            continue
        run(str(index), SECONDS)
        index += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
