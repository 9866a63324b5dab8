"""What one step shows: the features of the live model, and those of a reference that runs beside it: `WatchedStep`."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_cka.features.compiled import Uncompiled, is_compiled
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.given_masks import Mask, tokens_of_batch
from lit_cka.features.pooling import Pooling
from lit_cka.reference.running import RunningReference
from lit_cka.tracking.inputs import PassedTensors


class StepFeatures(NamedTuple):
    """Features (rows, d) by layer, of the live model and of a reference that ran; and why layers can't be used."""

    live: dict[str, Tensor]
    reference: dict[str, Tensor]
    problems: dict[str, str]


class WatchedStep:
    """Takes features by hooks while a step runs, and has a reference run on what the step passes.

    Args:
        live: the model that the step runs.
        layer_names: the layers, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.
        running: the reference; None if the live model itself plays it.
        mask: which tokens count, see `Tracker`.

    Attributes:
        passed: what the step has passed to the model.
    """

    def __init__(
        self,
        live: nn.Module,
        layer_names: list[str],
        pooling: Pooling,
        running: RunningReference | None,
        mask: Mask | None = None,
    ) -> None:
        self.passed = PassedTensors()
        self._live, self._running = live, running
        self._runs_reference = False
        self._mask = mask
        name = mask if isinstance(mask, str) else None
        on_return = None
        if running is not None:
            running.mask, on_return = name, running.on_return
        self._extractor = FeatureExtractor(
            live, layer_names, pooling, mask=name, on_call=self._on_call, on_return=on_return
        )
        self._hooks = ExitStack()
        self._has_compiled = False
        self._uncompiled = Uncompiled()

    def open(self, replicas: DeviceMesh | None) -> None:
        """Put hooks in place for many steps.

        Args:
            replicas: as for `FeatureExtractor.watch_replicas`.
        """
        # Compiled code does not notice hooks that come and go.
        self._has_compiled = is_compiled(self._live) or (
            self._running is not None and is_compiled(self._running.module)
        )
        if not self._has_compiled:
            self._hooks.enter_context(self._extractor)
        self._extractor.enabled = False
        self._extractor.watch_replicas(replicas)

    def close(self) -> None:
        """Remove all hooks from the live model and the reference."""
        self._uncompiled.stop()
        self._hooks.close()
        if self._running is not None:
            self._running.close()

    def alone(self) -> AbstractContextManager[None]:
        """For a step that is watched by this object only, whoever else watches the model."""
        return self._extractor.alone()

    def begin(self, batch: Any, num_samples: int | None = None, *, runs_reference: bool, first: bool) -> None:
        """Watch the step on a batch.

        Args:
            batch: as the step gets it.
            num_samples: that it holds, if known.
            runs_reference: have the reference run beside, if there is one that does.
            first: whether it has not run before.
        """
        tokens = tokens_of_batch(self._mask, batch)
        self.passed.begin(batch)
        self._extractor.tokens, self._extractor.num_samples = tokens, num_samples
        self._extractor.drain()  # what a step that failed may have left
        self._extractor.enabled = True
        if self._has_compiled:  # for this step alone: all others stay as they are compiled
            self._uncompiled.start()
            self._hooks.enter_context(self._extractor)
        self._runs_reference = runs_reference and self._running is not None
        if self._runs_reference:
            self._running.begin(first=first, tokens=tokens)  # type: ignore[union-attr]

    def _on_call(self, name: str, outermost: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if outermost:
            self.passed.note(args, kwargs)
        if self._running is not None:
            self._running.on_call(name, outermost, args, kwargs)

    def take(self) -> StepFeatures:
        """End the step since `begin`, and return what it showed."""
        self._uncompiled.stop()
        self._extractor.enabled = False
        live, problems = self._extractor.drain()
        if self._has_compiled:
            self._hooks.close()
        if not self._runs_reference:
            return StepFeatures(live, {}, problems)
        assert self._running is not None
        reference, reference_problems = self._running.end()
        problems = {**reference_problems, **problems}
        for name in live.keys() - reference.keys() - problems.keys():
            problems[name] = (
                f"The reference did not run for layer {name!r}, since no module around it was called: the step calls "
                "it by itself. Give the module a `forward` that calls its parts, and use that in the step."
            )
        return StepFeatures(live, reference, problems)
