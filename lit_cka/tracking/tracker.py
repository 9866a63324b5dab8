"""The live model against its reference, batch by batch: `Tracker`, which knows nothing of Lightning's trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal, NamedTuple, Union

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_cka.features.compiled import Uncompiled, is_compiled
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.pooling import Pooling
from lit_cka.reference.cache import Batch, ReferenceCache
from lit_cka.reference.reference import Reference
from lit_cka.reference.rounding import RoundingJudge
from lit_cka.tracking.statistics import ExactStatistics, MinibatchStatistics, Recall, ReferenceSums, Score

Estimator = Literal["exact", "minibatch"]
# Wider features would need more memory for their statistics than the models that are tracked.
_MAX_STATE_BYTES = 8 * 2**30
_MAX_ROUNDING_COST = 1e-4
_Statistics = Union[ExactStatistics, MinibatchStatistics]


class LayerScore(NamedTuple):
    """CKA of one layer, the number of samples `n` behind it, and `d`, the larger of the two feature widths."""

    cka: float
    n: int
    d: int


class Tracker:
    """Pairs the features of a live model with its reference's and accumulates the CKA of every layer.

    Args:
        live: the model in training.
        reference: what to compare it with.
        layer_names: the layers, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.
        estimator: "exact" (`LinearCKA`) or "minibatch" (`MinibatchCKA`).
        debiased: as for `LinearCKA`.
        cache: for the reference's features; None for none.
    """

    def __init__(
        self,
        live: nn.Module,
        reference: Reference,
        layer_names: list[str],
        pooling: Pooling,
        estimator: Estimator = "exact",
        debiased: bool = False,
        cache: ReferenceCache | None = None,
    ) -> None:
        self.reference = reference
        self._cache = reference.cache = cache or reference.cache or ReferenceCache(0)
        self.layer_names = layer_names
        self.live = live
        self._estimator = estimator
        self._debiased = debiased
        self._extractor = FeatureExtractor(
            live, layer_names, pooling, on_call=reference.on_call, on_return=reference.on_return
        )
        self._hooks = ExitStack()
        self._has_compiled = False
        self._uncompiled = Uncompiled()
        self._statistics: list[dict[str, _Statistics]] = []
        self._judges: list[dict[str, RoundingJudge]] = []  # empty where rounding has been judged
        self._known: dict[tuple[str, int], dict[str, ReferenceSums]] = {}  # by dataloader and layer
        self._checked: set[tuple[str, int]] = set()  # dataloaders whose rounded features have been judged
        self._stage = ""
        self._batch: Batch
        self._device = torch.device("cpu")
        self._widths: dict[str, int] = {}
        self._ran_once = False
        self._warned: set[tuple[str, str]] = set()

    def open(self, stage: str, num_dataloaders: int, device: torch.device) -> None:
        """Start anew for an evaluation over `num_dataloaders` sets: empty statistics on `device`, hooks in place."""
        self.close()
        self._stage, self._device = stage, device
        self._cache.forget_changing()
        # Compiled code does not notice hooks that come and go.
        self._has_compiled = is_compiled(self.live) or is_compiled(self.reference.module)
        self._statistics, self._judges = [], []
        for dataloader in range(num_dataloaders):
            known = self._known.get((stage, dataloader), {})
            self._statistics.append({name: self._new(known.get(name)) for name in self.layer_names})
            judge = self._cache.rounds and (stage, dataloader) not in self._checked
            self._judges.append({name: RoundingJudge() for name in self.layer_names} if judge else {})
            if judge:
                self._cache.forget(stage, dataloader)  # of a pass that did not end
        if not self._has_compiled:
            self._hooks.enter_context(self._extractor)
        self._extractor.enabled = False

    def _new(self, known: ReferenceSums | None) -> _Statistics:
        return MinibatchStatistics() if self._estimator == "minibatch" else ExactStatistics(known)

    def close(self) -> None:
        """Remove all hooks from the live model and the reference. The statistics stay."""
        self._uncompiled.stop()
        self._hooks.close()
        self.reference.close()

    def begin(self, dataloader: int, index: int, *, rehearsal: bool = False) -> None:
        """Watch the step on this batch; in a rehearsal nothing of it is kept for later passes."""
        self._extractor.drain()  # what a step that failed may have left
        self._extractor.enabled = True
        self._batch = Batch(self._stage, dataloader, index)
        if self._has_compiled:  # for this step alone: all others stay as they are compiled
            self._uncompiled.start()
            self._hooks.enter_context(self._extractor)
        self.reference.begin(None if rehearsal else self._batch, first=not self._ran_once)

    def end(self, num_samples: int | None = None) -> None:
        """Add what the step since `begin` showed to the statistics of its dataloader.

        Args:
            num_samples: how many of the batch's samples count, the first ones; None for all.

        Raises:
            ValueError: in the first step, if a layer did not run once with usable output. Later, such a layer skips
                the batch, with one warning: a training is not ended for it.
        """
        self._uncompiled.stop()
        self._extractor.enabled = False
        live, problems = self._extractor.drain()
        if self._has_compiled:
            self._hooks.close()
        reference, reference_problems = self.reference.end()
        problems = {**reference_problems, **problems}
        for name in live.keys() - reference.keys() - problems.keys():
            problems[name] = (
                f"The reference did not run for layer {name!r}, since no module around it was called: the step calls "
                "it by itself. Give the module a `forward` that calls its parts, and use that in the step."
            )
        for name in self.layer_names:
            if name not in problems:
                try:
                    self._add(name, live[name][:num_samples], reference[name][:num_samples])
                except ValueError as error:
                    problems[name] = f"Layer {name!r} can't be used: {error}"
            if name in problems and not self._ran_once:
                raise ValueError(problems[name])
            if name in problems:
                self._warn_once(name, "skipped", f"{problems[name]} This batch is left out for the layer.")
        self._ran_once = True

    def _add(self, name: str, live: Tensor, reference: Tensor) -> None:
        d = max(live.shape[1], reference.shape[1])
        if self._estimator == "exact" and 24 * d * d > _MAX_STATE_BYTES:
            raise ValueError(
                f"it has {d} features per sample, whose statistics would take {24 * d * d / 1e9:.0f} GB. Pool them "
                '(pooling="mean"), or use estimator="minibatch".'
            )
        if self._estimator == "minibatch" and len(live) < 4:
            if len(live):
                self._warn_once("", "small", "Batches of fewer than 4 samples are left out of the minibatch estimator.")
            return
        statistics = self._statistics[self._batch.dataloader][name]
        if not self.reference.replayed:
            statistics.forget_known(self._recall(name))
        statistics.add(self._batch, live, reference)
        self._widths[name] = d
        kept = self._cache.recall(self._batch, name, reference.device) if self._judges[self._batch.dataloader] else None
        if kept is not None:
            self._judges[self._batch.dataloader][name].add(reference, kept[: len(reference)])

    def _recall(self, name: str) -> Recall:
        def recall(batch: Batch, num_samples: int) -> Tensor:
            features = self._cache.recall(batch, name, self._device)
            assert features is not None  # known sums are used as long as all features are found in the cache
            return features[:num_samples]

        return recall

    def scores(self, dataloader: int) -> dict[str, LayerScore]:
        """CKA of every layer over all batches since `open`, on all ranks; NaN with one warning where undefined."""
        scores = {}
        judges = self._judges[dataloader]
        known = self._known[self._stage, dataloader] = {}
        for name, statistics in self._statistics[dataloader].items():
            score = statistics.score(self._recall(name), self._device, debiased=self._debiased)
            if score.cka != score.cka:
                debiased = self._debiased or self._estimator != "exact"
                self._warn_once(name, "nan", _undefined(name, score, debiased))
            sums = statistics.reference_sums()
            # Of rounded features they will be others.
            if sums is not None and not judges and all(self._cache.has(batch) for batch, _ in sums.batches):
                known[name] = sums
            scores[name] = LayerScore(score.cka, score.n, self._widths.get(name, 0))
        if judges:
            self._judge_rounding(dataloader, max(judge.cost(self._device) for judge in judges.values()))
        return scores

    def _judge_rounding(self, dataloader: int, cost: float) -> None:
        """All ranks come to the same verdict, since the values are those of all ranks."""
        self._checked.add((self._stage, dataloader))
        if cost > _MAX_ROUNDING_COST:
            self._cache.stop_rounding()
            self._known.clear()
            self._warn_once(
                "",
                "rounding",
                f"Keeping the reference's features in bfloat16 can change CKA by {cost:.1e}, more than "
                f"{_MAX_ROUNDING_COST:g}: they are kept in float64 from now on.",
            )

    def _warn_once(self, name: str, kind: str, text: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            rank_zero_warn(text, stacklevel=4)


def _undefined(name: str, score: Score, debiased: bool) -> str:
    needed = 4 if debiased else 2
    if score.n < needed:
        reason = f"it takes {needed} samples, and there were {score.n}"
    elif not score.finite:
        reason = "the features of the live model or of the reference hold NaN or infinity"
    else:
        reason = "all samples have the same features in the live model or in the reference (a dead layer?)"
    return f"CKA of layer {name!r} is undefined (NaN): {reason}."
