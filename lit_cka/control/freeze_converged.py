"""`FreezeConverged`: a Lightning callback that freezes the first blocks of a network once they have stopped changing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lit_cka.control.activation_store import ActivationStore
from lit_cka.control.convergence import LossWatch, num_converged
from lit_cka.control.data_parallel import rebuild_ddp, require_known_strategy, require_whole_parameters
from lit_cka.control.freeze_options import Cache, FreezeOptions, OptimizerState, Policy
from lit_cka.control.freeze_report import FreezeEvent, log_scalars, print_events
from lit_cka.control.frozen_prefix import FrozenPrefix
from lit_cka.control.measurement import found_or_added, training_records
from lit_cka.control.plan import FreezePlan
from lit_cka.control.savings import Savings
from lit_cka.control.skipping import PrefixCache
from lit_cka.control.step_trace import StepTrace
from lit_cka.features.compiled import is_compiled
from lit_cka.features.layers import Layers, select_layers
from lit_cka.parallel.warning import warn
from lit_cka.samples.batch_rows import rows_of
from lit_cka.tracking.callback import CKACallback

PREVIOUS = "previous"


class FreezeConverged(pl.Callback):
    """Freezes the first blocks of a network once their representations have stopped changing, and saves their backward.

    `Trainer(callbacks=[FreezeConverged()])` is enough: it reads a `CKACallback(reference="previous")` of the trainer, and
    adds one where there is none. After each validation, a block counts as converged if the CKA
    between what it gives now and what it gave at the validation before is close to 1, with its interval, several times
    in a row (`lit_cka.control.convergence.num_converged`). A high CKA with the initial weights alone does not say that:
    a layer that has hardly moved may have just begun to. The blocks before the first that has not converged are
    frozen from the next step on, and with them what runs before them, such as embeddings or a stem (Liu et al. 2021,
    arXiv 2102.01386, freeze prefixes by the norm of gradients, and Wang et al. 2022, arXiv 2201.06227, by a
    similarity of activations). Their gradients are not computed, neither for their weights nor through them.

    What belongs to a block is read off the autograd graph of the first training step: the parameters that what it
    returns depends on, unless something behind it uses them, too (a tied output embedding is trained on).

    Works with automatic and manual optimisation, accumulated gradients (it waits for the optimizer's step), schedulers
    (parameters stay in their groups), adapters such as LoRA, `torch.compile`, and DDP without
    `find_unused_parameters`. A training that is resumed goes on as it was. After `fit`, everything is trainable again.

    Args:
        limit: of the change 1 - CKA between two evaluations, at the upper end of its 95 % interval.
        num_evaluations: how many evaluations in a row a block has to stay below the limit.
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
        policy: decides in place of the limit: a function of the records of the trainer's first `CKACallback`, whatever
            its reference, oldest first, and of the blocks' names, to how many of them to freeze. Blocks that are frozen
            stay so.
        prefix: of the logged keys: `freeze/num_frozen` and `freeze/flops_saved`, the part of all FLOPs so far.

    Attributes:
        history: what was frozen when: a list of `FreezeEvent`.

    Raises:
        ValueError: before the first optimizer step: for blocks that do not run one after the other, if nothing would be
            left to train, for a `CKACallback` without intervals, and under strategies other than one device and DDP.
    """

    def __init__(
        self,
        limit: float = 0.01,
        num_evaluations: int = 2,
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
            limit=limit,
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
        self._measurement: CKACallback | None = None
        self._stage = ""
        self._trace: StepTrace | None = None
        self._prefix: FrozenPrefix | None = None
        self._cache: PrefixCache | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.history: list[FreezeEvent] = []
        self.savings = Savings()
        self._plan: FreezePlan | None = None
        self._watch = LossWatch(self.options.patience, self.options.min_delta, self.options.mode)
        self._num_frozen = self._target = self._most = 0
        self._waits_for_best = False
        self._num_seen = 0  # records
        self._why = ""

    @property
    def num_frozen(self) -> int:
        """How many blocks are frozen, or were at the end of the training."""
        return self._num_frozen

    # Set-up.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
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
                "Expected the CKACallback that FreezeConverged reads to have intervals, but it has "
                "`intervals=False`: leave that out, so that it is known how much a block has changed at most."
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
        if self._plan is not None:
            self._have(trainer, pl_module, self._plan)
            self._freeze(trainer, self._num_frozen)
        else:
            self._trace = StepTrace(pl_module, blocks)

    def _have(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: FreezePlan) -> None:
        """Get ready to freeze by this plan."""
        options = self.options
        self._plan, self._most = plan, plan.most_frozen(options.max_frozen)
        keeps = options.optimizer_state == "keep"
        self._prefix = FrozenPrefix(pl_module, plan, options.norm_in_eval, options.dropout_in_eval, keeps)
        if options.cache is None:
            return
        folder = Path(trainer.default_root_dir) if options.cache == "disk" else None
        new_store = partial(ActivationStore, options.cache_memory * 2**30, folder)
        self._cache = PrefixCache(self._prefix, new_store)
        if is_compiled(pl_module):
            self._cache.switch_off("compiled code does not notice that a block is left out")
        elif plan.recomputes:
            self._cache.switch_off("reentrant checkpointing runs the blocks without gradients, as an evaluation does")
        elif not any(part.can_skip for part in plan.parts[: self._most]):
            self._cache.switch_off(
                "what is behind the blocks needs more than what the last frozen one returns, or they run several times "
                "in a step"
            )

    # Training steps.

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cache is not None:
            self._cache.begin_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trace is not None:
            self._num_samples = rows_of(batch).num_samples or 0
            self._trace.start()
            return
        assert self._prefix is not None
        # Gradients that were accumulated are applied first.
        if self._target != self._num_frozen and batch_idx % trainer.accumulate_grad_batches == 0:
            self._change(trainer)
        self._prefix.hold()
        if self._cache is not None:
            self._cache.begin_step()
        self.savings.begin_step()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._trace is not None and self._trace.has_run:
            trace, self._trace = self._trace, None
            self._have(trainer, pl_module, trace.plan(loss, self._num_samples))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trace is not None:  # the step had no loss
            self._trace.stop()
            return
        num_skipped = 0
        if self._cache is not None:
            num_skipped = self._cache.num_skipped
            self._cache.end_step()
        self.savings.end_step(self._num_frozen, num_skipped)

    def _change(self, trainer: pl.Trainer) -> None:
        """Freeze, or train again, what was decided after the last evaluation."""
        assert self._plan is not None
        before, after = self._num_frozen, self._target
        self._freeze(trainer, after)
        self._watch.num_worse = 0
        if after < before and self._cache is not None:
            self._cache.forget()
        self.history.append(
            FreezeEvent(
                step=trainer.global_step,
                epoch=trainer.current_epoch,
                num_frozen=after,
                blocks=list(self._plan.blocks[min(before, after) : max(before, after)]),
                why=self._why,
            )
        )

    def _freeze(self, trainer: pl.Trainer, num_frozen: int) -> None:
        assert self._prefix is not None
        self._prefix.freeze(num_frozen, trainer.optimizers)
        if num_frozen != 0 or self._num_frozen != 0:
            rebuild_ddp(trainer)
        self._num_frozen = num_frozen

    # Decisions.

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.barebones:
            return
        saved = 0.0 if self._plan is None else self.savings.share_of_flops(self._plan)
        prefix = self.options.prefix
        log_scalars(pl_module, {f"{prefix}/num_frozen": self._num_frozen, f"{prefix}/flops_saved": saved})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._decide(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decide(trainer)  # where there is no validation, but a probe
        if self._cache is not None:
            self._cache.end_epoch()

    def _decide(self, trainer: pl.Trainer) -> None:
        """After an evaluation that was tracked, on all ranks: decide what is to be frozen from the next step on."""
        assert self._measurement is not None
        records = training_records(self._measurement)
        if self._plan is None or len(records) <= self._num_seen:
            return
        self._num_seen = len(records)
        has_turned = self._has_turned(trainer)
        target, why = self._target, self._why
        if has_turned and target:
            target, why, self._waits_for_best = 0, "the loss turned", True
        elif not self._waits_for_best:
            policy = self.options.policy
            count = (
                num_converged(records, self._plan.blocks, self.options.limit, self.options.num_evaluations)
                if policy is None
                else policy(records, self._plan.blocks)
            )
            target, why = max(target, min(count, self._most)), "converged"
        # The monitored value may be each rank's own.
        self._target, self._why = trainer.strategy.broadcast((target, why))

    def _has_turned(self, trainer: pl.Trainer) -> bool:
        monitor = self.options.monitor
        if monitor is None:
            return False
        if monitor not in trainer.callback_metrics:
            warn(
                f"FreezeConverged does not find {monitor!r} among the logged values, to see whether it turns, so what "
                f"is frozen stays frozen. It could monitor {', '.join(map(repr, trainer.callback_metrics)) or 'none'}; "
                "monitor=None for no warning."
            )
            return False
        value = float(trainer.callback_metrics[monitor])
        has_turned = self._watch.update(value)
        self._waits_for_best = self._waits_for_best and value != self._watch.best
        return has_turned

    # The end, good or bad.

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print_events(self.history, self._plan, self.savings, 0 if self._cache is None else self._cache.num_samples)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        """Leave the module as it was: everything trainable, no hook."""
        if self._trace is not None:
            self._trace.stop()
        if self._cache is not None:
            self._cache.end_step()
        if self._prefix is not None:
            self._prefix.release()
        self._trace = self._cache = self._prefix = None

    # State: primitives alone, so that checkpoints load with `weights_only`.

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": None if self._plan is None else self._plan.state(),
            "num_frozen": self._num_frozen,
            "target": self._target,
            "why": self._why,
            "num_seen": self._num_seen,
            "waits_for_best": self._waits_for_best,
            "watch": self._watch.state(),
            "savings": self.savings.state(),
            "history": [dict(event) for event in self.history],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage != "fit":
            return  # `test(ckpt_path="best")` after `fit`
        plan = state_dict["plan"]
        self._plan = None if plan is None else FreezePlan.of(plan)
        self._num_frozen, self._target = state_dict["num_frozen"], state_dict["target"]
        self._why, self._num_seen = state_dict["why"], state_dict["num_seen"]
        self._waits_for_best = state_dict["waits_for_best"]
        self._watch.load(state_dict["watch"])
        self.savings.load(state_dict["savings"])
        self.history = [FreezeEvent(**event) for event in state_dict["history"]]

