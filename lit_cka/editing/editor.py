"""Edit a fine-tuned model and evaluate what came of it: `MonoSoupEditor`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from torch import nn
from typing_extensions import override

from lit_cka.checkpoints.state_dicts import load_into
from lit_cka.editing.artifacts import print_results
from lit_cka.editing.baselines import uniform_soup
from lit_cka.editing.depths import depths_of
from lit_cka.editing.edits import named_edits
from lit_cka.editing.evaluation_plan import EvaluationPlan
from lit_cka.editing.exporting import write_weights
from lit_cka.editing.parameter import VARIANTS, untouched
from lit_cka.editing.placement import FileBacked
from lit_cka.editing.results import EvaluationResults
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.sources import Source, copied, host_model, module_weights, weights_for
from lit_cka.editing.variant_test import VariantTest
from lit_cka.editing.weights import EditedModel, edit_state_dicts
from lit_cka.features.layers import Layers, select_layers
from lit_cka.features.lightning_private import attached_trainer, test_data
from lit_cka.features.pooling import Pooling, parse_pooling
from lit_cka.functional.rank_rules import RankRule


class MonoSoupEditor(pl.LightningModule):
    """Edits a fine-tuned model by MonoSoup, and evaluates the five variants, and baselines, in one pass over the data.

        editor = MonoSoupEditor(pretrained, finetuned)
        Trainer().test(editor, datamodule)  # every batch is loaded once, and goes through all variants
        editor.results.metrics["monosoup"]["ImageNetA"]["top1"]
        editor.export("monosoup", "monosoup.pt")  # in the format that `finetuned` has

    The data: a `lit_cka.data.TestSetsDataModule`, or any dataloaders of `(inputs, labels)`. The first is
    in-distribution, all others are shifted.

    Args:
        pretrained: W0: a module, a checkpoint file (see `lit_cka.checkpoints.load_state_dict`), or a transformers
            folder.
        finetuned: W1, in the same way.
        model: a module that takes the weights of checkpoint files, in a copy; not needed for modules and folders.
        rule: how many directions of each update are its high part: "effective_rank" (alias "freevariance",
            "vetterli") or "energy" (alias "variance").
        R: share of the energy that the high part reaches, for "energy".
        min_rel_update: weights with a smaller relative change keep their fine-tuned value.
        shared: beginnings of parameter names to take from the fine-tuned model alone, such as a new head.
        wise_ft: also evaluate WiSE-FT with these `alpha`, without CKA.
        lines: also evaluate LiNeS with these `(alpha, beta)`.
        soup: also evaluate the uniform soup with these models.
        edits: also evaluate these, by the names they are to have: options of `lit_cka.editing.EDITS`' functions, and
            under "edit" which one, if it isn't the name: `{"shrink": {}, "half": {"edit": "wise_ft", "alpha": 0.5}}`.
        include: patterns of the parameters to edit, see `EditSettings`; likewise `exclude`, `keep_pretrained` and
            `keep_finetuned`.
        layers: blocks for CKA and LiNeS, counted from the model; None for its repeated blocks.
        pooling: of the features for CKA, as in `CKACallback`.
        debiased: use the unbiased HSIC in CKA.
        variants: evaluate these alone, of the five and of those asked for above; None for all.
        evaluate: False for CKA alone, of those of its batches alone.
        cka_sets: take CKA on the test sets of these names; None for all, empty for none.
        max_cka_batches: take CKA over so many batches of each test set at most, on several ranks over the same samples;
            0 for none, None for all.
        sequential: keep the variants in files rather than in memory, and one at a time in the model: slower.
        weights: the set of weights to take from files with several ("teacher").

    Raises:
        ValueError: if weights are missing, of another shape, damaged, NaN, or pickled, or an option is out of range.

    Example:
        >>> first, second = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        >>> editor = MonoSoupEditor(first, second, layers=["0", "1"])
        >>> trainer.test(editor, datamodule)  # clean data first, then shifted  # doctest: +SKIP
        >>> list(editor.edited.variants)
        ['pretrained', 'finetuned', 'monosoup', 'highonly', 'lowonly']
    """

    def __init__(
        self,
        pretrained: Source,
        finetuned: Source,
        model: nn.Module | None = None,
        *,
        rule: RankRule = "effective_rank",
        R: float = 0.8,
        min_rel_update: float = 1e-6,
        shared: str | Sequence[str] = (),
        wise_ft: Sequence[float] = (),
        lines: tuple[float, float] | None = None,
        soup: Sequence[Source] = (),
        edits: Mapping[str, Mapping[str, Any]] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_pretrained: Sequence[str] = (),
        keep_finetuned: Sequence[str] = (),
        layers: Layers | None = None,
        pooling: Pooling = "mean",
        debiased: bool = True,
        variants: Sequence[str] | None = None,
        evaluate: bool = True,
        cka_sets: Sequence[str] | None = None,
        max_cka_batches: int | None = None,
        sequential: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        patterns = include, exclude, keep_pretrained, keep_finetuned
        self.settings = EditSettings(rule, R, min_rel_update, *patterns)
        self.edits = named_edits(edits or {}, lines, wise_ft)
        parse_pooling(pooling)  # an error rather now than in the first batch
        self.plan = EvaluationPlan(variants, evaluate, cka_sets, max_cka_batches)
        self.model = host_model(finetuned, model)
        self.layer_names = select_layers(self.model, layers)
        self.pooling = pooling
        self.debiased = debiased
        self.sequential = sequential
        self._which = weights
        self.results: EvaluationResults | None = None
        self.seconds: dict[str, float] = {}  # that the edit and the test took
        # A module in an attribute would be a part of the editor: moved, converted and put into DDP with it.
        self._file = None if isinstance(finetuned, nn.Module) else finetuned
        shared = (shared,) if isinstance(shared, str) else tuple(shared)
        # From a folder again, since its model has random numbers where the folder has none.
        w1 = weights_for(self.model, self._file or self.model, "fine-tuned", which=weights)
        self._w1, self._unused = copied(w1.weights), w1.unused
        if model is not None:
            load_into(self.model, self._w1)
        w0 = weights_for(self.model, pretrained, "pretrained", shared, weights)
        self._w0 = {**self._w1, **copied(w0.weights)}
        soups = [weights_for(self.model, source, "soup's", which=weights) for source in soup]
        self._soup = [each.weights for each in soups]
        self.plan.evaluated(self.variant_names)
        if weights is not None and not any(each.was_named for each in (w0, w1, *soups)):
            raise ValueError(f"Expected a file with a set of weights called {weights!r}, but there is none.")
        self._edited: EditedModel | None = None
        self._test: VariantTest | None = None

    def __getattr__(self, name: str) -> Any:
        """What the data ask for, such as `eval_transform` and `tokenizer_name`, is the model's."""
        if name in ("eval_transform", "num_classes", "tokenizer_name", "trust_remote_code"):
            return getattr(self.model, name)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's output, with the fine-tuned weights outside of `trainer.test`."""
        return self.model(*args, **kwargs)

    @property
    def edited(self) -> EditedModel:
        """The variants' weights, and a record per parameter; computed when first asked for, by all ranks together."""
        if self._edited is None:
            started = time.perf_counter()
            self._edited = self._edit()
            self.seconds["edit"] = time.perf_counter() - started
        return self._edited

    @property
    def variant_names(self) -> list[str]:
        """The variants that there are, known before the edit: the five, and the edits asked for."""
        return [*VARIANTS, *self.edits, *(["uniform_soup"] if self._soup else [])]

    def _edit(self) -> EditedModel:
        files: FileBacked | None = None
        if self.sequential:
            folder = tempfile.mkdtemp(prefix="monosoup-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            files = FileBacked(folder)
            self._w0, self._w1 = (
                {name: files.place(value) for name, value in weights.items()} for weights in (self._w0, self._w1)
            )
        trainer = attached_trainer(self)
        device = None if trainer is None else trainer.strategy.root_device
        edited = edit_state_dicts(
            self._w0,
            self._w1,
            self.settings,
            edits=self.edits,
            depths=depths_of(list(self._w1), self.layer_names) if self.edits else None,
            parameters=module_weights(self.model, buffers=False),
            device=device if device is not None and device.type == "cuda" else None,
            progress=trainer is None or trainer.is_global_zero,
            place=None if files is None else files.place,
        )
        edited.records += [untouched(name, shape, "no part of the model") for name, shape in self._unused.items()]
        if self._soup:
            soup = uniform_soup([self._w1, *self._soup])
            placed = soup if files is None else {name: files.place(value) for name, value in soup.items()}
            edited.variants["uniform_soup"] = placed
        return edited

    def export(self, variant: str, path: str | os.PathLike[str]) -> None:
        """Write a variant's weights in the format that the fine-tuned model came in, under the names used there.

        A checkpoint file keeps whatever else it holds; a folder is written by `save_pretrained`, with its tokenizer; of
        a module, the state dict is written, or safetensors if `path` ends so.

        Raises:
            ValueError: if there is no such variant, or `path` exists.
        """
        if variant not in self.variant_names:
            raise ValueError(f"Expected `variant` to be one of {', '.join(self.variant_names)}, but got {variant!r}.")
        write_weights(self.edited.variants[variant], path, self._file, self.model, self._which)

    @override
    def setup(self, stage: str) -> None:
        if stage != "test":
            raise ValueError(
                f"MonoSoupEditor is for `trainer.test(editor, datamodule)`, but got '{TrainerFn(stage).value}'."
            )
        self.results = None
        names = getattr(test_data(self.trainer), "test_names", None)  # of a `TestSetsDataModule`, set up by now
        if names:
            self.plan.check_sets(names)  # before the work, rather than after it
        self.edited  # noqa: B018  # on all ranks together

    @override
    def on_test_start(self) -> None:
        loop: Any = self.trainer.test_loop
        self._prints, loop.verbose = loop.verbose, False  # one compact table in place of Lightning's of all numbers
        self._started = time.perf_counter()
        self._test = VariantTest(
            self.trainer,
            self.model,
            self.edited.variants,
            self.plan,
            self.layer_names,
            self.pooling,
            debiased=self.debiased,
            copy=self.sequential,
        )

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self._test is not None
        self._test.step(batch, batch_idx, dataloader_idx)

    def results_so_far(self) -> EvaluationResults | None:
        """Returns what a test that was interrupted has evaluated, None if nothing: the test sets that it was through
        with, and in a single process the samples of the one that it was at, unless it was within a batch.
        """
        return None if self._test is None else self._test.results_so_far()

    @override
    def on_test_epoch_end(self) -> None:
        assert self._test is not None
        self.results = self._test.results()
        self.seconds["test"] = time.perf_counter() - self._started
        values = self.results.flat().items()
        # All ranks have the same values already; without `sync_dist`, Lightning warns of each.
        self.log_dict(
            {key: torch.tensor(value, dtype=torch.float32, device=self.device) for key, value in values},
            sync_dist=True,
        )

    @override
    def on_test_end(self) -> None:
        self._test = None
        if self._prints and self.trainer.is_global_zero and self.results is not None:
            print_results(self.results, self.edited.records, Console(soft_wrap=True, highlight=False))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return None
