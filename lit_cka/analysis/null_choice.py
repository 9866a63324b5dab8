"""Which null distribution scores are calibrated against: `null_that_fits`."""

from __future__ import annotations

from dataclasses import replace

from lit_cka.analysis.features import Features
from lit_cka.analysis.measures import centred_grams
from lit_cka.analysis.settings import Settings
from lit_cka.functional.permutation_moments import dominance
from lit_cka.parallel.warning import warn

# Of 96 pairs of features of 12, 40 and 120 samples, normal, with heavy tails, or with samples 2 to 10 times as far off,
# permutations were above the moments' 5 % quantile in 3.8 to 6 %, and above that of 1 % in 0.75 to 1.8 %, where the
# dominance was below this; in 2.3 to 8.6 % and 0 to 2.8 % where it was not.
MAX_DOMINANCE = 0.8
NUM_PERMUTATIONS = 999


def null_that_fits(a: Features, b: Features, settings: Settings) -> Settings:
    """Returns the settings, with permutations in place of moments where one sample decides how far chance reaches.

    Args:
        a: features of the first model.
        b: of the second; the same object to compare a model with itself.
        settings: as they were asked for; a warning says if others are returned.
    """
    if settings.null != "moments":
        return settings
    Ks = centred_grams(list(a.layers.values()), settings)
    Ls = Ks if a is b else centred_grams(list(b.layers.values()), settings)
    found = dominance(Ks, Ls)
    if a is b and len(Ks) > 1:
        found.fill_diagonal_(0.0)  # whose scores are 1
    largest = found.nan_to_num(0.0)
    if not largest.max() > MAX_DOMINANCE:
        return settings
    row, column = divmod(int(largest.argmax()), len(Ls))
    num_permutations = settings.num_permutations or NUM_PERMUTATIONS
    warn(
        f"One sample of {a.data} is so far from all others in {list(a.layers)[row]!r} of {a.model}, and one in "
        f"{list(b.layers)[column]!r} of {b.model}, that the moments of the null do not tell how often chance reaches a "
        f"score: p-values are from {num_permutations} permutations."
    )
    return replace(settings, null="permutations", num_permutations=num_permutations)
