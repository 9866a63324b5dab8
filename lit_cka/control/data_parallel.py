"""Strategies under which parameters can be frozen or changed in training, and DDP, which has to hear of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from lit_cka.features.sharded_modules import is_sharded


def require_known_strategy(trainer: pl.Trainer, who: str) -> None:
    """Raise for strategies under which freezing in training was not made to work.

    Args:
        trainer: whose strategy.
        who: the callback that asks.

    Raises:
        ValueError: for any other than one device and DDP, or for DDP that keeps a state of its own for gradients.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"Expected {who} to run on one device or under DDP, but got {type(strategy).__name__}, where sharded "
            "parameters and gradients are bound to what was trained at first: use strategy='ddp', or leave it out."
        )
    state = getattr(strategy, "_ddp_comm_state", None)
    if state is not None:
        raise ValueError(
            f"Expected DDP without a `ddp_comm_state` for {who}, but got {type(state).__name__}, which remembers "
            "gradients by their place: leave one of them out."
        )


def require_own_weights(trainer: pl.Trainer, who: str, instead: str) -> None:
    """Raise for strategies under which what an optimizer's step changes are not the parameters of a layer.

    FSDP without `use_orig_params` has those of many layers in one, and DeepSpeed's optimizer has weights of its own.

    Args:
        trainer: whose strategy.
        who: what asks.
        instead: what does work.

    Raises:
        ValueError: for any other than one device, DDP, `ModelParallelStrategy`, and FSDP with `use_orig_params`.
    """
    strategy: Any = trainer.strategy
    has_them = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not has_them and not (isinstance(strategy, FSDPStrategy) and strategy.kwargs.get("use_orig_params")):
        raise ValueError(
            f"Expected {who} to run on one device, or under DDP, ModelParallelStrategy or FSDP with "
            f"use_orig_params=True, where a layer has its weights to itself, but got {type(strategy).__name__}: use "
            f"one of these, or {instead}."
        )


def require_whole_parameters(module: pl.LightningModule, who: str) -> None:
    """Raise if the module was sharded by its own hooks.

    Raises:
        ValueError: if so.
    """
    if is_sharded(module):
        raise ValueError(
            f"Expected {who} to find whole parameters, but {type(module).__name__} is sharded over processes: use "
            "strategy='ddp', or leave it out."
        )


def rebuild_ddp(trainer: pl.Trainer) -> None:
    """Have DDP wait for the gradients of those parameters that need some by now, and put them into new buckets.

    DDP notes once which parameters have gradients, and waits for each of them in every backward pass. So it is built
    anew; weights and buffers are left alone, as they are the same on all ranks already, or are meant to differ. All
    ranks have to call it, between two steps.

    Args:
        trainer: nothing is done if it does not use DDP.
    """
    strategy: Any = trainer.strategy
    before = strategy.model
    if not isinstance(before, DistributedDataParallel):
        return
    before._remove_autograd_hooks()  # or the old one would go on to reduce gradients, too
    options = strategy._ddp_kwargs
    strategy.model = strategy.lightning_module
    strategy._ddp_kwargs = {**options, "init_sync": False}
    try:
        strategy.configure_ddp()
    finally:
        strategy._ddp_kwargs = options
    strategy._pl_static_graph_delay_done = False
    strategy.model.training = before.training
