"""What is kept of the reference's drawn samples from one pass to the next, and drawn once for all layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_cka import CKACallback
from lit_cka.functional import linear_jackknife
from lit_cka.parallel.exchange import Group
from lit_cka.statistics import sampled_layers
from lit_cka.statistics.sampled_layers import ReferenceGrams, SampledLayer, jackknives_of_all_ranks
from lit_cka.statistics.subsample import BatchHashes, Subsample, sample_hashes
from tests.oracles import paired_features
from tests.tracking.helpers import BLOCKS, Classifier, loader, train_loader, trainer

CPU = torch.device("cpu")
NAMES = ("first", "second")


def passed(X: Tensor, Ys: list[Tensor], order: Tensor, references: ReferenceGrams | None) -> dict[str, SampledLayer]:
    """After a pass over the samples in this order, in batches, which two layers share."""
    subsamples = {name: Subsample(40) for name in NAMES}
    for batch in order.split(16):
        hashes = BatchHashes(sample_hashes(torch.stack([batch, torch.full_like(batch, 3)], dim=1)))
        for each, Y in zip(subsamples.values(), Ys, strict=True):
            each.add(hashes, X[batch], Y[batch])
    return jackknives_of_all_ranks(subsamples, CPU, Group.of(), references=references)


def test_what_is_kept_gives_the_same_bits() -> None:
    """Whatever the order of the samples; and what is not the same any more is computed anew, by layer."""
    X, Y = paired_features(200, 6, 5, dtype=torch.float32)
    other = Y.clone()
    other[:, 2] = Y[:, 2].nextafter(torch.tensor(torch.inf))
    references, generator = ReferenceGrams(), torch.Generator().manual_seed(0)
    for second in (Y + 1, Y + 1, other, 1e30 * Y, Y[:, :3]):
        order = torch.randperm(200, generator=generator)
        kept = passed(X, [Y, second], order, references)
        anew = passed(X, [Y, second], torch.arange(200), None)
        for name in NAMES:
            assert kept[name].num_repeated == anew[name].num_repeated == 0
            for one, two in zip(kept[name].samples, anew[name].samples, strict=True):
                assert torch.equal(one, two)
        drawn = sample_hashes(torch.stack([torch.arange(200), torch.full((200,), 3)], dim=1)).argsort()[:40]
        expected = linear_jackknife(X[drawn], second[drawn])
        torch.testing.assert_close(kept["second"].samples, expected, rtol=1e-9, atol=1e-9)


def test_what_is_kept_is_told_by_all_samples_of_all_layers() -> None:
    (Y, Z), references = paired_features(30, 4, 7), ReferenceGrams()
    gram, _ = references.of(NAMES, [Y, Z])
    assert references.of(NAMES, [Y.clone(), Z.clone()])[0] is gram
    for changed in range(30):
        other = Z.clone()
        other[changed, 3] += 1e-12
        assert references.of(NAMES, [Y, other])[0] is not gram
        gram, _ = references.of(NAMES, [Y, Z])
    broken = Z.clone()
    broken[3, 1] = torch.nan
    assert references.of(NAMES, [Y, broken])[0].A[1].isnan().all()


@pytest.mark.parametrize(("reference", "computed"), [(None, 1 + 3), ("previous", 2 * 3)])
def test_a_training_computes_the_reference_s_half_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str | None, computed: int
) -> None:
    """Unless it is another one at each evaluation."""
    grams: list[Tensor] = []

    class Counted(sampled_layers.SampledGram):
        def __init__(self, K: Tensor) -> None:
            grams.append(K)
            super().__init__(K)

    monkeypatch.setattr(sampled_layers, "SampledGram", Counted)
    options = {} if reference is None else {"reference": reference}
    callback = CKACallback(**options)  # type: ignore[arg-type]
    trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), train_loader(), loader())
    assert len(callback.history) == 3
    assert all(record["low"] for record in callback.history)
    assert len(grams) == computed * len(BLOCKS)


def test_layers_that_draw_the_same_look_once() -> None:
    hashes = BatchHashes(torch.tensor([5, -3, 8, 1]))
    drawn, places = hashes.below(5)
    assert (drawn.tolist(), places.tolist()) == ([-3, 1], [1, 3])
    assert hashes.below(5)[0] is drawn
    assert hashes.below(9)[1].tolist() == [0, 1, 2, 3]
    assert hashes.of(torch.tensor([True, False, True, False])).hashes.tolist() == [5, 8]
