"""The reference runs once on fixed data, and no number shows it; on data that change it runs as ever."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lit_cka import CKACallback
from tests.tracking.helpers import (
    BLOCKS,
    NUM_VAL,
    WIDTH,
    Classifier,
    Keeper,
    Net,
    dataset,
    frozen,
    hand_cka,
    loader,
    train_loader,
    trainer,
)

ESTIMATORS = pytest.mark.parametrize(
    "options", [{}, {"debiased": True}, {"estimator": "minibatch"}], ids=["exact", "debiased", "minibatch"]
)
NUM_BATCHES = 3  # of `loader()`
NUM_SANITY = 2  # batches of the sanity check, of which nothing is kept
CHANGES = "is not what it was in an earlier pass"


class Counted(Net):
    """Notes which network was called: the live one, or the reference."""

    called: ClassVar[list[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        Counted.called.append(self)
        return super().forward(x)


@pytest.fixture(autouse=True)
def _count_anew() -> Iterator[None]:
    Counted.called.clear()
    yield
    Counted.called.clear()


class Recording(Classifier):
    """Keeps the batches of every validation but the sanity check."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(Counted(width=width))
        self.seen: list[list[Any]] = []

    def on_validation_epoch_start(self) -> None:
        self.seen.append([])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking:
            self.seen[-1].append(batch)
        super().validation_step(batch, batch_idx, dataloader_idx)

    @property
    def num_reference_runs(self) -> int:
        return sum(net is not self.net for net in Counted.called)


class Run:
    """A training from the same start each time; what it did."""

    def __init__(
        self,
        folder: Path,
        data: Callable[[], Any] = loader,
        *,
        width: int = WIDTH,
        epochs: int = 3,
        training: Callable[[], DataLoader] = train_loader,
        **options: Any,
    ) -> None:
        Counted.called.clear()
        pl.seed_everything(0, verbose=False)
        self.module, self.keeper, self.callback = Recording(width), Keeper(), CKACallback(**options)
        self.before = frozen(self.module)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer(folder, self.callback, self.keeper, max_epochs=epochs).fit(self.module, training(), data())
        ours = ("what it was", "cache_memory", "bfloat16", "left out")
        self.warnings = [str(each.message) for each in seen if any(text in str(each.message) for text in ours)]
        self.num_reference_runs = self.module.num_reference_runs
        self.history = self.callback.history

    def assert_taken_by_hand(self, tolerance: float = 1e-9, **how: Any) -> None:
        epochs = [batches for batches in self.module.seen if batches]
        for record, after, batches in zip(self.history, self.keeper.models, epochs, strict=True):
            assert record["n"] == sum(len(batch[0]) for batch in batches)
            by_hand = hand_cka(self.before, after, BLOCKS, batches, **how)
            assert record["scores"] == pytest.approx(by_hand, abs=tolerance)


def shuffled() -> DataLoader:
    return loader(shuffle=True)


class Augmented(Dataset):
    """Samples with noise that is drawn each time."""

    def __init__(self) -> None:
        self.samples = dataset(NUM_VAL, 1)

    def __len__(self) -> int:
        return NUM_VAL

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples[index]
        return x + 0.5 * torch.randn(WIDTH), y


def augmented() -> DataLoader:
    return DataLoader(Augmented(), batch_size=16)


class Drifting(Dataset):
    """Samples of which some are other ones in every pass."""

    def __init__(self, num_samples: int, drifting: Iterable[int]) -> None:
        self.samples = dataset(num_samples, 1)
        self.drifting = set(drifting)
        self.passes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.passes += index == 0
        x, y = self.samples[index]
        return (x.roll(self.passes) + self.passes if index in self.drifting else x), y


def drifting(num_samples: int, indices: Iterable[int], batch_size: int = 16) -> DataLoader:
    return DataLoader(Drifting(num_samples, indices), batch_size=batch_size)


# Fixed data.


@ESTIMATORS
@pytest.mark.parametrize("kind", ["initial", "network", "module"])
def test_the_reference_runs_once_for_every_batch(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    references = {"initial": "initial", "network": Counted(), "module": Recording()}
    run = Run(tmp_path, reference=references[kind], **options)
    assert run.num_reference_runs == NUM_SANITY + NUM_BATCHES
    assert len(run.history) == 3
    before = {"initial": run.before, "network": Classifier(references[kind]), "module": references[kind]}[kind]  # type: ignore[arg-type]
    assert before is not None
    run.before = before
    run.assert_taken_by_hand(**options)


@ESTIMATORS
@pytest.mark.parametrize("kind", ["initial", "network"])
def test_the_cache_changes_no_bit_of_the_history(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    reference = Counted() if kind == "network" else kind
    cached, plain = (Run(tmp_path, reference=reference, cache_memory=size, **options) for size in (4.0, 0))
    assert cached.history == plain.history
    assert plain.num_reference_runs == NUM_SANITY + 3 * NUM_BATCHES
    assert cached.warnings == plain.warnings == []
    assert min(cached.callback.scores.values()) < 0.9  # far from the trivial answer


def test_data_of_many_batches(tmp_path: Path) -> None:
    """More samples than are gathered before they are added up."""
    data = functools.partial(loader, 2500, batch_size=300)
    cached, plain = (Run(tmp_path, data, cache_memory=size) for size in (4.0, 0))
    assert cached.history == plain.history
    assert cached.num_reference_runs == NUM_SANITY + 9


def test_several_dataloaders_are_kept_apart(tmp_path: Path) -> None:
    def loaders() -> list[DataLoader]:
        return [loader(44, seed=1), loader(37, seed=2)]

    cached, plain = (Run(tmp_path, loaders, cache_memory=size) for size in (4.0, 0))
    assert cached.history == plain.history
    assert [record["n"] for record in cached.history] == [44, 37] * 3
    assert cached.num_reference_runs == 2 * (NUM_SANITY + 3)
    assert cached.warnings == []


def test_max_batches_are_all_that_the_reference_sees(tmp_path: Path) -> None:
    cached, plain = (Run(tmp_path, max_batches=2, cache_memory=size) for size in (4.0, 0))
    assert cached.history == plain.history
    assert [record["n"] for record in cached.history] == [32] * 3
    assert cached.num_reference_runs == NUM_SANITY + 2


def test_skipped_validations_keep_the_cache(tmp_path: Path) -> None:
    cached, plain = (Run(tmp_path, every_n_validations=2, epochs=5, cache_memory=size) for size in (4.0, 0))
    assert cached.history == plain.history
    assert [record["epoch"] for record in cached.history] == [0, 2, 4]
    assert cached.num_reference_runs == NUM_SANITY + NUM_BATCHES


def test_a_sanity_check_of_all_batches_leaves_nothing(tmp_path: Path) -> None:
    module, callback = Recording(), CKACallback()
    trainer(tmp_path, callback, num_sanity_val_steps=-1).fit(module, train_loader(), loader())
    assert module.num_reference_runs == 2 * NUM_BATCHES


def test_the_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ways = [{}, {"cache_memory": 0}, {"cache_dtype": "bfloat16"}]
    weights = []
    for callbacks in ([], *([CKACallback(**options)] for options in ways)):
        pl.seed_everything(3, verbose=False)
        module = Classifier(Net(dropout=0.3))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"(?s).*({CHANGES}|in bfloat16 can change)")
            trainer(tmp_path, *callbacks, max_epochs=3).fit(module, train_loader(), augmented())
        weights.append((module.losses, torch.get_rng_state(), *module.state_dict().values()))
    for other in weights[1:]:
        assert other[0] == weights[0][0]
        assert all(map(torch.equal, other[1:], weights[0][1:]))


# Several evaluations with one callback.


def test_validations_and_tests_are_kept_apart(tmp_path: Path) -> None:
    before, module = Classifier(), Recording()
    callback = CKACallback(reference=Counted())
    other = CKACallback(reference=callback.options.reference, cache_memory=0, prefix="plain")
    run = trainer(tmp_path, callback, other)
    for stage in ("validate", "test", "test", "validate"):
        data = loader() if stage == "validate" else loader(30, seed=5)
        getattr(run, stage)(module, data, verbose=False)
    before.net = callback.options.reference  # type: ignore[assignment]
    assert callback.history == other.history
    assert module.num_reference_runs == (3 + 2) + 2 * (3 + 2)  # once, and without a cache each time
    for record in callback.history:
        data = loader() if record["stage"] == "validate" else loader(30, seed=5)
        assert record["scores"] == pytest.approx(hand_cka(before, module, BLOCKS, data), abs=1e-9)


def test_the_same_samples_in_validation_and_test_are_no_change(tmp_path: Path) -> None:
    module, callback = Recording(), CKACallback(reference=Counted())
    run = trainer(tmp_path, callback)
    for stage in ("validate", "test"):
        getattr(run, stage)(module, loader(), verbose=False)
    assert callback.history[0]["scores"] == callback.history[1]["scores"]


@ESTIMATORS
def test_other_numbers_of_batches_than_before(tmp_path: Path, options: dict[str, Any]) -> None:
    reference, module = Counted(), Recording()
    callback = CKACallback(reference=reference, **options)
    for limit in (4, 3, 6, 3, 1.0):
        run = trainer(tmp_path, callback, limit_val_batches=limit)
        run.validate(module, loader(96), verbose=False)
        batches = list(loader(96))[: limit if isinstance(limit, int) else None]
        assert callback.history[-1]["n"] == 16 * len(batches)
        by_hand = hand_cka(Classifier(reference), module, BLOCKS, batches, **options)
        assert callback.scores == pytest.approx(by_hand, abs=1e-9)
        Counted.called[:] = [net for net in Counted.called if net is reference and not net.training]
    by_callback = module.num_reference_runs - sum((4, 3, 6, 3, 6))  # less those by hand
    assert by_callback == 6


def test_more_samples_of_the_same_beginning(tmp_path: Path) -> None:
    reference, module = Counted(), Recording()
    callback, samples = CKACallback(reference=reference), dataset(80)
    for n in (48, 80, 64):
        data = DataLoader(Subset(samples, range(n)), batch_size=16)
        trainer(tmp_path, callback).validate(module, data, verbose=False)
        runs = module.num_reference_runs
        assert callback.scores == pytest.approx(hand_cka(Classifier(reference), module, BLOCKS, data), abs=1e-9)
        del Counted.called[-(2 * n // 16) :]  # by hand
    assert runs == 5


def test_data_that_change_between_two_validations(tmp_path: Path) -> None:
    reference, module = Counted(), Recording()
    callback = CKACallback(reference=reference)
    for i, seed in enumerate((1, 2, 2, 1)):
        run = functools.partial(trainer(tmp_path, callback).validate, module, loader(seed=seed), verbose=False)
        if i == 1:
            with pytest.warns(UserWarning, match=f"Batch 0 of validate dataloader 0 {CHANGES}") as seen:
                run()
            assert len([each for each in seen if CHANGES in str(each.message)]) == 1
        else:
            run()
        by_hand = hand_cka(Classifier(reference), module, BLOCKS, loader(seed=seed))
        assert callback.scores == pytest.approx(by_hand, abs=1e-9)


def test_weights_that_change_between_two_validations(tmp_path: Path) -> None:
    reference, module = Counted(), Recording()
    callback = CKACallback(reference=reference)
    scores = []
    for _ in range(3):
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
        by_hand = hand_cka(Classifier(reference), module, BLOCKS, loader())
        assert callback.scores == pytest.approx(by_hand, abs=1e-9)
        scores.append(callback.scores)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert all(abs(one[BLOCKS[2]] - other[BLOCKS[2]]) > 1e-3 for one, other in ((scores[0], scores[1]), scores[1:]))


def test_another_module_is_compared_with_the_same_cached_features(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = Recording()
    num_before = sum(net is not other.net for net in Counted.called)
    trainer(tmp_path, run.callback).validate(other, loader(), verbose=False)
    assert sum(net is not other.net for net in Counted.called) == num_before
    assert run.callback.scores == pytest.approx(hand_cka(run.before, other, BLOCKS, loader()), abs=1e-9)


def test_a_second_fit_of_another_module_starts_an_empty_cache(tmp_path: Path) -> None:
    run = Run(tmp_path)
    Counted.called.clear()
    second = Recording()
    before = frozen(second)
    trainer(tmp_path, run.callback).fit(second, train_loader(), loader())
    assert second.num_reference_runs == NUM_SANITY + NUM_BATCHES
    assert run.callback.scores == pytest.approx(hand_cka(before, second, BLOCKS, loader()), abs=1e-9)


def test_another_precision_is_a_change(tmp_path: Path) -> None:
    """The same batches, but the reference would compute them otherwise now."""
    callback, plain = (CKACallback(reference=Net(), cache_memory=size, prefix=str(size)) for size in (4.0, 0))
    plain.reference = callback.options.reference
    module = Classifier()
    trainer(tmp_path, callback, plain).validate(module, loader(), verbose=False)
    with pytest.warns(UserWarning, match=CHANGES):
        trainer(tmp_path, callback, plain, precision="bf16-mixed").validate(module, loader(), verbose=False)
    assert callback.history == plain.history
    assert callback.history[0]["scores"] != callback.history[1]["scores"]


# Data that change from pass to pass.


@ESTIMATORS
@pytest.mark.parametrize("data", [shuffled, augmented])
def test_shuffled_and_augmented_data(tmp_path: Path, data: Callable[[], DataLoader], options: dict[str, Any]) -> None:
    cached, plain = (Run(tmp_path, data, cache_memory=size, **options) for size in (4.0, 0))
    assert len(cached.warnings) == 1
    assert f"Batch 0 of validate dataloader 0 {CHANGES}" in cached.warnings[0]
    assert plain.warnings == []
    assert cached.history == plain.history
    assert cached.num_reference_runs == NUM_SANITY + 3 * NUM_BATCHES
    cached.assert_taken_by_hand(**options)


@ESTIMATORS
@pytest.mark.parametrize("indices", [range(1), range(20, 23), range(16, 44), range(43, 44)], ids=str)
def test_a_pass_that_differs_in_some_samples(tmp_path: Path, indices: range, options: dict[str, Any]) -> None:
    data = functools.partial(drifting, NUM_VAL, indices)
    cached, plain = (Run(tmp_path, data, cache_memory=size, **options) for size in (4.0, 0))
    assert len(cached.warnings) == 1
    changed = indices[0] // 16
    assert f"Batch {changed} of validate dataloader 0 {CHANGES}" in cached.warnings[0]
    assert cached.history == plain.history
    # What came before was found; after that, nothing ever was.
    assert cached.num_reference_runs == NUM_SANITY + NUM_BATCHES + (NUM_BATCHES - changed) + NUM_BATCHES
    cached.assert_taken_by_hand(**options)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("indices", [range(1), range(700, 701), range(1300, 1301), range(2499, 2500)], ids=str)
def test_a_pass_of_many_batches_that_differs_in_one_sample(tmp_path: Path, indices: range, debiased: bool) -> None:
    """Some of them have been added up by then, without the reference's own sums."""
    data = functools.partial(drifting, 2500, indices, batch_size=300)
    cached, plain = (Run(tmp_path, data, epochs=2, debiased=debiased, cache_memory=size) for size in (4.0, 0))
    assert len(cached.warnings) == 1
    for one, other in zip(cached.history, plain.history, strict=True):
        assert one["n"] == other["n"] == 2500
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-12)


def test_one_of_two_dataloaders_changes(tmp_path: Path) -> None:
    def loaders() -> list[DataLoader]:
        return [loader(44, seed=1), loader(37, seed=2, shuffle=True)]

    cached, plain = (Run(tmp_path, loaders, cache_memory=size) for size in (4.0, 0))
    assert len(cached.warnings) == 1
    assert f"of validate dataloader 1 {CHANGES}" in cached.warnings[0]
    assert cached.history == plain.history
    assert cached.num_reference_runs == 2 * NUM_SANITY + 3 + 3 * 3


# The budget.


@ESTIMATORS
def test_a_budget_for_some_of_the_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    two_and_a_half = 2.5 * 3 * 16 * WIDTH * 8 / 2**30  # batches of three layers
    cached, plain = (Run(tmp_path, cache_memory=size, **options) for size in (two_and_a_half, 0))
    assert len(cached.warnings) == 1
    assert "The reference's features take more than" in cached.warnings[0]
    assert cached.history == plain.history
    assert cached.num_reference_runs == NUM_SANITY + NUM_BATCHES + 2 * 1
    cached.assert_taken_by_hand(**options)


def test_a_budget_for_nothing(tmp_path: Path) -> None:
    cached, plain = (Run(tmp_path, cache_memory=size) for size in (1e-9, 0))
    assert len(cached.warnings) == 1
    assert cached.history == plain.history
    assert cached.num_reference_runs == plain.num_reference_runs


# Rounding.


@ESTIMATORS
def test_rounding_that_costs_little_is_accepted(tmp_path: Path, options: dict[str, Any]) -> None:
    data = lambda: DataLoader(dataset(400, 1, 24), batch_size=50)  # noqa: E731
    how = {"width": 24, "training": lambda: DataLoader(dataset(32, 0, 24), batch_size=8), **options}
    rounded, plain = (Run(tmp_path, data, cache_dtype=dtype, **how) for dtype in ("bfloat16", "float64"))
    assert rounded.warnings == []
    assert rounded.num_reference_runs == plain.num_reference_runs == NUM_SANITY + 8
    for one, other in zip(rounded.history, plain.history, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
    assert rounded.history[0] == plain.history[0]  # the first pass has the features as they are
    assert rounded.history[2] != plain.history[2]  # and the last one the rounded ones


def narrow() -> DataLoader:
    """Few samples of one feature, whose rounding does not average out."""
    x, y = torch.randn(20, 1, generator=torch.Generator().manual_seed(1)) + 2, torch.arange(20) % 2
    return DataLoader(TensorDataset(x, y), batch_size=5)


@ESTIMATORS
def test_rounding_that_costs_much_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    pl.seed_everything(5, verbose=False)
    reference = Counted(width=1)
    how = {"width": 1, "reference": reference, "training": narrow, **options}
    rounded, plain = (Run(tmp_path, narrow, cache_dtype=dtype, **how) for dtype in ("bfloat16", "float64"))
    assert len(rounded.warnings) == 1
    assert "in bfloat16 can change CKA by" in rounded.warnings[0]
    assert rounded.history == plain.history
    assert rounded.num_reference_runs == NUM_SANITY + 2 * 4  # the second pass keeps them as they are
    assert plain.num_reference_runs == NUM_SANITY + 4


# At first both are the same, and rounding one of two equal ones costs least.
def test_rounding_is_judged_by_what_it_costs_later(tmp_path: Path) -> None:
    rounded = CKACallback(cache_dtype="bfloat16", prefix="rounded")
    plain, module = CKACallback(cache_memory=0), Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Keeping the reference's features in bfloat16")
        for _ in range(2):
            trainer(tmp_path, rounded, plain).validate(module, loader(), verbose=False)
        trainer(tmp_path, rounded, plain).fit(module, train_loader(), loader())
    for one, other in zip(rounded.history, plain.history, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


# Models of several inputs.


class TwoInputs(pl.LightningModule):
    """Two encoders, each fed from the batch, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Counted(), Counted()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.left(batch["x"]), self.right(batch["y"]) + 1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pairs(Dataset):
    """Of which the second inputs may be other ones in each pass."""

    def __init__(self, fixed: bool) -> None:
        (self.x, _), self.fixed = dataset(NUM_VAL).tensors, fixed

    def __len__(self) -> int:
        return NUM_VAL

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = 0 if self.fixed else torch.randn(WIDTH)
        return {"x": self.x[index], "y": self.x[index].flip(0) + noise}


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "one of two augmented"])
def test_two_inputs_of_one_batch(tmp_path: Path, fixed: bool) -> None:
    histories, numbers = [], []
    for size in (4.0, 0):
        Counted.called.clear()
        pl.seed_everything(0, verbose=False)
        module, callback = TwoInputs(), CKACallback(cache_memory=size)
        run = trainer(tmp_path, callback, max_epochs=3)
        data = DataLoader(Pairs(fixed), batch_size=16)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run.fit(module, data, data)
        changes = [str(each.message) for each in seen if CHANGES in str(each.message)]
        assert len(changes) == (0 if fixed or not size else 1)
        histories.append(callback.history)
        numbers.append(sum(net not in (module.left, module.right) for net in Counted.called))
    assert histories[0] == histories[1]
    assert list(histories[0][0]["scores"]) == [f"{side}.blocks.{i}" for side in ("left", "right") for i in range(3)]
    assert numbers[1] == 2 * (NUM_SANITY + 3 * NUM_BATCHES)
    # The first input of the first batch is found in the second pass, before the second one shows the change.
    assert numbers[0] == (2 * (NUM_SANITY + NUM_BATCHES) if fixed else numbers[1] - 1)


class Drawing(Counted):
    """Adds noise, also in evaluation: as variational and masked autoencoders do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.randn_like(x))


class DrawingNumPy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(np.random.randn()) * x.flip(1))


class DrawingPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + random.random() * x.flip(1))


# The reference draws the same numbers as the live model when both run.
@pytest.mark.parametrize("kind", [Drawing, DrawingNumPy, DrawingPython])
def test_a_model_that_draws_random_numbers(tmp_path: Path, kind: type[Net]) -> None:
    module, callback = Classifier(kind()), CKACallback()
    with pytest.warns(UserWarning, match="The model draws random numbers in evaluation: the reference runs again"):
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    for _ in range(2):
        assert callback.scores == pytest.approx(dict.fromkeys(BLOCKS, 1.0))
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
