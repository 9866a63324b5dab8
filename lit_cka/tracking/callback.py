"""`CKACallback`: the CKA of every layer against a frozen reference, during any Lightning training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from lit_cka.features.layers import Layers, select_layers
from lit_cka.features.pooling import Pooling
from lit_cka.reference.cache import CacheDtype, ReferenceCache
from lit_cka.reference.initial import InitialWeights
from lit_cka.reference.reference import INITIAL, Reference, ReferenceLike, make_reference
from lit_cka.tracking.dataloaders import num_first_samples, tracked_dataloaders
from lit_cka.tracking.hints import warn_bias, warn_monitors, warn_nothing_tracked
from lit_cka.tracking.history import Record, Stage, latest_scores
from lit_cka.tracking.options import TrackingOptions
from lit_cka.tracking.probe import Probe
from lit_cka.tracking.report import LoggedFigures, log_records, print_table, write_report
from lit_cka.tracking.tracker import Estimator, LayerScore, Tracker


class CKACallback(pl.Callback):
    """Tracks how far every layer's representation moves from a frozen reference while a model is trained.

    Attach it and change nothing else: `Trainer(callbacks=[CKACallback()])`. During validation (and test) the pooled
    features of every layer are taken by forward hooks, the reference runs on the same inputs, and their linear CKA
    over the whole set (Kornblith et al. 2019) is logged as `cka/<layer>` and, averaged, as `cka/mean`: to every
    logger, and for `EarlyStopping` and `ModelCheckpoint` to monitor. With several dataloaders the keys end in
    `/dataloader_idx_<i>`, as Lightning's do. The training itself is the same bit for bit as without the callback.

    Args:
        layers: which layers, named as in the LightningModule's `named_modules()`: None for the network's repeated
            blocks, or names, globs (`*` within a dotted segment, `**` across), a compiled regular expression, or a
            callable `(name, module) -> bool`.
        reference: what to compare with. "initial": the weights at the start of `fit`, also after it is resumed from a
            checkpoint; where only `validate` or `test` is called, those of the training that wrote their `ckpt_path`
            if it was tracked, else those before `ckpt_path` is loaded. "adapter-off": a PEFT model without
            its adapters, which takes no second model. Or a module, the path of a checkpoint (Lightning, safetensors,
            state dict), or a state dict.
        pooling: from a layer's output to one vector per sample: "mean" over tokens (as the attention mask says) or
            space, "last" token, "cls" token, "flatten", or a callable. "mean:NCHW" states the layout.
        estimator: "exact", over all samples at once, or "minibatch", from each batch's unbiased HSIC (Nguyen et al.
            2021), for features too wide for exact statistics.
        debiased: of the exact estimator: use the unbiased HSIC, for fewer than about 5 samples per feature.
        stages: any of "validate" and "test". The validations within `fit` count as "validate".
        dataloaders: indices of the dataloaders to track; None for all.
        every_n_validations: track the first, and then each n-th validation of a `fit`.
        max_batches: of each dataloader, use the first so many batches only.
        cache_memory: GiB of CPU memory, per process, for the reference's features. The reference runs on a batch
            once, as long as they fit and the batch stays the same. 0 to run it every time.
        cache_dtype: "float64", or "bfloat16" to fit four times as much: it is refused, with a warning, where it would
            change a score by more than 1e-4.
        probe: batches to track on, instead of those of validation and test: a dataloader or a list. They go to the
            module's `predict_step`, or to its `forward` (see `lit_cka.tracking.probe.Probe`). Measured at the end of
            every validation or test, or, for a training without a validation loop, of every epoch.
        probe_every_n_steps: measure on the probe after every n optimizer steps instead.
        prefix: of the logged keys. Two callbacks in one trainer need different ones.
        log_figures: draw the layers-by-time heatmap and the chart of all layers for loggers that take them, and print
            the table at the end of `fit`.
        thresholds: `(untouched, refined)` for the verdict per layer: untouched from the first on, refined from
            the second on, rewritten below. For reading the table only.

    Raises:
        ValueError: before the first training batch, for an unknown layer, an ambiguous layout, a reference of another
            architecture, and other misuse that can be known by then.
    """

    def __init__(
        self,
        layers: Layers | None = None,
        reference: Union[str, os.PathLike[str], nn.Module, Mapping[str, Tensor]] = INITIAL,
        pooling: Pooling = "mean",
        estimator: Estimator = "exact",
        debiased: bool = False,
        stages: Sequence[Stage] = ("validate", "test"),
        dataloaders: Sequence[int] | None = None,
        every_n_validations: int = 1,
        max_batches: int | None = None,
        cache_memory: float = 4.0,
        cache_dtype: CacheDtype = "float64",
        probe: Iterable[Any] | None = None,
        probe_every_n_steps: int | None = None,
        prefix: str = "cka",
        log_figures: bool = True,
        thresholds: tuple[float, float] = (0.99, 0.9),
    ) -> None:
        self.options = TrackingOptions(
            layers=layers,
            reference=reference,
            pooling=pooling,
            estimator=estimator,
            debiased=debiased,
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
        self._initial_weights = InitialWeights()
        self._tracker: Tracker | None = None
        self._tracked: list[int] = []  # dataloaders of the evaluation that runs; empty while none is tracked
        self._measures_probe = False  # whether the evaluation that runs ends with a measurement on the probe
        self._num_validations = 0
        self._probed_step = 0
        self._fitted = False
        self._stage = ""
        self._hinted = False
        self._figures = LoggedFigures(prefix)

    @property
    def scores(self) -> dict[str, float]:
        """The latest CKA of every layer, of the first tracked dataloader; empty before the first evaluation."""
        return latest_scores(self.history)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `cka_history.json`, `cka_history.csv` and `cka_heatmap.png` to `folder`."""
        write_report(folder, self.history, self.options.thresholds)

    # Set-up: the reference is taken before anything changes the weights, errors come before the first batch.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":  # what is to be resumed is loaded after this
            self._num_validations = 0
            self._initial_weights.start_fit()
        if self._tracker is not None and self._tracker.live is not pl_module:
            if stage == "fit":  # a new training
                self._tracker, self._fitted, self.history = None, False, []
                self._initial_weights.forget()
            else:  # say, the best checkpoint loaded into another module: compare it with what the training began from
                self._prepare(pl_module, self._tracker.reference.of(pl_module))
        is_built = not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
        if stage in self.options.stages and self._tracker is None and is_built:
            self._prepare(pl_module, self.options.reference)  # here, since `ckpt_path` is loaded later

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.options.every_n_validations > 1:
            warn_monitors(trainer, self.options.prefix, self.options.every_n_validations)
        if self._initial_weights.are_of_another_training():
            self._fitted = False
        if not self._fitted:
            self._prepare_loaded(trainer, pl_module)
            self._fitted = True
        self._initial_weights.forget()  # this fit's checkpoints may be elsewhere
        self._figures.restart()

    def _prepare_loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare when the weights of a checkpoint may have been loaded: the reference is the one of its training."""
        reference: ReferenceLike = self.options.reference
        if reference == INITIAL and self._initial_weights.in_checkpoint is not None:
            reference = self._initial_weights.take(trainer, pl_module)
        elif reference == INITIAL:
            self._initial_weights.require_in_module(trainer)
        self._prepare(pl_module, reference)

    def _prepare(self, pl_module: pl.LightningModule, reference: ReferenceLike | Reference) -> None:
        options = self.options
        layer_names = select_layers(pl_module, options.layers)
        if not isinstance(reference, Reference):
            reference = make_reference(pl_module, reference, layer_names, options.pooling)
        cache = reference.cache or ReferenceCache(options.cache_memory * 2**30, options.cache_dtype)
        self._tracker = Tracker(
            pl_module, reference, layer_names, options.pooling, options.estimator, options.debiased, cache
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._probed_step = trainer.global_step
        if self._probe is not None:
            assert self._tracker is not None
            self._probe.run(trainer, pl_module, self._tracker, rehearsal=True)
        elif self._tracker is not None and trainer.val_dataloaders is not None and "validate" in self.options.stages:
            self._which_dataloaders(trainer, "validate")  # also where there was no sanity check

    def _which_dataloaders(self, trainer: pl.Trainer, stage: Stage) -> tuple[list[int], int]:
        needed = 4 if self.options.uses_unbiased_hsic else 2
        return tracked_dataloaders(trainer, stage, self.options.dataloaders, needed)

    # The probe, in training.

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.options.probe_every_n_steps
        if every is not None and step > self._probed_step and step % every == 0:
            self._probed_step = step
            self._measure(trainer, pl_module, "probe", on_step=True)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._probe is not None and self.options.probe_every_n_steps is None and not trainer.enable_validation:
            self._measure(trainer, pl_module, "probe")

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, *, on_step: bool = False
    ) -> None:
        assert self._probe is not None
        assert self._tracker is not None
        self._probe.run(trainer, pl_module, self._tracker)
        self._tracked = [0]
        self._conclude(trainer, pl_module, stage, on_step=on_step)
        self._tracked = []

    # Evaluation: the same for validation and test.

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._num_validations += 1
            if (self._num_validations - 1) % self.options.every_n_validations:
                return
        self._begin(trainer, pl_module, "validate")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, "test")

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        if stage not in self.options.stages:
            return
        # `validate` or `test` on its own: of a tracked training's checkpoint, or of a model built in `configure_model`.
        if self._tracker is None or (self._initial_weights.in_checkpoint is not None and not self._fitted):
            self._prepare_loaded(trainer, pl_module)
        assert self._tracker is not None
        if self._probe is not None:
            self._measures_probe = not trainer.sanity_checking and self.options.probe_every_n_steps is None
            return
        self._tracked, total = self._which_dataloaders(trainer, stage)
        self._tracker.open(stage, total, pl_module.device)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._is_tracked(batch_idx, dataloader_idx):
            assert self._tracker is not None
            self._tracker.begin(dataloader_idx, batch_idx, rehearsal=trainer.sanity_checking)

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
        if self._is_tracked(batch_idx, dataloader_idx):
            assert self._tracker is not None
            stage: Stage = "test" if trainer.testing else "validate"
            self._tracker.end(num_first_samples(trainer, stage, dataloader_idx, batch_idx))

    def _is_tracked(self, batch_idx: int, dataloader_idx: int) -> bool:
        return dataloader_idx in self._tracked and (
            self.options.max_batches is None or batch_idx < self.options.max_batches
        )

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "validate")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        if self._measures_probe:
            self._measures_probe = False
            self._measure(trainer, pl_module, "test" if stage == "test" else "probe")
        elif self._tracked and not trainer.sanity_checking:
            self._conclude(trainer, pl_module, stage)

    def _conclude(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, *, on_step: bool = False
    ) -> None:
        """Compute the scores, and give them to the history, the loggers, and whoever monitors them."""
        assert self._tracker is not None
        records = []
        for dataloader in self._tracked:
            layers = self._tracker.scores(dataloader)
            self._hint_at_bias(layers)
            records.append(
                Record(
                    step=trainer.global_step,
                    epoch=trainer.current_epoch,
                    stage=stage,
                    dataloader=dataloader,
                    n=min(layer.n for layer in layers.values()),
                    scores={name: layer.cka for name, layer in layers.items()},
                )
            )
        self.history += records
        charted = log_records(trainer, pl_module, records, self.options.prefix, on_step=on_step)
        if self.options.log_figures:
            self._figures.update(trainer, self.history, charted)

    def _hint_at_bias(self, layers: dict[str, LayerScore]) -> None:
        if not self._hinted and not self.options.uses_unbiased_hsic:
            self._hinted = warn_bias(layers)

    # The end, good or bad: no hook stays behind.

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._finish()

    def _finish(self) -> None:
        self._tracked, self._measures_probe = [], False
        if self._tracker is not None:
            self._tracker.close()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "validate" in self.options.stages and not self.history and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn_nothing_tracked()
        elif self.options.log_figures and trainer.is_global_zero:
            self._figures.finish(trainer, self.history)
            print_table(self.history, self.options.thresholds)

    # State: primitives alone, so that checkpoints load with `weights_only`.

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.options.prefix)

    @override
    def state_dict(self) -> dict[str, Any]:
        history = [dict(record) for record in self.history]
        return {"history": history, "num_validations": self._num_validations, **self._initial_weights.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.history and self._stage != "fit":
            return  # `test(ckpt_path="best")` after `fit`: the checkpoint's history is a part of the own one
        self.history = [cast(Record, dict(record)) for record in state_dict["history"]]
        self._num_validations = state_dict.get("num_validations", 0)
        self._initial_weights.load(state_dict)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the initial weights next to the first checkpoint, for all of them to refer to."""
        if self.options.reference == INITIAL and self._fitted and self._tracker is not None:
            self._initial_weights.write(trainer, self._tracker.reference.module)
            checkpoint["callbacks"][self.state_key].update(self._initial_weights.state())
