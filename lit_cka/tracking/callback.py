"""`CKACallback`: the CKA of every layer against a frozen reference, during any Lightning training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import lightning.pytorch as pl
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from lit_cka.features.given_masks import Mask
from lit_cka.features.layers import Layers
from lit_cka.features.pooling import Pooling
from lit_cka.files import file_name
from lit_cka.reference.recording import CacheDtype
from lit_cka.reference.reference import INITIAL, moves
from lit_cka.tracking.evaluation import TrackedEvaluation, record_of
from lit_cka.tracking.evaluation_loops import is_empty
from lit_cka.tracking.hints import warn_bias, warn_empty, warn_monitors, warn_no_validation, warn_nothing_tracked
from lit_cka.tracking.history import THRESHOLDS, Record, Stage, checked_history, latest_scores
from lit_cka.tracking.intervals import Intervals
from lit_cka.tracking.moving import MovingReference
from lit_cka.tracking.options import TrackingOptions
from lit_cka.tracking.probe import Probe
from lit_cka.tracking.recorder import Recorder
from lit_cka.tracking.report import LoggedFigures, leave_report, log_records, write_report
from lit_cka.tracking.table import print_table
from lit_cka.tracking.tracker import Estimator, LayerScore


class CKACallback(pl.Callback):
    """Tracks how far every layer's representation moves from a frozen reference while a model is trained.

    Attach it and change nothing else: `Trainer(callbacks=[CKACallback()])`. Before the first step the trainer's own
    validation loop runs once, and the pooled features of every layer, taken by forward hooks, are recorded by sample.
    At every validation (and test) those of the live model are compared with them, and the linear CKA over the whole
    set (Kornblith et al. 2019) is logged as `cka/<layer>` and, averaged, as `cka/mean`: to every logger, and for
    `EarlyStopping` and `ModelCheckpoint` to monitor. With several dataloaders the keys end in `/dataloader_idx_<i>`,
    as Lightning's do. The training itself is the same bit for bit as without the callback.

    Args:
        layers: which layers, named as in the LightningModule's `named_modules()`: None for the network's repeated
            blocks, or names, globs (`*` within a dotted segment, `**` across), a compiled regular expression, or a
            callable `(name, module) -> bool`.
        reference: what to compare with. "initial": the weights at the start of `fit`, also after it is resumed from a
            checkpoint; where only `validate` or `test` is called, those of the training that wrote their `ckpt_path`
            if it was tracked, else those before `ckpt_path` is loaded. "adapter-off": a PEFT model without
            its adapters. "previous": the model at the evaluation before, and "best": at the best one so far, by what
            the trainer's `ModelCheckpoint` monitors; the first reference is the initial weights, and tests are not
            tracked. Or a module, the path of a checkpoint (Lightning, safetensors, state dict), or a state dict. A
            module of another architecture, or any reference where the data differ at every pass, runs beside the live
            model.
        pooling: from a layer's output to one vector per sample: "mean" over tokens (as the attention mask says) or
            space, "last" token, "cls" token, "flatten", or a callable. "mean:NCHW" states the layout.
        mask: which tokens count. None for the attention mask that the model is called with, in whatever form. Or the
            name of an entry of the batch or of an argument of the model, or a callable of the step's batch, that is
            nonzero for tokens that count, (samples, tokens).
        estimator: "exact", over all samples at once, or "minibatch", from each batch's unbiased HSIC (Nguyen et al.
            2021), for features too wide for exact statistics.
        debiased: of the exact estimator: use the unbiased HSIC. The plain one is too high for fewer than about 5
            samples per feature.
        intervals: with the exact estimator, give every score a 95 % confidence interval for the population's CKA
            (`lit_cka.functional.cka_interval`), about the debiased estimate, from at most 256 of the samples: in
            `history`, and logged as `cka_low/<layer>` and `cka_high/<layer>`. The samples must be independent.
        effective_ranks: also count the directions that each layer uses (RankMe, about the mean, over the samples that
            the intervals are from): in `history`, and logged as `cka_rank/<layer>`.
        stages: any of "validate" and "test". The validations within `fit` count as "validate".
        dataloaders: indices of the dataloaders to track; None for all.
        every_n_validations: track the first, and then each n-th validation of a `fit`.
        max_batches: of each dataloader, use the first so many batches only.
        cache_memory: GiB of CPU memory, per process, for the recorded features; what is beyond goes into a temporary
            file under the trainer's `default_root_dir`.
        cache_dtype: of the recorded features. "auto": float64 up to 256 MiB, beyond that float32 about the mean (less
            than 1e-7 of a score). Or always "float64"; or "bfloat16", for a quarter of the memory: it is refused, with
            a warning, where it would change a score by more than 1e-4.
        probe: batches to track on, instead of those of validation and test: a dataloader or a list. They go to the
            module's `predict_step`, or to its `forward` (see `lit_cka.tracking.probe.Probe`). Measured at the end of
            every validation or test, or, for a training without a validation loop, of every epoch.
        probe_every_n_steps: measure on the probe after every n optimizer steps instead.
        prefix: of the logged keys. Two callbacks in one trainer need different ones.
        log_figures: draw the layers-by-time heatmap and the curves of all layers for loggers that take them, and at the
            end of `fit` print the table, and write the report to `<log_dir>/<prefix>/`, if there is a logger; MLflow's
            has it as artifacts.
        thresholds: `(untouched, refined)` for the verdict per layer: untouched from the first on, refined from
            the second on, rewritten below. For reading the table only.

    Raises:
        ValueError: before the first training batch, for an unknown layer, an ambiguous layout, a reference of another
            architecture, and other misuse that can be known by then.

    Example:
        >>> callback = CKACallback(layers="model.blocks.*", pooling="cls")
        >>> callback.options.pooling
        'cls'
        >>> trainer = pl.Trainer(callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module, datamodule)  # logs cka/<layer> and cka/mean at each validation  # doctest: +SKIP
        >>> callback.scores  # doctest: +SKIP
        {'model.blocks.0': 0.998, 'model.blocks.1': 0.92}
    """

    def __init__(
        self,
        layers: Layers | None = None,
        reference: Union[str, os.PathLike[str], nn.Module, Mapping[str, Tensor]] = INITIAL,
        pooling: Pooling = "mean",
        mask: Mask | None = None,
        estimator: Estimator = "exact",
        debiased: bool = True,
        intervals: bool = True,
        effective_ranks: bool = False,
        stages: Sequence[Stage] = ("validate", "test"),
        dataloaders: Sequence[int] | None = None,
        every_n_validations: int = 1,
        max_batches: int | None = None,
        cache_memory: float = 4.0,
        cache_dtype: CacheDtype = "auto",
        probe: Iterable[Any] | None = None,
        probe_every_n_steps: int | None = None,
        prefix: str = "cka",
        log_figures: bool = True,
        thresholds: tuple[float, float] = THRESHOLDS,
    ) -> None:
        self.options = TrackingOptions(
            layers=layers,
            reference=reference,
            pooling=pooling,
            mask=mask,
            estimator=estimator,
            debiased=debiased,
            intervals=intervals,
            effective_ranks=effective_ranks,
            stages=stages,
            dataloaders=dataloaders,
            every_n_validations=every_n_validations,
            max_batches=max_batches,
            cache_memory=cache_memory,
            cache_dtype=cache_dtype,
            has_probe=probe is not None,
            probe_every_n_steps=probe_every_n_steps,
            prefix=prefix,
            log_figures=log_figures,
            thresholds=thresholds,
        )
        self.history: list[Record] = []
        self._probe = None if probe is None else Probe(probe)
        self._recorder = Recorder(self, self.options, self._is_tracked)
        self._evaluation: TrackedEvaluation | None = None
        self._is_probe_due = False  # whether the evaluation that runs ends with a measurement on the probe
        self._has_probed = False  # whether it has
        self._is_set_up = False
        self._num_validations = 0
        self._probed_step = 0
        self._stage = ""
        self._hinted = False
        self._has_warned = False  # that there is nothing to track
        self._figures = LoggedFigures(prefix, thresholds)
        has_intervals = intervals and estimator == "exact"
        self._intervals = Intervals(with_changes=not moves(reference)) if has_intervals else None
        self._moving = MovingReference(reference)

    @property
    def scores(self) -> dict[str, float]:
        """The latest CKA of every layer, of the first tracked dataloader; empty before the first evaluation."""
        return latest_scores(self.history)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `cka_history.json`, `cka_history.csv`, `cka_heatmap.png` and `cka_curves.png` to `folder`."""
        write_report(folder, self.history, self.options.thresholds)

    # Set-up: errors come before the first batch.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._finish()
        self._check_prefix(trainer)
        self._stage = stage
        if stage == "fit":
            self._num_validations = 0
            model = self._recorder.model
            if model is not None and model.module is not pl_module:  # another training
                self.history = []
                if self._intervals is not None:
                    self._intervals.forget()
        self._recorder.set_up(trainer, pl_module, stage)

    def _check_prefix(self, trainer: pl.Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        others = [each for each in callbacks if isinstance(each, CKACallback) and each is not self]
        if any(other.options.prefix == self.options.prefix for other in others):
            raise ValueError(
                f"Expected each CKACallback of a trainer to have a `prefix` of its own, but several have "
                f"{self.options.prefix!r}: pass, say, CKACallback(prefix={self.options.prefix + '_2'!r})."
            )
        self._is_set_up = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.options.every_n_validations > 1:
            warn_monitors(trainer, self.options.prefix, self.options.every_n_validations)
        self._figures.restart()
        self._moving.start(trainer)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recorder.prepare(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._probed_step = trainer.global_step
        self._has_warned = False
        self._record(trainer, pl_module)

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the reference recorded before the training, or say that there is nothing to record it on."""
        model = self._recorder.begin(trainer, pl_module)
        if self._probe is not None:
            self._probe.record(trainer, model, self._recorder.start.to_exchange)
        elif "validate" in self.options.stages and trainer.enable_validation:
            self._recorder.before_run(trainer, trainer.fit_loop.epoch_loop.val_loop)
            if is_empty(trainer.fit_loop.epoch_loop.val_loop):
                warn_empty()
                self._has_warned = True
        elif "validate" in self.options.stages:
            warn_no_validation()
            self._has_warned = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder.has_to_begin_anew(trainer, pl_module):
            self._record(trainer, pl_module)
            self._recorder.start.are_live = False

    # Evaluation: the same for validation and test.

    def _is_tracked(self, trainer: pl.Trainer, stage: Stage) -> bool:
        """Whether the evaluation that is about to run is one of those that are asked for."""
        is_due = trainer.state.fn != "fit" or self._num_validations % self.options.every_n_validations == 0
        return stage in self.options.stages and is_due

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "validate")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._recorder.is_recording_due:
            self._num_validations += 1

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "test")

    def _begin(self, trainer: pl.Trainer, stage: Stage) -> None:
        if not self._is_tracked(trainer, stage):
            return
        if self._probe is not None:
            self._is_probe_due = not trainer.sanity_checking and self.options.probe_every_n_steps is None
        elif self._recorder.is_recording_due or not (trainer.sanity_checking or self._recorder.is_left_out):
            self._evaluation = self._recorder.evaluation(trainer, stage)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.begin_batch(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.end_batch(batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "validate")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        if self._evaluation is not None and self._evaluation.records:
            self._evaluation.finish_recording()
        elif self._evaluation is not None:
            self._log(trainer, pl_module, stage, self._evaluation.scores())
        elif self._is_probe_due:
            self._is_probe_due = False
            self._measure(trainer, pl_module, "test" if stage == "test" else "probe")
            self._has_probed = True

    def _log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stage: Stage,
        scores: dict[int, dict[str, LayerScore]],
        *,
        on_step: bool = False,
    ) -> None:
        """Give the scores to the history, the loggers, and whoever monitors them."""
        with_ranks = self.options.effective_ranks
        records = [
            record_of(trainer, stage, number, layers, self._intervals, with_ranks=with_ranks)
            for number, layers in scores.items()
        ]
        for layers in scores.values():
            if not self._hinted and not self.options.uses_unbiased_hsic:
                self._hinted = warn_bias(layers)
        self.history += records
        charted = log_records(trainer, pl_module, records, self.options.prefix, on_step=on_step)
        if self.options.log_figures:
            self._figures.update(trainer, self.history, charted)

    # The probe, in training.

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.options.probe_every_n_steps
        if every is not None and step > self._probed_step and step % every == 0:
            self._probed_step = step
            self._measure(trainer, pl_module, "probe", on_step=True)
            self._adopt(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_due = self.options.probe_every_n_steps is None and not trainer.enable_validation
        if self._probe is not None and is_due:
            self._measure(trainer, pl_module, "probe")
            self._adopt(trainer)

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, *, on_step: bool = False
    ) -> None:
        assert self._probe is not None
        model = self._recorder.prepare(trainer, pl_module)
        self._probe.record(trainer, model, self._recorder.start.to_exchange)
        self._log(trainer, pl_module, stage, {0: self._probe.measure(trainer, model)}, on_step=on_step)

    # The end, good or bad: no hook stays behind.

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_compared = self._has_probed or (self._evaluation is not None and not self._evaluation.records)
        self._has_probed = False
        self._close_evaluation()
        if is_compared:  # now it is known whether it is the best one
            self._adopt(trainer)

    def _adopt(self, trainer: pl.Trainer) -> None:
        """Make the evaluation that has ended the reference, if it is to take its place."""
        if self._recorder.model is not None and self._moving.takes_place(trainer):
            self._recorder.model.tracker.adopt()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_evaluation()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._finish()

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def _finish(self) -> None:
        self._close_evaluation()
        self._recorder.close()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_surprise = "validate" in self.options.stages and not self._has_warned
        folder = trainer.log_dir if trainer.loggers else None  # all ranks are asked for it together
        if is_surprise and not self.history and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn_nothing_tracked()
        elif self.options.log_figures and trainer.is_global_zero:
            self._figures.finish(trainer, self.history)
            model = self._recorder.model
            reference = "" if model is None else model.how_compared
            prefix, thresholds = self.options.prefix, self.options.thresholds
            print_table(
                self.history, thresholds, reference=reference, prefix=prefix, logged_step=self._figures.step
            )  # fmt: skip
            if self.history and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                place = None if folder is None else Path(folder) / file_name(prefix)
                leave_report(place, self.history, thresholds, Console(), trainer.loggers, prefix)

    # State: primitives alone, so that checkpoints load with `weights_only`.

    @property
    @override
    def state_key(self) -> str:
        key = self._generate_state_key(prefix=self.options.prefix)
        # Lightning refuses two of one key, without a word of `prefix`, before `setup` can say more.
        return key if self._is_set_up else f"{key}{id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        history = [dict(record) for record in self.history]
        state = {"history": history, "num_validations": self._num_validations, **self._recorder.start.state()}
        return state if self._intervals is None else {**state, "intervals": self._intervals.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.history and self._stage != "fit":
            return  # `test(ckpt_path="best")` after `fit`: the checkpoint's history is a part of this one
        self.history = checked_history(state_dict.get("history"))
        self._num_validations = state_dict.get("num_validations", 0)
        self._recorder.start.load(state_dict)
        if self._intervals is not None:
            self._intervals.load(state_dict.get("intervals", {}))

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the recording and the initial weights next to the first checkpoint, for all of them to refer to."""
        model, start = self._recorder.model, self._recorder.start
        if self._stage == "fit" and model is not None and not moves(self.options.reference):
            start.write(trainer, model.recording)
            checkpoint["callbacks"][self.state_key].update(start.state())
