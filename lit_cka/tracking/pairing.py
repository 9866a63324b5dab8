"""The live model's rows of one dataloader, paired with the reference's of the same samples: `PairedPass`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.parallel.exchange import Group
from lit_cka.parallel.rows_of_ranks import look_up_on_all_ranks
from lit_cka.reference.recorded_dataloader import GAP, RecordedDataloader
from lit_cka.reference.sample_index import UNKNOWN, SampleIndex
from lit_cka.samples.counting import DataRanks
from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.statistics.layer import (
    ExactStatistics,
    MinibatchStatistics,
    Score,
    score_layers,
    scores_of_first_rank,
)
from lit_cka.statistics.sampled_layers import (
    ReferenceGrams,
    SampledLayer,
    jackknives_of_all_ranks,
    jackknives_of_first_rank,
)
from lit_cka.statistics.subsample import BatchHashes, Subsample, sample_hashes


class _Waiting(NamedTuple):
    """Rows of a layer that can't be added yet."""

    X: Tensor  # (m, d) of the live model
    Y: Tensor | None  # (m, d) of the reference; None to be looked up
    keys: Tensor  # (m, 2)
    samples: BatchSamples | None  # whose rows these all are, if it is not known yet which of them count


class _BatchRows:
    """Which rows of the reference those of a batch are to be paired with: the same in all layers with as many rows
    and the same index.

    Attributes:
        kept: which rows this rank counts; None if that is not known yet.
        all_count: whether it counts all of them.
        keys: (m, 2), or (m, 4) with keys by content, of all rows; once looked up, of those that count.
        positions: (m,) in the recording, of those that count.
        run: the same where they are one after the other.
    """

    def __init__(self, samples: BatchSamples, num_rows: int) -> None:
        keys = samples.row_keys(num_rows)
        self.kept = samples.row_counted(num_rows)
        self.all_count = self.kept is not None and bool(self.kept.all())
        if keys is not None and samples.content is not None and num_rows == len(samples):
            keys = torch.cat([keys, samples.content], dim=1)
        self.keys = keys
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.run: range | None = None

    def look_up(self, recorded: RecordedDataloader, index: SampleIndex | None) -> None:
        """Find the rows that count."""
        assert self.keys is not None
        self.keys = self.keys if self.all_count else self.keys[self.kept]
        self.positions = recorded.find(index, self.keys)
        if len(self.positions) and int(self.positions[0]) >= 0:
            run = range(int(self.positions[0]), int(self.positions[0]) + len(self.positions))
            self.run = run if torch.equal(self.positions, torch.arange(run.start, run.stop)) else None

    @cached_property
    def hashes(self) -> BatchHashes:
        """Of the rows that count, after `look_up` where there is one."""
        assert self.keys is not None
        is_of_all = self.kept is not None and len(self.keys) == len(self.kept)
        return BatchHashes(sample_hashes(self.keys[self.kept] if is_of_all else self.keys))

    def counted(self, rows: Tensor) -> Tensor:
        """Return those of a layer's rows that count."""
        return rows if self.all_count or self.kept is None else rows[self.kept.to(rows.device)]


class PairedPass:
    """Statistics of every layer over one pass through one dataloader.

    Rows of the reference come from a recording, by what the samples are, or from a model that runs beside the live
    one. A sample counts once on all ranks. What another rank has recorded is asked for at the end of the pass.

    Args:
        statistics: empty ones, by layer.
        recorded: what was recorded of the dataloader; None where the reference runs.
        subsamples: empty ones, by layer, from which errors are told; None where they are not asked for.
    """

    def __init__(
        self,
        statistics: Mapping[str, ExactStatistics | MinibatchStatistics],
        recorded: RecordedDataloader | None,
        subsamples: Mapping[str, Subsample] | None = None,
    ) -> None:
        self.statistics = dict(statistics)
        self.widths: dict[str, int] = {}
        self.num_batches = 0
        self.num_unmatched = 0
        self.has_small_batches = False  # too small for the minibatch estimator
        self.num_changed = 0  # samples that are not what they were when they were recorded
        self.num_passed_otherwise = 0  # samples for which the step passes something else to the model than then
        self._recorded, self._subsamples = recorded, subsamples
        self._waiting: dict[str, list[_Waiting]] = {name: [] for name in statistics}

    def add(self, samples: BatchSamples, live: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, str]:
        """Add a batch's features (rows, d) by layer; return, by layer, why one can't be used.

        Args:
            samples: which they are.
            live: of the live model.
            reference: of a reference that runs; empty where it was recorded.
        """
        self.num_batches += 1
        problems: dict[str, str] = {}
        rows: dict[tuple[int, int], _BatchRows] = {}
        for name, X in live.items():
            try:
                self._add(name, samples, X, None if self._recorded is not None else reference[name], rows)
            except ValueError as error:
                problems[name] = str(error)
        return problems

    def _add(
        self,
        name: str,
        samples: BatchSamples,
        X: Tensor,
        Y: Tensor | None,
        known: dict[tuple[int, int], _BatchRows],
    ) -> None:
        if Y is not None and len(X) != len(Y):
            raise ValueError(f"the live model gave features of {len(X)} samples, the reference of {len(Y)}.")
        index = None if self._recorded is None else self._recorded.indices.get(name)
        same = (X.shape[0], id(index))
        is_new = same not in known
        if is_new:
            known[same] = _BatchRows(samples, X.shape[0])
        rows = known[same]
        if rows.keys is None:
            if Y is None:
                raise ValueError("which samples the batch holds can't be told, and so not what was recorded of them.")
            self._pair(name, X, Y)
        elif rows.kept is None:
            if isinstance(self.statistics[name], MinibatchStatistics):
                raise ValueError(
                    "which of the samples repeat those of other ranks is known at the end of the pass only, and "
                    'estimator="minibatch" needs it in every batch.'
                )
            self._waiting[name].append(_Waiting(X, Y, rows.keys, samples))
        elif Y is not None:
            self._pair(name, rows.counted(X), rows.counted(Y), hashes=self._hashes(rows))
        else:
            assert self._recorded is not None
            if is_new:
                rows.look_up(self._recorded, index)
            self._pair_recorded(name, rows.counted(X), rows)

    def _pair_recorded(self, name: str, X: Tensor, rows: _BatchRows) -> None:
        """Pair the rows with what this process has recorded of them; the others wait for the end of the pass."""
        assert self._recorded is not None
        assert rows.keys is not None
        store, positions, hashes = self._recorded.stores[name], rows.positions, self._hashes(rows)
        if rows.run is not None and store.has_all(rows.run):
            self._pair(name, X, store.offsets(rows.run).to(X.device), store.pivot, hashes)
            return
        positions = store.mask_gaps(positions, GAP)
        found, unknown = positions >= 0, positions == UNKNOWN
        if not bool(found.all()):
            if isinstance(self.statistics[name], MinibatchStatistics) and bool(unknown.any()):
                unknown |= found  # a batch stays together
                found = torch.zeros_like(found)
            self._waiting[name].append(_Waiting(X[unknown.to(X.device)], None, rows.keys[unknown], None))
            X, positions = X[found.to(X.device)], positions[found]
            hashes = None if hashes is None else hashes.of(found)
        if len(positions):
            self._pair(name, X, store.offsets(positions).to(X.device), store.pivot, hashes)

    def _hashes(self, rows: _BatchRows) -> BatchHashes | None:
        return None if self._subsamples is None else rows.hashes

    def _pair(
        self, name: str, X: Tensor, Y: Tensor, origin: Tensor | None = None, hashes: BatchHashes | None = None
    ) -> None:
        """Add rows of the live model, and the reference's of the same samples, measured from the origin if there is
        one, with the hashes of what they are if that can be told.
        """
        if self._subsamples is not None:
            self._subsamples[name].add(hashes, X, Y, origin)
        statistics, num_rows = self.statistics[name], X.shape[0]
        if isinstance(statistics, ExactStatistics):
            statistics.add(X, Y, origin)
        elif num_rows >= 4:
            statistics.add(X, Y if origin is None else Y.to(torch.float64) + origin.to(Y.device))
        else:
            self.has_small_batches = self.has_small_batches or num_rows > 0
            return
        self.widths[name] = max(X.shape[1], Y.shape[1])

    def scores(self, ranks: DataRanks, *, debiased: bool) -> dict[str, Score]:
        """Return the score of every layer, at the end of the pass; every process has to call it.

        Args:
            ranks: the processes that hold different samples.
            debiased: as for `score_layers`.
        """
        group = Group(ranks.rank, ranks.size, ranks.group)
        self._finish(ranks.device, group)
        mine = [self.num_batches, self.num_unmatched, self.num_changed, self.num_passed_otherwise]
        (numbers,) = group.add_up([torch.tensor(mine, device=ranks.device)])
        self.num_batches, self.num_unmatched, self.num_changed, self.num_passed_otherwise = numbers.tolist()
        scores = score_layers(self.statistics, ranks.device, debiased=debiased, group=ranks.group)
        # Processes that hold the same samples may round in other ways.
        return scores if ranks.replicas is None else scores_of_first_rank(scores, ranks.device)

    def sampled(self, ranks: DataRanks, references: ReferenceGrams, *, with_ranks: bool) -> dict[str, SampledLayer]:
        """Return what tells the errors of the scores, after `scores`; every process has to call it.

        Args:
            ranks: as for `scores`.
            references: of earlier passes over this dataloader.
            with_ranks: count the directions that the live model's features use, too.
        """
        if self._subsamples is None:
            return {}
        group = Group(ranks.rank, ranks.size, ranks.group)
        layers = jackknives_of_all_ranks(
            self._subsamples, ranks.device, group, references=references, with_ranks=with_ranks
        )
        return layers if ranks.replicas is None else jackknives_of_first_rank(layers, ranks.device)

    def _finish(self, device: torch.device, group: Group) -> None:
        """Add what has waited for the end of the pass, when all batches know which of their samples count."""
        for name, waiting in self._waiting.items():
            rows = [_counted_rows(each) for each in waiting]
            self._waiting[name] = []
            for X, Y, keys in rows:
                if Y is not None and len(X):
                    self._pair(name, X, Y, hashes=BatchHashes(sample_hashes(keys)))
            if self._recorded is not None:
                self._look_up(name, self._recorded, [(X, keys) for X, Y, keys in rows if Y is None], device, group)

    def _look_up(
        self,
        name: str,
        recorded: RecordedDataloader,
        asked: list[tuple[Tensor, Tensor]],
        device: torch.device,
        group: Group,
    ) -> None:
        """Pair rows with what any rank has recorded of them, and count those that none has."""
        store = recorded.stores[name]

        def rows_of(keys: Tensor) -> tuple[Tensor, Tensor]:
            positions = recorded.find_keys(name, keys)
            return positions >= 0, store.rows(positions.clamp(min=0), device)

        keys = torch.cat([_with_content(keys) for _, keys in asked]) if asked else torch.empty(0, 4, dtype=torch.int64)
        if group.size > 1:
            found, Y = look_up_on_all_ranks(keys, rows_of, store.width, device, group)
        elif len(keys):
            found, rows = rows_of(keys)
            Y = rows[found.to(device)]
        if len(keys):
            self.num_unmatched = max(self.num_unmatched, int((~found).sum()))
            sizes = [len(X) for X, _ in asked]
            if not isinstance(self.statistics[name], MinibatchStatistics):
                sizes, asked = [len(keys)], [(torch.cat([X for X, _ in asked]), keys)]
            of_batches = found.split(sizes)
            rows = Y.split([int(each.sum()) for each in of_batches])
            for (X, of_X), known, of_batch in zip(asked, of_batches, rows, strict=True):
                if len(of_batch):
                    hashes = BatchHashes(sample_hashes(of_X[known]))
                    self._pair(name, X[known.to(X.device)], of_batch.to(X.device), hashes=hashes)


def _with_content(keys: Tensor) -> Tensor:
    """Keys (n, 4); those of no content are found nowhere."""
    return keys if keys.shape[1] == 4 else torch.cat([keys, torch.zeros_like(keys)], dim=1)


def _counted_rows(waiting: _Waiting) -> tuple[Tensor, Tensor | None, Tensor]:
    if waiting.samples is None:  # only those that count have waited
        return waiting.X, waiting.Y, waiting.keys
    kept = waiting.samples.row_counted(len(waiting.X))
    assert kept is not None
    there = kept.to(waiting.X.device)
    return waiting.X[there], None if waiting.Y is None else waiting.Y[there], waiting.keys[kept]
