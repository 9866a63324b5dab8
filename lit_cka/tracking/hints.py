"""What `CKACallback` warns its users of: stale monitors, biased estimates, trainings that are not tracked."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from lit_cka.parallel.warning import warn
from lit_cka.tracking.tracker import LayerScore


def warn_monitors(trainer: pl.Trainer, prefix: str, every_n_validations: int) -> None:
    """Warn of callbacks that monitor a score which most validations leave as it was."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith(f"{prefix}/"):
            warn(
                f"{type(callback).__name__} monitors {monitor!r}, which changes only every "
                f"{every_n_validations} validations: in between it sees the old value again."
            )


def warn_bias(layers: Mapping[str, LayerScore]) -> bool:
    """Warn if the plain estimator was used on too few samples for the width of a layer, and return whether it was."""
    for name, layer in layers.items():
        if layer.n < 5 * layer.d and layer.cka == layer.cka:
            warn(
                f"CKA is biased upward where there are fewer than about 5 samples per feature: {name!r} has "
                f"{layer.d} features and was measured on {layer.n} samples. Use the default, debiased=True."
            )
            return True
    return False


def warn_no_validation() -> None:
    """Warn before a `fit` without a validation loop, which there is nothing to track in."""
    warn(
        "CKACallback will track nothing: this `fit` has no validation loop (no validation dataloader, no "
        f"`validation_step`, or `limit_val_batches=0`). {_PROBE}"
    )


def warn_empty() -> None:
    """Warn before a `fit` whose validation dataloaders have no batches."""
    warn(f"CKACallback has nothing to track: the validation dataloaders are empty at the start of this `fit`. {_PROBE}")


def warn_nothing_tracked() -> None:
    """Warn at the end of a `fit` in which no validation ran."""
    warn(f"CKACallback has tracked nothing: no validation ran during `fit`. {_PROBE}")


_PROBE = "Without validation batches, give it some of its own by `probe=`."
