"""The live model against its reference, batch by batch: `Tracker`, which knows nothing of Lightning's trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_cka.features.given_masks import Mask
from lit_cka.features.pooling import Pooling
from lit_cka.reference.recorded_dataloader import RecordedDataloader
from lit_cka.reference.recording import Dataloader, Recording
from lit_cka.reference.rounding import MAX_ROUNDING_COST, rounding_cost
from lit_cka.reference.running import RunningReference
from lit_cka.samples.counting import DataRanks
from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.statistics.layer import ExactStatistics, MinibatchStatistics
from lit_cka.statistics.sampled_layers import ReferenceGrams, SampledLayer
from lit_cka.statistics.subsample import Subsample
from lit_cka.tracking.explanations import Explanations
from lit_cka.tracking.pairing import PairedPass
from lit_cka.tracking.step import StepFeatures, WatchedStep

Estimator = Literal["exact", "minibatch"]


class LayerScore(NamedTuple):
    """CKA of one layer, the number of samples `n` behind it, and `d`, the larger of the two feature widths.

    `debiased` is the debiased CKA, and `sampled` tells its error: None if that was not asked for, or can't be told.
    """

    cka: float
    n: int
    d: int
    debiased: float
    sampled: SampledLayer | None


class Tracker:
    """Takes the features of a live model: into a recording, or to compare them with what was recorded.

    Args:
        live: the model in training.
        layer_names: the layers, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.
        recording: where the reference's features are kept.
        running: a reference that runs beside the live model; None if the live model itself was recorded.
        estimator: "exact" (`LinearCKA`) or "minibatch" (`MinibatchCKA`).
        debiased: as for `LinearCKA`.
        mask: which tokens count, by a name in the batch or in the model's call, or by a callable of the step's batch;
            None for the mask that the model is called with.
        with_errors: keep what tells the errors of the exact estimator.
        with_ranks: count the directions that the live model's features use, too, from the same samples.
        upcoming: an empty recording, to be filled with what the live model gives in each pass, which `adopt` then makes
            the reference; None where the reference stays what it is.
    """

    def __init__(
        self,
        live: nn.Module,
        layer_names: list[str],
        pooling: Pooling,
        recording: Recording,
        running: RunningReference | None = None,
        estimator: Estimator = "exact",
        debiased: bool = False,
        mask: Mask | None = None,
        with_errors: bool = False,
        with_ranks: bool = False,
        upcoming: Recording | None = None,
    ) -> None:
        self.layer_names = layer_names
        self.recording = recording
        self.running = running
        self._upcoming = upcoming
        self.can_record = True  # unless the data differ at every pass
        self._estimator = estimator
        self._debiased = debiased
        self._with_ranks = with_ranks
        self._with_errors = with_errors and estimator == "exact"
        self._step = WatchedStep(live, layer_names, pooling, running, mask)
        self._passes: list[PairedPass] = []
        self._references: dict[Dataloader, ReferenceGrams] = {}
        self._stage = ""
        self._records = False  # whether this pass is the reference's
        self._dataloader = 0
        self._ranks = DataRanks(0, 1, None, torch.device("cpu"))
        self._ran_once = False
        self._explanations = Explanations()

    def open(self, stage: str, num_dataloaders: int, ranks: DataRanks, *, record: bool = False) -> None:
        """Start anew for an evaluation over `num_dataloaders` sets: empty statistics, hooks in place.

        Args:
            stage: what the dataloaders belong to.
            num_dataloaders: how many there are.
            ranks: the processes that hold different samples.
            record: take the features as the reference's.
        """
        self.close()
        self._stage, self._ranks, self._records = stage, ranks, record
        self._passes = []
        for number in range(num_dataloaders):
            if record:
                self.recording.start(Dataloader(stage, number))
            elif self._upcoming is not None:
                self._upcoming.start(Dataloader(stage, number))
            statistics = {name: self._new() for name in self.layer_names}
            subsamples = {name: Subsample() for name in self.layer_names} if self._with_errors else None
            self._passes.append(PairedPass(statistics, self.recorded(number), subsamples))
        self._step.open(ranks.replicas)

    def _new(self) -> ExactStatistics | MinibatchStatistics:
        return MinibatchStatistics() if self._estimator == "minibatch" else ExactStatistics()

    def close(self) -> None:
        """Remove all hooks from the live model and the reference. The statistics stay."""
        self._step.close()

    def begin(self, dataloader: int, batch: Any, num_samples: int | None = None) -> None:
        """Watch the step on a batch of this dataloader, of so many samples, if that is known."""
        self._dataloader = dataloader
        runs_reference = self._records or not self.can_record
        self._step.begin(batch, num_samples, runs_reference=runs_reference, first=not self._ran_once)

    def alone(self) -> AbstractContextManager[None]:
        """For a step that is for this tracker only, whoever else watches the model."""
        return self._step.alone()

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Meanwhile, a step shows what the reference gives; it is in a recording pass anyway."""
        before, self._records = self._records, True
        try:
            yield
        finally:
            self._records = before

    def of_reference(self, shown: StepFeatures) -> dict[str, Tensor]:
        """Return the reference's features, of what a step showed that it took part in."""
        usable = {name: value for name, value in shown.live.items() if name not in shown.problems}
        return usable if self.running is None else {name: shown.reference[name] for name in usable}

    def take(self) -> StepFeatures:
        """End the step since `begin`, and return what it showed."""
        return self._step.take()

    def record(self, samples: BatchSamples, shown: StepFeatures) -> None:
        """Record what `take` returned for these samples.

        Raises:
            ValueError: as `compare` does.
        """
        self._report(shown.problems, self._keep(self.recording, samples, self.of_reference(shown)))

    def _keep(self, recording: Recording, samples: BatchSamples, features: Mapping[str, Tensor]) -> dict[str, str]:
        dataloader = Dataloader(self._stage, self._dataloader)
        problems = recording.add(dataloader, samples, features)
        recording.dataloaders[dataloader].note_passed(samples, str(self._step.passed))
        return problems

    def adopt(self) -> None:
        """Make what the live model gave in the pass that has ended the reference; all ranks call it."""
        if self._upcoming is not None:
            for dataloader, recorded in self._upcoming.dataloaders.items():
                if len(self._passes) > dataloader.number and dataloader.stage == self._stage:
                    self._conclude(recorded)
                    self.recording.dataloaders[dataloader] = recorded
            self._upcoming.dataloaders.clear()

    def conclude_recording(self) -> None:
        """Say what is wrong with what was recorded, and keep it in the type that was asked for; all ranks call it."""
        if not self.can_record:  # it was a trial
            return
        for dataloader, recorded in self.recording.dataloaders.items():
            if dataloader.stage != self._stage:
                continue
            rank_zero_info(
                f"CKA: recorded the reference's features of {len(recorded)} samples"
                f"{' that this rank has' if self._ranks.size > 1 else ''} of {dataloader.stage} dataloader "
                f"{dataloader.number} in {len(self.layer_names)} layers ({recorded.nbytes / 2**20:.1f} MiB)."
            )
            self._conclude(recorded)

    def _conclude(self, recorded: RecordedDataloader) -> None:
        recorded.is_complete = True
        self._explanations.of_recording(recorded)
        if self.recording.dtype == "bfloat16":
            cost = rounding_cost(recorded.stores.values(), torch.bfloat16, self._ranks.device, self._ranks.group)
            if cost <= MAX_ROUNDING_COST:
                recorded.round_to(torch.bfloat16)
            else:
                self._explanations.of_rounding(cost)

    def needs_content(self, dataloader: int, samples: BatchSamples) -> bool:
        """Whether samples have to be known by what the batch holds of them: to be found in other datasets, too."""
        recorded = self.recorded(dataloader)
        return self._records or (recorded is not None and not recorded.knows(samples))

    def looks_at_content(self, batch_idx: int, device: torch.device) -> bool:
        """Whether it is to be seen if a batch has changed: on an accelerator, it would have to be copied back for it.

        There, the first one of a pass tells, and then all are looked at.
        """
        return batch_idx == 0 or device.type == "cpu" or any(paired.num_changed for paired in self._passes)

    def has_changed(self, dataloader: int, samples: BatchSamples) -> bool:
        """Whether a batch of recorded samples is known not to be what it was then; in a recording, note what it is.

        Args:
            dataloader: its number.
            samples: of the batch.
        """
        recorded = self.recorded(dataloader)
        if recorded is None or samples.content is None:
            return False
        if self._records:
            recorded.note_content(samples)
            return False
        if not recorded.has_other_content(samples):
            return False
        self._passes[dataloader].num_changed += len(samples)
        return True

    def recorded(self, dataloader: int) -> RecordedDataloader | None:
        """What was recorded of a dataloader of this stage, and is compared with; None if there is nothing."""
        return self.recording.dataloaders.get(Dataloader(self._stage, dataloader)) if self.can_record else None

    def compare(self, samples: BatchSamples) -> None:
        """Add what the step since `begin` showed to the statistics of its dataloader.

        Raises:
            ValueError: in the first step, if a layer did not run once with usable output. Later, such a layer skips
                the batch, with one warning: a training is not ended for it.
        """
        shown = self.take()
        usable = {name: value for name, value in shown.live.items() if name not in shown.problems}
        paired = self._passes[self._dataloader]
        recorded = self.recorded(self._dataloader)
        if recorded is not None and recorded.was_passed_otherwise(samples, str(self._step.passed)):
            paired.num_passed_otherwise += len(samples)
            return
        if self._upcoming is not None:
            if samples.content is not None:
                self._upcoming.dataloaders[Dataloader(self._stage, self._dataloader)].note_content(samples)
            self._keep(self._upcoming, samples, usable)
        self._report(shown.problems, paired.add(samples, usable, shown.reference))
        if paired.has_small_batches:
            self._explanations.once(
                "", "small", "Batches of fewer than 4 samples are left out of the minibatch estimator."
            )

    def _report(self, problems: dict[str, str], found: dict[str, str]) -> None:
        problems = {**problems, **{name: f"Layer {name!r} can't be used: {text}" for name, text in found.items()}}
        for name in self.layer_names:
            if name in problems and not self._ran_once:
                raise ValueError(problems[name])
            if name in problems:
                self._explanations.once(name, "skipped", f"{problems[name]} This batch is left out for the layer.")
        self._ran_once = True

    def scores(self, dataloader: int) -> dict[str, LayerScore]:
        """Return the CKA of every layer over all batches since `open`, of all ranks; NaN with a warning if undefined.

        Every rank has to call it.

        Args:
            dataloader: its number.
        """
        paired = self._passes[dataloader]
        layers = paired.scores(self._ranks, debiased=self._debiased)
        references = self._references.setdefault(Dataloader(self._stage, dataloader), ReferenceGrams())
        sampled = paired.sampled(self._ranks, references, with_ranks=self._with_ranks)
        self._explanations.of_repeated(f"{self._stage} dataloader {dataloader}", sampled)
        is_undefined = not any(score.n for score in layers.values())
        where = f"{self._stage} dataloader {dataloader}"
        is_explained = self._explanations.of_missing(where, paired, is_undefined=is_undefined)
        scores = {}
        for name, score in layers.items():
            if score.cka != score.cka and (score.n or not is_explained):
                debiased = self._debiased or self._estimator != "exact"
                text = f"CKA of layer {name!r} is undefined (NaN): {score.why_undefined(debiased=debiased)}."
                self._explanations.once(name, "nan", text)
            width = paired.widths.get(name, 0)
            scores[name] = LayerScore(score.cka, score.n, width, score.debiased, sampled.get(name))
        return scores
