"""Many fine-tuned checkpoints, edits and test sets in one run that can be gone on with: `Study`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lit_cka.editing.depths import depths_of
from lit_cka.editing.loaded_sets import LoadedSet, named_sets
from lit_cka.editing.lock import OutputLock
from lit_cka.editing.parameter import check_finite
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.sources import host_model, weights_for
from lit_cka.features.layers import Layers, select_layers
from lit_cka.files import require_writable
from lit_cka.functional.rank_rules import RankRule
from lit_cka.parallel.devices import usable_device
from lit_cka.parallel.ranks import Ranks
from lit_cka.progress import progress_bar
from lit_cka.study.checkpoints import Checkpoint, find_checkpoints
from lit_cka.study.edits import study_edits
from lit_cka.study.evaluation import Evaluator
from lit_cka.study.plan import Plan
from lit_cka.study.storage import CheckpointResult, load_result, require_same_samples, result_path


@dataclass(frozen=True)
class StudyResults:
    """What a study has found out.

    Attributes:
        checkpoints: a result for each, in order.
        failed: why there is none, by the names of the others.

    Example:
        >>> StudyResults(checkpoints=[], failed={"7.pt": "Expected ..."}).failed
        {'7.pt': 'Expected ...'}
    """

    checkpoints: list[CheckpointResult]
    failed: dict[str, str]


class Study:
    """Edits many fine-tuned checkpoints of one pretrained model in many ways, and evaluates all of it.

        study = Study("pretrained.pt", ["checkpoints/*.pt"], model, edits={"monosoup": {}, "trim": {"density": 0.2}})
        results = study.run(datamodule, "runs/study")

    Beside each edit stands the shrinkage of the same size, see `lit_cka.study.edits.shrunk_alike`.

    Args:
        pretrained: W0, a checkpoint file or a transformers folder.
        checkpoints: fine-tuned models: paths, and patterns with `*`, `**`, `?` or `[...]`. The pretrained one is left
            out where a pattern matches it.
        model: a module that takes the weights; not needed for folders.
        edits: options of each edit by its label, under "edit" which one it is where the label doesn't say:
            {"monosoup": {}, "trim": {"density": 0.2}, "all": {"edit": "monosoup", "rule": "energy", "R": 0.9}}.
        wise_ft: also WiSE-FT with these `alpha`.
        rule: of MonoSoup, unless an edit has its own: "effective_rank" or "energy".
        R: share of the energy that the high part reaches, for "energy".
        min_rel_update: weights with a smaller relative change keep their fine-tuned value.
        include: patterns of the parameters to edit, see `EditSettings`; likewise `exclude`, `keep_pretrained` and
            `keep_finetuned`.
        shared: beginnings of parameter names to take from the fine-tuned model alone, such as a new head.
        layers: the blocks, for "lines"; None for the model's repeated blocks.
        weights: the set of weights to take from files with several ("teacher").
        max_batches: of each test set, so many at most; None for all.
        device: where to compute, such as "cuda"; None for a GPU if there is one.

    Raises:
        ValueError: if an edit doesn't exist or has no such option, or a checkpoint's name matches nothing.

    Example:
        >>> study = Study("pretrained.pt", ["tuned/*.pt"], edits={"monosoup": {}, "shrink": {}})
        >>> results = study.run(datamodule, "runs/study")  # doctest: +SKIP
        >>> list(study.edits)
        ['monosoup', 'shrink']
    """

    def __init__(
        self,
        pretrained: str,
        checkpoints: list[str],
        model: nn.Module | None = None,
        *,
        edits: dict[str, dict[str, Any] | None] | None = None,
        wise_ft: Sequence[float] = (),
        rule: RankRule = "effective_rank",
        R: float = 0.8,
        min_rel_update: float = 1e-6,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_pretrained: Sequence[str] = (),
        keep_finetuned: Sequence[str] = (),
        shared: Sequence[str] = (),
        layers: Layers | None = None,
        weights: str | None = None,
        max_batches: int | None = None,
        device: str | None = None,
    ) -> None:
        patterns = include, exclude, keep_pretrained, keep_finetuned
        settings = EditSettings(rule, R, min_rel_update, *patterns)
        self.edits = study_edits({"monosoup": {}} if edits is None and not wise_ft else edits or {}, settings, wise_ft)
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"Expected `max_batches` to be at least 1, or None, but got {max_batches}.")
        self.pretrained, self.patterns, self.model = pretrained, list(checkpoints), model
        self.shared, self.layers, self.weights = tuple(shared), layers, weights
        self.max_batches, self.device = max_batches, device

    def run(
        self,
        data: pl.LightningDataModule,
        output: str | os.PathLike[str],
        *,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> StudyResults:
        """Evaluate each checkpoint that isn't yet; under torchrun, ranks share them.

        Args:
            data: the test sets, the one in-distribution first, at least two.
            output: the folder of results: one that was begun with the same options is gone on with.
            options: what the study is, for the next run to compare with; None for what this object knows.
            seed: set before each pass over the data, so that they are the same for all checkpoints.
            say: called with a line on each checkpoint.

        Raises:
            ValueError: if the folder's study has other options, the pretrained model is of another architecture or
                holds NaN, there is one test set, samples differ between passes, or no checkpoint is of any use.
            FileExistsError: if another job writes to the folder.
        """
        output = Path(output)
        checkpoints = find_checkpoints(self.patterns, self.pretrained)
        with Ranks() as ranks, ExitStack() as stack:
            lock = stack.enter_context(OutputLock(output.absolute() / "study"))
            plan = ranks.agree(lambda: self._plan(options))
            if ranks.rank == 0:
                require_writable("output", output)
            evaluator, sets, loaders = ranks.agree(lambda: self._prepare(checkpoints[0], data))
            # All ranks look before any goes on: what is there is what another run has left.
            ranks.agree(lambda: _begin(lock, plan, output) if ranks.rank == 0 else None)
            folder = output / "checkpoints"
            missing = ranks.gather(lambda: [each for each in checkpoints if not _is_done(folder, each)])[0]
            if len(missing) < len(checkpoints) and ranks.rank == 0:
                say(f"{len(checkpoints) - len(missing)} of {len(checkpoints)} checkpoints are evaluated already.")
            here = missing[ranks.rank :: ranks.size]

            def work() -> dict[str, str]:
                failed = {}
                with progress_bar("Checkpoints", len(here), enabled=ranks.rank == 0) as advance:
                    for checkpoint in here:
                        pl.seed_everything(seed, workers=True, verbose=False)
                        try:
                            result = evaluator.evaluate(checkpoint, data, sets, loaders, advance)
                        except (ValueError, OSError) as error:
                            failed[checkpoint.name] = _in_a_line(error)
                            say(f"{checkpoint.name}: left out. {failed[checkpoint.name]}")
                            continue
                        result.save(folder)
                        edits = sum(cost["seconds"] for cost in result.edits.values())
                        say(f"{checkpoint.name}: edited in {edits:.1f} s, evaluated in {result.seconds:.1f} s")
                return failed

            failed = {name: why for each in ranks.gather(work) for name, why in each.items()}
            found = [each for each in checkpoints if each.name not in failed]
            if not found:
                raise ValueError(f"Expected checkpoints that can be evaluated, but: {next(iter(failed.values()))}")
            results = [load_result(result_path(folder, each.name)) for each in found]
        require_same_samples(results)
        return StudyResults(results, failed)

    def _plan(self, options: Mapping[str, Any] | None) -> Plan:
        given = options
        if given is None:
            edits = {label: repr(edit) for label, edit in self.edits.items()}
            given = {"pretrained": self.pretrained, "edits": edits, "max_batches": self.max_batches}
        return Plan(given, Checkpoint("pretrained", self.pretrained).identity())

    def _prepare(
        self, first: Checkpoint, data: pl.LightningDataModule
    ) -> tuple[Evaluator, list[LoadedSet], Sequence[Any]]:
        """Returns what evaluates, and the test sets: all that can be wrong before the work is, here."""
        host = host_model(first.path, self.model)
        parameters = [name for name, _ in host.named_parameters()]
        depths = None
        if any(edit.wants_depth for edit in self.edits.values()):
            depths = depths_of(parameters, select_layers(host, self.layers))
        host = host.to(_device(self.device))
        w0 = weights_for(host, self.pretrained, "pretrained", self.shared, self.weights).weights
        for name, value in w0.items():
            check_finite(name, value, value)
        for edit in self.edits.values():
            edit.settings.check_patterns(w0 if not self.shared else host.state_dict())
        there = {name: value.to(next(host.parameters()).device) for name, value in w0.items()}
        sets, loaders = _test_sets(host, data)
        evaluator = Evaluator(
            host,
            there,
            self.edits,
            depths=depths,
            shared=self.shared,
            which=self.weights,
            max_batches=self.max_batches,
        )
        return evaluator, sets, loaders


def _begin(lock: OutputLock, plan: Plan, output: Path) -> None:
    lock.take()
    plan.begin(output)


class _Attached:
    """What data ask of a trainer: the model, for its preprocessing."""

    def __init__(self, model: nn.Module) -> None:
        self.lightning_module = model


def _test_sets(host: nn.Module, data: pl.LightningDataModule) -> tuple[list[LoadedSet], Sequence[Any]]:
    data.trainer = _Attached(host)  # type: ignore[assignment]
    data.prepare_data()
    data.setup("test")
    loaders = data.test_dataloader()
    sets = named_sets(loaders, data)
    if len(sets) < 2:
        raise ValueError(
            "Expected at least two test sets, one in-distribution and then those that are shifted, but got "
            f"{len(sets)}."
        )
    return sets, list(loaders.values()) if isinstance(loaders, Mapping) else list(loaders)


def _device(name: str | None) -> torch.device:
    return usable_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _is_done(folder: Path, checkpoint: Checkpoint) -> bool:
    """Returns whether there is a result of this checkpoint as it is now."""
    path = result_path(folder, checkpoint.name)
    try:
        return path.exists() and load_result(path).identity == checkpoint.identity()
    except OSError:
        return False  # of the checkpoint, which the evaluation will say


def _in_a_line(error: Exception) -> str:
    """Returns what went wrong; of a table of parameters, the first."""
    return " ".join(" ".join(str(error).splitlines()[:3]).split())
