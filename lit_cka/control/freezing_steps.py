"""The training steps of a model of which more and more blocks are frozen: `FreezingSteps`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lit_cka.control.activation_store import ActivationStore
from lit_cka.control.data_parallel import rebuild_ddp
from lit_cka.control.freeze_decision import FreezeEvent
from lit_cka.control.freeze_options import FreezeOptions
from lit_cka.control.freeze_report import layer_events
from lit_cka.control.frozen_layers import layers_by_block
from lit_cka.control.frozen_prefix import FrozenPrefix
from lit_cka.control.plan import FreezePlan
from lit_cka.control.savings import Savings
from lit_cka.control.skipping import PrefixCache
from lit_cka.control.step_trace import StepTrace
from lit_cka.features.compiled import is_compiled
from lit_cka.samples.batch_rows import rows_of
from lit_cka.tracking.layer_events import EventsLog


class FreezingSteps:
    """Watches the first step, to know what belongs to each block; then has blocks frozen, and their forward left out.

    Args:
        module: the model.
        options: of the callback.
        folder: where activations on disk go.
        savings: takes the time and the FLOPs of each step.

    Attributes:
        plan: what is frozen with each block; None before the first step.
        most: how many blocks may be frozen.
        layers: by block, those that are frozen with it.
        cache: of activations, if that is asked for.
    """

    def __init__(self, module: pl.LightningModule, options: FreezeOptions, folder: Path, savings: Savings) -> None:
        self._module, self._options, self._folder, self._savings = module, options, folder, savings
        self._trace: StepTrace | None = None
        self._prefix: FrozenPrefix | None = None
        self._num_samples = 0
        self._events_log = EventsLog(options.prefix)
        self.plan: FreezePlan | None = None
        self.most = 0
        self.layers: tuple[tuple[str, ...], ...] = ()
        self.cache: PrefixCache | None = None

    def watch_first(self, blocks: list[str]) -> None:
        """Find out in the next step what belongs to each of these blocks."""
        self._trace = StepTrace(self._module, blocks)

    def follow(self, plan: FreezePlan) -> None:
        """Freeze by this plan from now on.

        Raises:
            ValueError: if there would be nothing left to train.
        """
        options = self._options
        self.plan, self.most = plan, plan.most_frozen(options.max_frozen)
        self.layers = layers_by_block(self._module, plan)
        keeps = options.optimizer_state == "keep"
        self._prefix = FrozenPrefix(self._module, plan, options.norm_in_eval, options.dropout_in_eval, keeps)
        if options.cache is None:
            return
        folder = self._folder if options.cache == "disk" else None
        self.cache = PrefixCache(self._prefix, partial(ActivationStore, options.cache_memory * 2**30, folder))
        if is_compiled(self._module):
            self.cache.switch_off("compiled code does not notice that a block is left out")
        elif not any(part.can_skip for part in plan.parts[: self.most]):
            self.cache.switch_off(
                "what is behind the blocks needs more than what the last frozen one returns, or they run several times "
                "in a step"
            )

    def freeze(self, trainer: pl.Trainer, num_frozen: int) -> None:
        """Have so many blocks frozen, and no more; all ranks call it, between two optimizer steps."""
        assert self._prefix is not None
        is_thawed = num_frozen < self._prefix.num_frozen
        self._prefix.freeze(num_frozen, trainer.optimizers)
        rebuild_ddp(trainer)
        if is_thawed and self.cache is not None:
            self.cache.forget()

    def write_events(self, trainer: pl.Trainer, history: Sequence[FreezeEvent]) -> None:
        """Have TensorBoard's writers note what was frozen when."""
        self._events_log.write(trainer, layer_events(history, self.layers))

    def begin(self, batch: Any) -> None:
        """A step on this batch begins."""
        if self._trace is not None:
            self._num_samples = rows_of(batch).num_samples or 0
            self._trace.start()
            return
        assert self._prefix is not None
        self._prefix.hold()
        if self.cache is not None:
            self.cache.begin_step()
        self._savings.begin_step()

    def have_loss(self, loss: Tensor) -> None:
        """The step has come to its loss.

        Raises:
            ValueError: if it is the first, and blocks did not run one after the other, or there is no other parameter.
        """
        if self._trace is not None and self._trace.has_run:
            trace, self._trace = self._trace, None
            self.follow(trace.plan(loss, self._num_samples))

    def end(self) -> None:
        """The step has ended."""
        if self._trace is not None:  # it had no loss
            self._trace.stop()
            return
        assert self._prefix is not None
        num_skipped = 0
        if self.cache is not None:
            num_skipped = self.cache.num_skipped
            self.cache.end_step()
        self._savings.end_step(self._prefix.num_frozen, num_skipped)

    def begin_epoch(self) -> None:
        """An epoch begins."""
        if self.cache is not None:
            self.cache.begin_epoch()

    def end_epoch(self) -> None:
        """An epoch has ended."""
        if self.cache is not None:
            self.cache.end_epoch()

    def close(self) -> None:
        """Leave the module as it was: everything trainable, no hook."""
        if self._trace is not None:
            self._trace.stop()
        if self.cache is not None:
            self.cache.end_step()
        if self._prefix is not None:
            self._prefix.release()
