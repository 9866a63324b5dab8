"""Pure tensor mathematics: similarity of representations, and the split of weight updates; takes torch alone
(and, of SciPy, a quantile or two).

State over batches is `lit_cka.metrics`; whole models and files are elsewhere.
"""

from lit_cka.functional.cka import cka_from_gram, cka_from_moments, cka_from_terms, hsic, linear_cka, pairwise_hsic
from lit_cka.functional.cknna import cknna
from lit_cka.functional.intervals import change_interval, cka_interval
from lit_cka.functional.jackknife import Jackknife, jackknife_cka, linear_jackknife
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.moments import (
    PairedMoments,
    add_samples,
    empty_moments,
    merge_moments,
    paired_moments,
    recentre_moments,
)
from lit_cka.functional.mutual_knn import mutual_knn
from lit_cka.functional.permutation_moments import permutation_moments
from lit_cka.functional.permutations import permuted_products
from lit_cka.functional.planning import SamplePlan, plan_samples
from lit_cka.functional.precision import has_fast_float64
from lit_cka.functional.procrustes import procrustes_distance
from lit_cka.functional.pwcca import pwcca
from lit_cka.functional.rankme import rankme, rankme_from_gram
from lit_cka.functional.rows import Rows
from lit_cka.functional.rsa import rdm
from lit_cka.functional.sample_space import cheaper_in_sample_space, sample_space_terms
from lit_cka.functional.sampled_features import sampled_features_cka
from lit_cka.functional.signatures import kernel_pca, signature, signature_gram
from lit_cka.functional.spectral import low_rank_split, spectral_split
from lit_cka.functional.svcca import svcca
from lit_cka.functional.terms import CKATerms
from lit_cka.functional.update_size import UpdateProducts, update_products
from lit_cka.functional.update_spectrum import effective_rank, stable_rank, update_singular_values

__all__ = [
    "CKATerms",
    "Jackknife",
    "PairedMoments",
    "Rows",
    "SamplePlan",
    "UpdateProducts",
    "add_samples",
    "change_interval",
    "cheaper_in_sample_space",
    "cka_from_gram",
    "cka_from_moments",
    "cka_from_terms",
    "cka_interval",
    "cka_matrix",
    "cknna",
    "effective_rank",
    "empty_moments",
    "has_fast_float64",
    "hsic",
    "jackknife_cka",
    "kernel_pca",
    "linear_cka",
    "linear_gram",
    "linear_jackknife",
    "low_rank_split",
    "merge_moments",
    "mutual_knn",
    "paired_moments",
    "pairwise_hsic",
    "permutation_moments",
    "permuted_products",
    "plan_samples",
    "procrustes_distance",
    "pwcca",
    "rankme",
    "rankme_from_gram",
    "rbf_gram",
    "rdm",
    "recentre_moments",
    "sample_space_terms",
    "sampled_features_cka",
    "signature",
    "signature_gram",
    "spectral_split",
    "stable_rank",
    "svcca",
    "update_products",
    "update_singular_values",
]
