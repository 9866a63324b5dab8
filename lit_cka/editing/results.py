"""What an evaluation of variants gave: `EvaluationResults`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lit_cka.editing.comparison import SetResults
from lit_cka.editing.evaluation import MAIN_METRICS
from lit_cka.tracking.history import mean_score


@dataclass(frozen=True)
class EvaluationResults:
    """Metrics and CKA of every variant.

    Attributes:
        metrics: by variant, test set and metric; empty if CKA alone was taken.
        shifted_average: by variant and metric, the mean over all test sets but the first; empty if there is one.
        cka: by test set, variant and layer, with the pretrained model; empty where none was taken.
        num_samples: by test set, behind the metrics.
        num_cka_samples: by test set.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    shifted_average: dict[str, dict[str, float]]
    cka: dict[str, dict[str, dict[str, float]]]
    num_samples: dict[str, int]
    num_cka_samples: dict[str, int]

    @classmethod
    def of(cls, test_sets: Mapping[str, SetResults]) -> EvaluationResults:
        """Arrange the results of the test sets, the one in-distribution first."""
        variants = list(next(iter(test_sets.values())).metrics)  # none, if CKA alone was taken
        metrics = {
            variant: {
                name: {key: value for key, value in results.metrics[variant].items() if key != "n"}
                for name, results in test_sets.items()
            }
            for variant in variants
        }
        shifted = {}
        for variant in variants:
            others = list(metrics[variant].values())[1:]
            common = [key for key in others[0] if all(key in other for other in others)] if others else []
            shifted[variant] = {key: math.fsum(other[key] for other in others) / len(others) for key in common}
        return cls(
            metrics,
            shifted,
            {name: results.cka for name, results in test_sets.items()},
            {name: results.num_samples for name, results in test_sets.items()},
            {name: results.num_cka_samples for name, results in test_sets.items()},
        )

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, the one in-distribution first."""
        return list(self.num_samples)

    def main_metric(self, test_set: str) -> str | None:
        """Returns the metric that variants are judged by on a test set: the first of `MAIN_METRICS` that it has."""
        first = next(iter(self.metrics.values()), {})
        return next((name for name in MAIN_METRICS if name in first.get(test_set, {})), None)

    def flat(self) -> dict[str, float]:
        """Returns all numbers by a key for loggers, `<test set>/<variant>/<metric>`; `cka_mean` is the mean CKA."""
        values = {}
        for variant, by_set in self.metrics.items():
            for name, metrics in by_set.items():
                values.update({f"{name}/{variant}/{metric}": value for metric, value in metrics.items()})
            averages = self.shifted_average[variant]
            values.update({f"shifted_average/{variant}/{metric}": value for metric, value in averages.items()})
        for name, by_variant in self.cka.items():
            for variant, scores in by_variant.items():
                values[f"{name}/{variant}/cka_mean"] = mean_score(scores)
        return values
