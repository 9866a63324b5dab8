"""What the numbers of `compare`, `probe` and `project` are, a sentence each, for their pages.

A dictionary for the measures, and one for the columns of each table: a measure or a column is added with its sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_cka.analysis.comparison import Comparison
from lit_cka.analysis.features import Features
from lit_cka.analysis.linear_probe import ProbeSettings
from lit_cka.analysis.settings import Settings
from lit_cka.tracking.history import THRESHOLDS

_CKA = (
    "do samples that are close in one layer lie close in the other? 1: the same geometry, up to a rotation and a "
    "scale; "
    "0: unrelated. Neither is better: whether a change was good, an accuracy or a probe says."
)
MEASURES = {
    "cka": f"Linear CKA: {_CKA}",
    "minibatch_cka": f"Linear CKA from the unbiased HSIC of each batch: {_CKA}",
    "rbf_cka": f"CKA with a Gaussian kernel, for which near neighbours count most: {_CKA}",
    "rsa": "RSA: correlation of the two layers' distances between all pairs of samples. 1: both order the pairs "
    "alike; 0: "
    "they have nothing to do with each other; below 0: they contradict. Neither is better.",
    "procrustes": "Procrustes distance: what is left, squared, when one layer's features, at unit size, are rotated "
    "onto "
    "the other's. 0: the same geometry; 2: nothing in common. Neither is better.",
    "sampled_features_cka": "Linear CKA, debiased, and corrected for features that are themselves a sample of many "
    f"(arXiv 2502.15104): {_CKA}",
    "svcca": "SVCCA: mean canonical correlation of the directions that hold most of each layer's variance (Raghu et "
    "al. 2017). 1: the same directions, whatever their sizes; 0: unrelated.",
    "pwcca": "PWCCA: canonical correlations, weighted by what they explain of the first model's layer (Morcos et al. "
    "2018). 1: the same directions; 0: unrelated.",
    "mutual_knn": "Mutual nearest neighbours: the share of each sample's nearest neighbours that is the same in both "
    "layers (Huh et al. 2024). 1: all of them; by chance, neighbours over samples.",
    "cknna": "CKNNA: CKA of mutual nearest neighbours alone (Huh et al. 2024): do samples that are close in one layer "
    "lie close in the other, near by? 1: yes; 0: unrelated.",
}
_DEBIASED = {
    True: "Debiased: unrelated layers have 0 on average, whatever n, so that a value may be below 0.",
    False: "The plain estimator: near 1 for few samples of wide features, whatever they are. Compare values of one "
    "n only.",
}
VERDICT = (
    "The CKA in a word: untouched from {untouched:g} on, refined from {refined:g} on, rewritten below. Rules of "
    "thumb; that a "
    "layer changed does not say that the change was good."
)
_INTERVAL = (
    "end of the {level:g} % interval for the CKA of all samples like these {n} (jackknife). Narrower is surer.{about}"
)
COMPARISON_COLUMNS = {
    "layer": "In both models.{beginning}",
    "value": "{measure} Over n = {n} samples.",
    "low": f"Lower {_INTERVAL}",
    "high": f"Upper {_INTERVAL}",
    "p": "How often the layers look at least as similar when the {n} samples are paired at random ({null}). Small: "
    "they are not similar by chance. For this pair of layers alone.",
    "p_best": "How often the best of all pairs of layers does, at random: p, corrected for the search.",
    "excess": "The value's excess over chance: 0 up to the {level:g} % quantile of random pairings, 1 for equal "
    "features.",
    "rank_a": "How many directions the layer of the first model uses (RankMe, the effective rank).",
    "rank_b": "How many that of the second does.",
    "verdict": VERDICT,
}
PROBE_COLUMNS = {
    "layer": "In both models.{beginning}",
    "CKA": "{measure} Between the model before and after, over n = {n} samples.",
    "accuracy, {before}": "Share of samples whose label a logistic regression reads from the layer's features "
    "before the "
    "fine-tuning; more is better. Each sample is judged by a probe that has not seen it: {num_folds} folds of {n} "
    "samples. "
    "{chance}",
    "accuracy, {after}": "The same from the features after it, with the same folds.",
    "difference": "The accuracy gained; above 0, the labels are easier to read after the fine-tuning. ± is its "
    "standard "
    "error over the {n} samples, which both probes judge (McNemar 1947): a gain beyond twice that is hardly chance.",
    "verdict": VERDICT,
}
COMPONENT_ROWS = {
    "explained variance": "Share of the spread of all points that lies along this axis of the map; the three "
    "together say how "
    "much of it the map shows.",
    "correlation with the dataset": "How far this axis tells datasets apart, in [0, 1]: 1 and it does nothing else, "
    "0 and it "
    "knows nothing of them (the correlation ratio).",
    "correlation with the model": "The same of models.",
}
PAIR_COLUMNS = {
    "model": "Whose layers.",
    "datasets": "That are compared: the same {n} samples in the same order.",
    "mean CKA": "{measure} Of each layer on the one dataset with itself on the other, mean over layers; 1: the "
    "datasets lie "
    "alike in the model.",
    "mean distance": "In the map, of the same pairs of points, mean over layers; smaller is closer.",
    "spread of distances": "Standard deviation of these distances over layers.",
}
PROCRUSTES_COLUMNS = {
    "model": "Whose layers.",
    "datasets": "A and B.",
    "space": "In which the layers are points: the three axes of the map, or the whole signatures, of which the map "
    "shows "
    "three directions.",
    "‖AR - B‖": "What is left when all layers on A are rotated onto those on B together, by the best R; 0: a "
    "rotation takes "
    "the one onto the other.",
    "‖AR - B‖²": "Its square, as some publish it.",
    "‖AR - B‖ / √(‖A‖² + ‖B‖²)": "What is left, relative to the size of both: 0 nothing, 1 all of it, so that "
    "models compare.",
    "‖AR - B‖² / (‖A‖² + ‖B‖²)": "Its square.",
}


def describe_measure(measure: str, debiased: bool | None = None) -> str:
    """Returns what a measure is, and which direction is good; of "cka" and "rbf_cka" also what the estimator does.

    Example:
        >>> describe_measure("cka", debiased=False).endswith("Compare values of one n only.")
        True
    """
    has_estimators = debiased is not None and measure in ("cka", "rbf_cka")
    return f"{MEASURES[measure]} {_DEBIASED[bool(debiased)]}" if has_estimators else MEASURES[measure]


def comparison_columns(comparison: Comparison, beginning: str = "") -> dict[str, str]:
    """Returns a sentence for each column of `Comparison.diagonal`.

    Args:
        comparison: whose settings and samples the sentences name.
        beginning: of all layers' names, which the table leaves out.
    """
    settings = comparison.settings
    return _filled(
        COMPARISON_COLUMNS,
        beginning=_left_out(beginning),
        measure=describe_measure(settings.measure, settings.debiased),
        n=comparison.num_samples,
        level=100 * settings.level,
        null=_null(settings),
        about="" if settings.debiased else " It is about the debiased estimate, so that the plain one may be outside.",
    )


def probe_columns(
    before: Features, after: Features, settings: ProbeSettings, *, debiased: bool, beginning: str = ""
) -> dict[str, str]:
    """Returns a sentence for each column of the table of probes; `beginning` as in `comparison_columns`."""
    return _filled(
        PROBE_COLUMNS,
        beginning=_left_out(beginning),
        measure=describe_measure("cka", debiased),
        n=before.num_samples,
        num_folds=settings.num_folds,
        before=before.model,
        after=after.model,
        chance=_chance(before.labels or []),
    )


def pair_columns(num_samples: int, debiased: bool) -> dict[str, str]:
    """Returns a sentence for each column of the table of pairs of datasets."""
    return _filled(PAIR_COLUMNS, n=num_samples, measure=describe_measure("cka", debiased))


def common_beginning(names: Sequence[str], shown: Iterable[str]) -> str:
    """Returns what `shown` leaves out at the beginning of the names, if it is the same of all.

    Example:
        >>> common_beginning(["model.blocks.0", "model.blocks.1"], ["blocks.0", "blocks.1"])
        'model.'
    """
    beginnings = {name.removesuffix(short) for name, short in zip(names, shown, strict=True)}
    return beginnings.pop() if len(beginnings) == 1 else ""


def _null(settings: Settings) -> str:
    if settings.null == "moments":
        return "by the first three moments of all permutations"
    floor = 1 / (1 + settings.num_permutations)
    return f"{settings.num_permutations} permutations, so that it can't be below {floor:.2g}"


def _left_out(beginning: str) -> str:
    return f' Its whole name begins with "{beginning}".' if beginning else ""


def _chance(labels: Sequence[object]) -> str:
    if not labels:
        return ""
    most = max(map(list(labels).count, set(labels)))
    return f"Who always names the largest class has {most / len(labels):.3f}."


def _filled(sentences: dict[str, str], **values: object) -> dict[str, str]:
    untouched, refined = THRESHOLDS
    places = {**values, "untouched": untouched, "refined": refined}
    return {name.format_map(places): sentence.format_map(places) for name, sentence in sentences.items()}
