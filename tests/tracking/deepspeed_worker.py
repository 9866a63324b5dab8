"""A script for `test_deepspeed.py`: the trainings of `sharded_worker.py` under DeepSpeed, on 2 processes.

    python tests/tracking/deepspeed_worker.py FOLDER

writes what each process has seen to `FOLDER/<way>-<rank>.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from tests.tracking.sharded_worker import WHOLE, Way, main

WAYS = [
    Way("ZeRO-1", data=2, kind="zero1"),
    Way("ZeRO-2", data=2, kind="zero2"),
    Way("ZeRO-3", data=2, kind="zero3", tests_checkpoints=False),
    # Small parameters are kept whole after their first use: here, all of them.
    Way("ZeRO-3, persistent", data=2, kind="zero3 persistent", tests_checkpoints=False),
]


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's, without its questions after a GPU."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for a number

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def zero_strategy(way: Way) -> ZeroStrategy:
    stage, _, is_persistent = way.kind.removeprefix("zero").partition(" ")
    optimization: dict[str, Any] = {"stage": int(stage)}
    if stage == "3":
        optimization["stage3_param_persistence_threshold"] = 10**6 if is_persistent else 0
    config = {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": optimization,
        "train_micro_batch_size_per_gpu": 8,
    }
    return ZeroStrategy(config=config, process_group_backend="gloo")


if __name__ == "__main__":
    main((WHOLE, *WAYS), Path(sys.argv[1]))
