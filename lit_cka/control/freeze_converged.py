"""`FreezeConverged`: in any Lightning training, freezes the first blocks once they change little beside the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lit_cka.control.data_parallel import require_known_strategy, require_whole_parameters
from lit_cka.control.freeze_decision import FreezeDecision, FreezeEvent
from lit_cka.control.freeze_options import Cache, FreezeOptions, OptimizerState, Policy
from lit_cka.control.freeze_report import log_scalars, print_events
from lit_cka.control.freezing_steps import FreezingSteps
from lit_cka.control.measurement import found_or_added, training_records
from lit_cka.control.plan import FreezePlan
from lit_cka.control.savings import Savings
from lit_cka.features.layers import Layers, select_layers
from lit_cka.features.lightning_private import logging_step
from lit_cka.parallel.warning import warn
from lit_cka.tracking.callback import CKACallback

PREVIOUS = "previous"


class FreezeConverged(pl.Callback):
    """Freezes the first blocks of a network once they change little beside the last one, and saves their backward.

    `Trainer(callbacks=[FreezeConverged()])` is enough: it reads a `CKACallback(reference="previous")` of the trainer,
    and adds one where there is none. After each validation, a block counts as converged if what it gives has moved,
    since the validation before, by less than its share of how far what the last block gives has: an equal share for
    each block (`lit_cka.control.convergence.num_converged` has the formula). So there is no limit that would have to
    fit the learning rate. The blocks before the first that is above its share are frozen from the next step on, and
    with them what runs before them, such as embeddings or a stem (Liu et al. 2021, arXiv 2102.01386, freeze prefixes by
    the norm of gradients, and Wang et al. 2022, arXiv 2201.06227, by a similarity of activations). Their gradients are
    not computed, neither for their weights nor through them. Those behind them are trained to the end. Where the first
    blocks are what learns, nothing is frozen, and nothing saved.

    What belongs to a block is read off the autograd graph of the first training step: the parameters that what it
    returns depends on, unless something behind it uses them, too (a tied output embedding is trained on).

    Works with automatic and manual optimisation, accumulated gradients (it waits for the optimizer's step), schedulers
    (parameters stay in their groups), adapters such as LoRA, `torch.compile`, and DDP without
    `find_unused_parameters`. A training that is resumed from a checkpoint written at a validation goes on bit for bit.
    After `fit`, everything is trainable again.

    Args:
        share: of the equal share, at the upper end of a block's 95 % interval: less freezes less, and later.
        num_evaluations: how many evaluations in a row a block has to stay below it.
        blocks: the blocks in the order in which they run, chosen as `CKACallback` chooses layers; None for the repeated
            blocks of the network.
        max_frozen: the most blocks to freeze; None for all but the last.
        monitor: a logged value, and if it turns, all is trained again, and nothing frozen before the value is better
            than it ever was; None to never do that. Without such a value a warning says so.
        mode: "min" if lower is better, "max" if higher is.
        patience: it has turned when it was worse than its best so often in a row since blocks were frozen.
        min_delta: by more than this.
        optimizer_state: "drop" what the optimizer knows of frozen parameters, such as momentum, which frees its memory;
            or "keep" it, to go on with when they are trained again.
        norm_in_eval: batch normalisation of frozen blocks uses its running statistics, and leaves them as they are.
        dropout_in_eval: all else in frozen blocks, dropout above all, is in eval mode.
        cache: keep what the last frozen block returns for each sample, in "memory" or on "disk", and leave out the
            forward of the frozen blocks for samples that come again as they were. Where the data change at random, or
            the blocks give something else for the same samples, a warning says so, and the training goes on without.
            Hooks of others on these blocks see zeros in training steps.
        cache_memory: GiB of CPU memory, per process, for that.
        policy: decides in place of the share: a function of the records of the trainer's first `CKACallback`, whatever
            its reference, oldest first, and of the blocks' names, to how many of them to freeze. Blocks that are frozen
            stay so.
        prefix: of the logged keys: `freeze/num_frozen`, `freeze/flops_saved`, the part of all FLOPs so far, and for
            TensorBoard a text `freeze/layers` of what was frozen when, which the tab CKA shows.

    Raises:
        ValueError: before the first optimizer step: for blocks that do not run one after the other, if nothing would be
            left to train, for a `CKACallback` without intervals, and under strategies other than one device and DDP.

    Example:
        >>> freezing = FreezeConverged(cache="memory")  # for Trainer(callbacks=[freezing])
        >>> freezing.options.share
        1.0
    """

    def __init__(
        self,
        share: float = 1.0,
        num_evaluations: int = 1,
        blocks: Layers | None = None,
        max_frozen: int | None = None,
        monitor: str | None = "val_loss",
        mode: str = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        optimizer_state: OptimizerState = "drop",
        norm_in_eval: bool = True,
        dropout_in_eval: bool = True,
        cache: Cache | None = None,
        cache_memory: float = 4.0,
        policy: Policy | None = None,
        prefix: str = "freeze",
    ) -> None:
        self.options = FreezeOptions(
            share=share,
            num_evaluations=num_evaluations,
            blocks=blocks,
            max_frozen=max_frozen,
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            optimizer_state=optimizer_state,
            norm_in_eval=norm_in_eval,
            dropout_in_eval=dropout_in_eval,
            cache=cache,
            cache_memory=cache_memory,
            policy=policy,
            prefix=prefix,
        )
        self._stage = ""
        self._measurement: CKACallback | None = None
        self._steps: FreezingSteps | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._decision = FreezeDecision(self.options)
        self.savings = Savings()
        self._plan: FreezePlan | None = None

    @property
    def history(self) -> list[FreezeEvent]:
        """What was frozen when: the step, the epoch, how many blocks from then on, which ones came or went, and why."""
        return self._decision.history

    @property
    def num_frozen(self) -> int:
        """How many blocks are frozen, or were at the end of the training."""
        return self._decision.num_frozen

    @property
    def flops_saved(self) -> float:
        """The part of all steps' FLOPs that was saved so far, in [0, 1), if a backward takes twice its forward."""
        return 0.0 if self._plan is None else self.savings.share_of_flops(self._plan)

    # Set-up.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()
        self._stage = stage
        if stage != "fit":
            return
        self._start_anew()
        require_known_strategy(trainer, type(self).__name__)
        new = partial(
            CKACallback, self.options.blocks, PREVIOUS, prefix="cka_previous", stages=["validate"], log_figures=False
        )
        self._measurement = found_or_added(trainer, self, self._can_be_read, new)
        if self.options.policy is None and not getattr(self._measurement.options, "intervals", True):
            raise ValueError(
                "Expected the CKACallback that FreezeConverged reads to have intervals, but it has `intervals=False`: "
                "leave that out, so that it is known how much a block has changed at most."
            )

    def _can_be_read(self, callback: CKACallback) -> bool:
        reference = callback.options.reference
        return self.options.policy is not None or (isinstance(reference, str) and reference == PREVIOUS)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_whole_parameters(pl_module, type(self).__name__)
        blocks = select_layers(pl_module, self.options.blocks)
        if len(blocks) < 2:
            raise ValueError(
                f"Expected {type(pl_module).__name__} to have blocks that run one after the other, to freeze the first "
                f"of them, but found {', '.join(map(repr, blocks))} alone: pass `blocks=` with their names."
            )
        self._steps = FreezingSteps(pl_module, self.options, Path(trainer.default_root_dir), self.savings)
        if self._plan is None:
            self._steps.watch_first(blocks)
            return
        self._steps.follow(self._plan)
        if self.num_frozen:
            self._steps.freeze(trainer, self.num_frozen)
        self._steps.write_events(trainer, self.history)

    # Training steps.

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._steps is not None
        self._steps.begin_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._steps is not None
        decision = self._decision
        # Gradients that were accumulated are applied first.
        if decision.target != decision.num_frozen and batch_idx % trainer.accumulate_grad_batches == 0:
            assert self._plan is not None
            self._steps.freeze(trainer, decision.target)
            at = trainer.global_step, logging_step(trainer), trainer.current_epoch
            decision.carried_out(*at, self._plan.blocks)
            self._steps.write_events(trainer, self.history)
        self._steps.begin(batch)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._steps is not None
        self._steps.have_loss(loss)
        self._plan = self._steps.plan

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._steps is not None
        self._steps.end()

    # Decisions.

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.barebones:
            return
        prefix = self.options.prefix
        log_scalars(pl_module, {f"{prefix}/num_frozen": self.num_frozen, f"{prefix}/flops_saved": self.flops_saved})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._decide(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decide(trainer)  # where there is no validation, but a probe
        assert self._steps is not None
        self._steps.end_epoch()

    def _decide(self, trainer: pl.Trainer) -> None:
        """After an evaluation that was tracked, on all ranks: decide what is to be frozen from the next step on."""
        assert self._measurement is not None
        assert self._steps is not None
        records = training_records(self._measurement)
        if self._plan is None or not self._decision.has_to_look(records):
            return
        decided = self._decision.update(records, self._plan.blocks, self._steps.most, self._monitored(trainer))
        # The monitored value may be each rank's own.
        self._decision.target, self._decision.why = trainer.strategy.broadcast(decided)

    def _monitored(self, trainer: pl.Trainer) -> float | None:
        monitor, logged = self.options.monitor, trainer.callback_metrics
        if monitor is None or monitor in logged:
            return None if monitor is None else float(logged[monitor])
        warn(
            f"FreezeConverged does not find {monitor!r} among the logged values, to see whether it turns, so what is "
            f"frozen stays so. It could monitor {', '.join(map(repr, logged)) or 'none'}; monitor=None for no warning."
        )
        return None

    # The end, good or bad.

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is None or self._steps is None or not trainer.is_global_zero:
            return
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            cache = self._steps.cache
            print_events(self.history, self._plan, self.savings, 0 if cache is None else cache.num_samples)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    # State: primitives alone, so that checkpoints load with `weights_only`.

    @override
    def state_dict(self) -> dict[str, Any]:
        plan = None if self._plan is None else self._plan.state()
        return {"plan": plan, "decision": self._decision.state(), "savings": self.savings.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":
            return  # `test(ckpt_path="best")` after `fit`
        self._plan = None if state_dict["plan"] is None else FreezePlan.of(state_dict["plan"])
        self._decision.load(state_dict["decision"])
        self.savings.load(state_dict["savings"])
