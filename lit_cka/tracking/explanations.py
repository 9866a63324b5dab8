"""Why a score is undefined, or of fewer samples than there are, said once each: `Explanations`."""

from __future__ import annotations

from collections.abc import Mapping

from lit_cka.parallel.warning import warn
from lit_cka.reference.recorded_dataloader import RecordedDataloader
from lit_cka.reference.rounding import MAX_ROUNDING_COST
from lit_cka.statistics.repeated import repeated_text
from lit_cka.statistics.sampled_layers import SampledLayer
from lit_cka.tracking.pairing import PairedPass


class Explanations:
    """Warns of what is wrong with layers and dataloaders, of each kind once for each of them."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def once(self, name: str, kind: str, text: str) -> None:
        """Warn, unless there was a warning of this kind for the layer or dataloader of this name."""
        if (name, kind) not in self._said:
            self._said.add((name, kind))
            warn(text)

    def of_recording(self, recorded: RecordedDataloader) -> None:
        """Warn of layers whose recorded features are not finite."""
        for name, store in recorded.stores.items():
            if not store.is_finite:
                self.once(
                    name,
                    "nan",
                    f"CKA of layer {name!r} is undefined (NaN): the reference's features, as they were recorded, "
                    "hold NaN or infinity.",
                )

    def of_rounding(self, cost: float) -> None:
        """Warn that features are not kept in the fewer bits that were asked for."""
        self.once(
            "",
            "rounding",
            f"Keeping the reference's features in bfloat16 can change CKA by {cost:.1e}, more than "
            f"{MAX_ROUNDING_COST:g}: they are kept in float32.",
        )

    def of_repeated(self, where: str, layers: Mapping[str, SampledLayer]) -> None:
        """Warn of many samples that come up more than once, which the intervals take for different ones."""
        num_repeated = min((layer.num_repeated for layer in layers.values()), default=0)
        m = max((len(layer.hashes) for layer in layers.values()), default=0)
        too_sure = "the intervals of CKA are too narrow"
        if text := repeated_text(m, num_repeated, where, whose="the reference", too_sure=too_sure):
            self.once(where, "repeated", text)

    def of_missing(self, where: str, paired: PairedPass, *, is_undefined: bool) -> bool:
        """Warn of samples that could not be compared.

        Args:
            where: the stage and the dataloader.
            paired: the pass over it, with its numbers of all ranks.
            is_undefined: whether no layer has a score.

        Returns:
            Whether that says why there is no score, if there is none.
        """
        num_others = paired.num_changed + paired.num_passed_otherwise
        is_empty = is_undefined and not paired.num_batches and not num_others
        if is_empty:
            self.once(where, "empty", f"The {where} is empty: it gave no batch, so there is no CKA (NaN).")
        if paired.num_unmatched:
            self.once(
                where,
                "unmatched",
                f"{paired.num_unmatched} samples of {where} were not among those that the reference was recorded on: "
                f"{_LEFT_OUT}",
            )
        if paired.num_changed:
            self.once(
                where,
                "changed",
                f"{paired.num_changed} samples of {where} are not what they were when the reference was recorded, "
                f"though they have the same indices: {_LEFT_OUT}",
            )
        if paired.num_passed_otherwise:
            self.once(
                where,
                "passed",
                f"The step passes something else to the model, for {paired.num_passed_otherwise} samples of {where}, "
                f"than it did for the same batches when the reference was recorded (does it depend on the epoch?): "
                f"{_LEFT_OUT}",
            )
        return is_empty or bool(paired.num_unmatched or num_others)


_LEFT_OUT = "they are left out, and n says how many were compared."
