"""`DriftBudget`: a Lightning callback that acts when layers drift too far on data that are to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lit_cka.control.data_parallel import require_own_weights, require_whole_parameters
from lit_cka.control.drift import DriftEvent, drift_events, layers_beyond
from lit_cka.control.freeze_report import log_scalars
from lit_cka.control.measurement import found_or_added, training_records, warn_of_few_samples
from lit_cka.control.slowed_layers import SlowedLayers
from lit_cka.features.layers import Layers, named_layers
from lit_cka.features.lightning_private import logging_step
from lit_cka.functional.edits import wise_ft
from lit_cka.tracking.callback import CKACallback
from lit_cka.tracking.layer_events import EventsLog

Action: TypeAlias = Literal["stop", "slow", "roll_back"]
Edit: TypeAlias = Callable[[Tensor, Tensor], Tensor]


_PREFIX = "drift"


class DriftBudget(pl.Callback):
    """Stops the training, slows layers down, or rolls them back, when they drift too far on data that are to be kept.

    `Trainer(callbacks=[DriftBudget(0.2, probe=old_batches)])`: after each validation (each epoch, without one) the CKA
    of every layer with the initial weights is measured on these batches, and a layer is beyond its budget if 1 - CKA
    is above it with the whole 95 % interval. The batches are of the old task, or of whatever the model should go on to
    represent as it did; labels are not needed. It reads the trainer's `CKACallback(probe=...)` with the initial weights
    as its reference, if there is one, and adds one for its own `probe` otherwise.

    Args:
        budget: the drift 1 - CKA that is allowed to each layer.
        action: "stop" ends the training. "slow" multiplies the learning rate of the layers that are beyond it, each
            time that they are. "roll_back" puts their weights nearer to where they began, by `edit`.
        probe: batches as for `CKACallback`; None if the trainer has a `CKACallback` with a probe.
        layers: the layers as for `CKACallback`, where one is added; None for the repeated blocks.
        factor: of the learning rate, for "slow".
        edit: for "roll_back", a function of a weight's initial and present values, such as those of
            `lit_cka.functional.edits`; None to go back half of the way.
        prefix: of the logged key `drift/num_beyond`, how many layers were beyond it in the measurement before, and of a
            text for TensorBoard, `drift/layers`, of what was done when, which the tab CKA shows. Several budgets in a
            trainer, such as one for each of two old tasks, need one each.

    Attributes:
        history: what was done when: a list of `DriftEvent`.

    Raises:
        ValueError: before the training, if there are no batches to measure on, weights to roll back are sharded, or
            layers to slow down have none to themselves, as with DeepSpeed. DDP does all that one device does, FSDP and
            `ModelParallelStrategy` slow and stop.

    Example:
        >>> keeping = DriftBudget(0.1, "slow", probe=[torch.zeros(8, 3)])  # for Trainer(callbacks=[keeping])
        >>> keeping.budget, keeping.action
        (0.1, 'slow')
    """

    def __init__(
        self,
        budget: float = 0.2,
        action: Action = "stop",
        probe: Iterable[Any] | None = None,
        layers: Layers | None = None,
        factor: float = 0.1,
        edit: Edit | None = None,
        prefix: str = _PREFIX,
    ) -> None:
        if not 0 < budget < 1:
            raise ValueError(f"Expected `budget`, of the drift 1 - CKA, to be between 0 and 1, but got {budget}.")
        if action not in ("stop", "slow", "roll_back"):
            raise ValueError(f"Expected `action` to be one of 'stop', 'slow', 'roll_back', but got {action!r}.")
        if not 0 <= factor < 1:
            raise ValueError(f"Expected `factor`, of the learning rate, to be from 0 to below 1, but got {factor}.")
        self.budget, self.action, self.prefix = budget, action, prefix
        self._probe, self._layers, self._factor = probe, layers, factor
        self._edit: Edit = partial(wise_ft, alpha=0.5) if edit is None else edit
        self._measurement: CKACallback | None = None
        self._stage = ""
        self._start_anew()

    def _start_anew(self) -> None:
        self.history: list[DriftEvent] = []
        self._slowed = SlowedLayers()
        self._events_log = EventsLog(self.prefix)
        self._initial: dict[str, Tensor] = {}
        self._num_seen = self._num_beyond = 0  # records; layers in the last one

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if stage != "fit":
            return
        self._start_anew()
        if self.action != "stop":
            require_own_weights(trainer, f"DriftBudget(action={self.action!r})", "action='stop'")
        self._measurement = found_or_added(trainer, self, self._can_be_read, self._new_measurement)

    def _can_be_read(self, callback: CKACallback) -> bool:
        options = callback.options
        is_initial = isinstance(options.reference, str) and options.reference == "initial"
        return self._probe is None and options.has_probe and is_initial

    def _new_measurement(self) -> CKACallback:
        if self._probe is None:
            raise ValueError(
                "Expected `probe`, batches on which layers should stay as they are, since no CKACallback of the "
                "trainer has some, with the initial weights as its reference: pass DriftBudget(probe=old_batches)."
            )
        prefix = "cka_kept" if self.prefix == _PREFIX else f"cka_kept_{self.prefix}"
        return CKACallback(self._layers, probe=self._probe, prefix=prefix, log_figures=False)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._events_log.write(trainer, drift_events(self.history, self._factor))  # of a training that goes on
        if self.action != "roll_back":
            return
        require_whole_parameters(pl_module, type(self).__name__)
        if not self._initial:
            self._initial = {name: value.detach().cpu().clone() for name, value in pl_module.named_parameters()}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._slowed.before_step(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._slowed.after_step()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.barebones:
            return
        log_scalars(pl_module, {f"{self.prefix}/num_beyond": self._num_beyond})

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a measurement, on all ranks: act, if layers have drifted too far."""
        assert self._measurement is not None
        records = training_records(self._measurement)
        if len(records) <= self._num_seen:
            return
        self._num_seen = len(records)
        record: Any = records[-1]
        warn_of_few_samples(record, type(self).__name__)
        layers = trainer.strategy.broadcast(layers_beyond(record, self.budget))
        self._num_beyond = len(layers)
        if not layers:
            return
        if self.action == "stop":
            trainer.should_stop = True
        elif self.action == "slow":
            self._slowed.slow(layers, self._factor)
        else:
            self._roll_back(pl_module, layers)
        self.history.append(
            DriftEvent(
                step=trainer.global_step,
                logged_step=logging_step(trainer),
                epoch=trainer.current_epoch,
                action=self.action,
                layers=layers,
                cka=[float(record["high"][layer]) for layer in layers],
            )
        )
        self._events_log.write(trainer, drift_events(self.history, self._factor))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._events_log.write(trainer, drift_events(self.history, self._factor), is_last=True)

    @torch.no_grad()
    def _roll_back(self, module: nn.Module, layers: list[str]) -> None:
        modules = named_layers(module)
        inside = {id(parameter) for layer in layers for parameter in modules[layer].parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) in inside:
                parameter.copy_(self._edit(self._initial[name].to(parameter.device), parameter.detach().clone()))

    # State: tensors and primitives alone, so that checkpoints load with `weights_only`.

    @property
    @override
    def state_key(self) -> str:
        """Under which checkpoints have the state: of several, by the prefix."""
        return super().state_key if self.prefix == _PREFIX else self._generate_state_key(prefix=self.prefix)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [dict(event) for event in self.history],
            "factors": dict(self._slowed.factors),
            "initial": dict(self._initial),
            "num_seen": self._num_seen,
            "num_beyond": self._num_beyond,
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._stage != "fit":
            return  # `test(ckpt_path="best")` after `fit`
        self.history = [cast(DriftEvent, dict(event)) for event in state_dict["history"]]
        self._slowed.factors = dict(state_dict["factors"])
        self._initial = dict(state_dict["initial"])
        self._num_seen, self._num_beyond = state_dict["num_seen"], state_dict["num_beyond"]
