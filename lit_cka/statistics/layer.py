"""Statistics of one layer against its reference over one pass: `ExactStatistics`, `MinibatchStatistics`.

`score_layers` scores many of them at the cost of a few collectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.cka import cka_from_terms, min_num_samples
from lit_cka.functional.minibatch import HSICSums, add_batch, cka_from_hsic_sums, empty_hsic_sums, in_units_of
from lit_cka.functional.precision import Products, float64_device
from lit_cka.functional.terms import CKATerms
from lit_cka.parallel.exchange import Group
from lit_cka.statistics.agreement import Layer
from lit_cka.statistics.all_ranks import terms_of_all_ranks
from lit_cka.statistics.paired_samples import PairedSamples

_FLOAT32_ROUNDING = 1e-7
_SAME = 1e-6  # how much `b` may change, relative, by the rounding of rows


class Score(NamedTuple):
    """CKA, the number of samples behind it, whether all of their features were finite, and the debiased CKA."""

    cka: float
    n: int
    finite: bool
    debiased: float

    def why_undefined(self, *, debiased: bool) -> str:
        """Why `cka` is NaN, in words."""
        needed = min_num_samples(debiased)
        if self.n < needed:
            return f"it takes {needed} samples, and there were {self.n}"
        if not self.finite:
            return "the features of the live model or of the reference hold NaN or infinity"
        return "all samples have the same features in the live model or in the reference (a dead layer?)"


class ReferenceTerms(NamedTuple):
    """What the reference alone adds to CKA: the same in every pass over the same samples, in any order, on any ranks.

    The terms are those of `CKATerms`, in a unit with this exponent (see `unit_exponent`).
    """

    n: int
    yy: float
    b: float
    bb: float
    exponent: int = 0
    varies: float = 1.0


class ExactStatistics:
    """All samples of a pass of one layer, on this rank: as rows or as moments, whichever is less (`PairedSamples`).

    Args:
        products: how features are multiplied, as for `add_samples`; None leaves it to the device.
        reference: `reference_terms` of an earlier pass, if the caller knows that this one has the same samples. What
            the reference alone adds is not computed again then.

    Attributes:
        space: "samples" or "features" once scored: whether rows or moments were multiplied; None without samples.
        reference_terms: what a later pass over the same samples may be given, once scored; None without samples.
    """

    def __init__(self, products: Products | None = None, reference: ReferenceTerms | None = None) -> None:
        self.samples = PairedSamples(products, with_yy=reference is None)
        self.reference = reference
        self.space: Literal["samples", "features"] | None = None
        self.reference_terms: ReferenceTerms | None = None

    def add(self, X: Tensor, Y: Tensor, origin: Tensor | None = None) -> None:
        """Add a batch's features, `X` (n, d_x) of the live model and `Y` (n, d_y) of the reference.

        They are of the same samples in the same order, in any floating dtype, and are not copied at once: they must
        not be changed in place afterwards. What is kept is on the device of `X`.

        Args:
            X: of the live model.
            Y: of the reference.
            origin: (d_y,) that `Y` is measured from: its features are `Y + origin`. None for 0.

        Raises:
            ValueError: if `X` and `Y` differ in n, or the widths from those of earlier batches.
        """
        self.samples.add(X, Y, origin)

    def score(self, device: torch.device, *, debiased: bool, group: Any = None) -> Score:
        """Returns the linear CKA of all samples of the pass, of all ranks of the group. Every rank has to call it.

        More can be added afterwards. See `score_layers`.
        """
        return score_layers({"": self}, device, debiased=debiased, group=group)[""]


class MinibatchStatistics:
    """The same for the minibatch estimator, which keeps no more than the sums of the batches' HSIC."""

    def __init__(self) -> None:
        self.sums = empty_hsic_sums(1, 1)

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Add a batch's features, `X` (n, d_x) of the live model and `Y` (n, d_y) of the reference, in float64.

        Raises:
            ValueError: if `X` and `Y` differ in n, or there are fewer than 4 samples.
        """
        device = float64_device(X.device)
        self.sums = add_batch(HSICSums(*(value.to(device) for value in self.sums)), [X], [Y])

    def score(self, device: torch.device, *, debiased: bool, group: Any = None) -> Score:
        """Returns CKA from all batches of the pass, of all ranks of the group. Every rank has to call it."""
        return score_layers({"": self}, device, debiased=debiased, group=group)[""]


def score_layers(
    statistics: Mapping[str, ExactStatistics | MinibatchStatistics],
    device: torch.device,
    *,
    debiased: bool,
    group: Any = None,
) -> dict[str, Score]:
    """Returns the CKA of every layer, from all samples of all ranks: NaN where it is not defined.

    Every rank of the group has to call this with the same layers in the same order; a rank may have no samples. Next to
    what is kept, it takes memory for one layer's statistics at a time.

    Args:
        statistics: of each layer.
        device: of the collectives, and where to compute.
        debiased: use the unbiased HSIC; of no effect for the minibatch estimator.
        group: the process group; None for all processes.

    Raises:
        ValueError: on all ranks, if some have features of other widths, or if a `reference` is of other samples.
    """
    ranks = Group.of(group)
    exact = {name: each for name, each in statistics.items() if isinstance(each, ExactStatistics)}
    minibatch = {name: each for name, each in statistics.items() if isinstance(each, MinibatchStatistics)}
    scores = {**_exact_scores(exact, device, debiased, ranks), **_minibatch_scores(minibatch, device, ranks)}
    return {name: scores[name] for name in statistics}


def _exact_scores(
    statistics: Mapping[str, ExactStatistics], device: torch.device, debiased: bool, group: Group
) -> dict[str, Score]:
    if not statistics:
        return {}
    layers = terms_of_all_ranks({name: each.samples for name, each in statistics.items()}, device, group)
    values = []
    for (name, layer), each in zip(layers.items(), statistics.values(), strict=True):
        terms = layer.terms
        if terms is None:
            each.space, each.reference_terms = None, each.reference
            values.append(
                torch.tensor([torch.nan, True, torch.nan], dtype=torch.float64, device=float64_device(device))
            )
            continue
        each.space = "samples" if layer.in_sample_space else "features"
        if each.reference is None:
            each.reference_terms = _reference_terms(terms, layer)
        else:
            each.reference_terms = each.reference
            terms = _with_reference(terms, layer, each.reference, name)
        rounding = _FLOAT32_ROUNDING if layer.in_sample_space and layer.products == "float32" else 0.0
        unbiased = cka_from_terms(terms, debiased=True, rounding=rounding)
        cka = unbiased if debiased else cka_from_terms(terms, debiased=False, rounding=rounding)
        values.append(torch.stack([cka, (terms.a.isfinite() & terms.b.isfinite()).to(torch.float64), unbiased]))
    return {
        name: Score(cka, layer.n, bool(finite), unbiased)
        for (name, layer), (cka, finite, unbiased) in zip(layers.items(), torch.stack(values).tolist(), strict=True)
    }


def scores_of_first_rank(scores: Mapping[str, Score], device: torch.device) -> dict[str, Score]:
    """The scores that the first process of all has; each of them has to call this, with the same layers."""
    values = torch.tensor([list(map(float, score)) for score in scores.values()], dtype=torch.float64).reshape(-1, 4)
    values = values.to(float64_device(device))
    dist.broadcast(values, 0)
    told = zip(scores, values.tolist(), strict=True)
    return {name: Score(cka, int(n), bool(finite), debiased) for name, (cka, n, finite, debiased) in told}


def _reference_terms(terms: CKATerms, layer: Layer) -> ReferenceTerms:
    yy, b, bb, varies = torch.stack([terms.yy, terms.b, terms.bb, terms.varies_y]).tolist()
    return ReferenceTerms(layer.n, yy, b, bb, layer.exponents[1], varies)


def _with_reference(terms: CKATerms, layer: Layer, reference: ReferenceTerms, name: str) -> CKATerms:
    """Returns the terms with what is known of the reference, in their unit."""
    unit = 2.0 ** (2 * (reference.exponent - layer.exponents[1]))
    b = float(terms.b)
    same = math.isclose(b, reference.b * unit, rel_tol=_SAME) or not (math.isfinite(b) or math.isfinite(reference.b))
    if layer.n != reference.n or not same:
        raise ValueError(
            f"Expected `reference`{f' of layer {name!r}' if name else ''} to be of the {layer.n} samples of this pass, "
            f"whose squared norms sum to {b:g}, but got that of {reference.n}, with {reference.b * unit:g}. Leave it "
            "out where the samples may be others."
        )
    yy, bb = reference.yy * unit**2, reference.bb * unit**2
    known = {"yy": yy, "bb": bb, "varies_y": reference.varies}
    return terms._replace(**{name: terms.xy.new_tensor(value) for name, value in known.items()})


def _minibatch_scores(
    statistics: Mapping[str, MinibatchStatistics], device: torch.device, group: Group
) -> dict[str, Score]:
    if not statistics:
        return {}
    device = float64_device(device)
    layers = [HSICSums(*(value.to(device) for value in each.sums)) for each in statistics.values()]
    exponents = torch.stack([torch.cat([each.exponents_x, each.exponents_y]) for each in layers])
    spreads = torch.stack([torch.cat([each.xx, each.yy]) for each in layers])
    units = group.agree_on_exponents(exponents, spreads)
    in_units = [in_units_of(each, unit[:1], unit[1:]) for each, unit in zip(layers, units, strict=True)]
    (totals,) = group.add_up([torch.stack([torch.cat([value.flatten() for value in each[:4]]) for each in in_units])])
    scores = {}
    for name, (xy, xx, yy, n), unit in zip(statistics, totals, units, strict=True):
        sums = HSICSums(xy[None, None], xx[None], yy[None], n, unit[:1], unit[1:])
        cka = cka_from_hsic_sums(sums).item()
        scores[name] = Score(cka, int(n), bool(xx.isfinite() & yy.isfinite()), cka)
    return scores
