"""`MonoSoupEditor` in a trainer: where its models come from, what it leaves behind, what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_cka import MonoSoupEditor
from lit_cka.data import ImageFolderTestsDataModule, TestSet, TestSetsDataModule
from lit_cka.editing.settings import EditSettings
from lit_cka.editing.weights import edit_state_dicts
from lit_cka.models import ImageClassifier
from tests.editing.evaluation_worker import NUM_CLASSES, Sets, models, samples, weights
from tests.small_models import image_folder
from tests.sync_worker import run_to_end
from tests.tracking.helpers import WIDTH, Classifier, Net, trainer

VARIANTS = ["pretrained", "finetuned", "monosoup", "highonly", "lowonly"]


def loader(n: int = 20) -> DataLoader[Any]:
    return DataLoader(samples(n, 0), batch_size=8)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def num_hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def files(folder: Path) -> tuple[Path, Path]:
    for name, model in zip(("pretrained", "finetuned"), models(), strict=True):
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder / "pretrained.pt", folder / "finetuned.pt"


class TestSources:
    def test_files_give_what_modules_give(self, tmp_path: Path) -> None:
        one = MonoSoupEditor(*models())
        two = MonoSoupEditor(*files(tmp_path), Classifier(Net(num_classes=NUM_CLASSES)))
        for editor in (one, two):
            trainer(tmp_path).test(editor, loader(), verbose=False)
        for variant, expected in one.edited.variants.items():
            assert_equal(two.edited.variants[variant], expected)
        assert two.results == one.results
        mixed = MonoSoupEditor(models()[0], tmp_path / "finetuned.pt", Classifier(Net(num_classes=NUM_CLASSES)))
        assert_equal(mixed.edited.variants["monosoup"], one.edited.variants["monosoup"])

    def test_variants_are_those_of_the_state_dicts(self) -> None:
        pretrained, finetuned = models()
        editor = MonoSoupEditor(pretrained, finetuned, rule="energy", R=0.6, min_rel_update=0.01)
        parameters = [name for name, _ in finetuned.named_parameters()]
        settings = EditSettings("energy", 0.6, 0.01)
        expected = edit_state_dicts(weights(pretrained), weights(finetuned), settings, parameters=parameters)
        assert list(editor.edited.variants) == VARIANTS
        for variant in VARIANTS:
            assert_equal(editor.edited.variants[variant], expected.variants[variant])
        assert editor.edited.records == expected.records
        assert sum(record["reason"] is None for record in editor.edited.records) == 4

    def test_pretrained_has_its_own_running_statistics_and_the_others_the_finetuned(self) -> None:
        pretrained, finetuned = models()
        editor, name = MonoSoupEditor(pretrained, finetuned), "net.blocks.1.norm.running_mean"
        for variant in VARIANTS:
            of = pretrained if variant == "pretrained" else finetuned
            assert torch.equal(editor.edited.variants[variant][name], of.state_dict()[name])

    def test_later_training_of_the_users_modules_changes_nothing(self, tmp_path: Path) -> None:
        pretrained, finetuned = models()
        editor, expected = MonoSoupEditor(pretrained, finetuned), MonoSoupEditor(*models())
        with torch.no_grad():
            for parameter in (*pretrained.parameters(), *finetuned.parameters()):
                parameter.zero_()
        for variant in VARIANTS:
            assert_equal(editor.edited.variants[variant], expected.edited.variants[variant])

    def test_names_of_compiled_or_wrapped_modules(self) -> None:
        pretrained, finetuned = models()
        editor = MonoSoupEditor(nn.DataParallel(pretrained), finetuned)
        expected = MonoSoupEditor(*models())
        assert_equal(editor.edited.variants["monosoup"], expected.edited.variants["monosoup"])

    def test_baselines(self) -> None:
        other = copy.deepcopy(models()[1])
        with torch.no_grad():
            other.net.head.weight.zero_()
        editor = MonoSoupEditor(*models(), wise_ft=(0.0, 0.3, 1.0), lines=(0.2, 0.8), soup=[other, models()[1]])
        before, after = map(weights, models())
        variants = editor.edited.variants
        assert list(variants) == [*VARIANTS, "lines", "wise_ft_0", "wise_ft_0.3", "wise_ft_1", "uniform_soup"]
        assert list(variants) == editor.variant_names
        name = "net.head.weight"
        torch.testing.assert_close(variants["wise_ft_0.3"][name], 0.7 * before[name] + 0.3 * after[name])
        torch.testing.assert_close(variants["uniform_soup"][name], after[name] * 2 / 3)
        for depth, share in enumerate((0.2, 0.6, 1.0)):
            name = f"net.blocks.{depth}.linear.weight"
            torch.testing.assert_close(variants["lines"][name], before[name] + share * (after[name] - before[name]))


class TestTheUsersModules:
    def test_stay_as_they_are(self, tmp_path: Path) -> None:
        """Weights, dtype, mode, gradients, hooks and trainer; whatever the precision of the test."""
        pretrained, finetuned = models()
        model = Classifier(Net(num_classes=NUM_CLASSES))
        finetuned.net.head.bias.requires_grad_(False)
        modules = (pretrained, finetuned, model)
        before = [weights(module) for module in modules]
        flags = [[(parameter.requires_grad, id(parameter)) for parameter in module.parameters()] for module in modules]
        _, file = files(tmp_path)
        for editor in (
            MonoSoupEditor(pretrained, finetuned, soup=[finetuned]),
            MonoSoupEditor(pretrained, file, model, sequential=True),
        ):
            trainer(tmp_path, precision="bf16-true").test(editor, loader(), verbose=False)
            assert not {id(module) for module in editor.modules()} & {id(module) for module in modules}
        for module, weights_before, flags_before in zip(modules, before, flags, strict=True):
            assert_equal(weights(module), weights_before)
            assert [(parameter.requires_grad, id(parameter)) for parameter in module.parameters()] == flags_before
            assert module.training
            assert module._trainer is None
            assert num_hooks(module) == 0

    def test_can_be_trained_afterwards(self, tmp_path: Path) -> None:
        pretrained, finetuned = models()
        trainer(tmp_path).test(MonoSoupEditor(pretrained, finetuned), loader(), verbose=False)
        for module in (pretrained, finetuned):
            trainer(tmp_path, max_epochs=1).fit(module, loader(8), loader(8))


class Failing(Dataset[Any]):
    """Raises at a sample within the second batch, the first time that it is read."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == 12 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return samples(20, 0)[index]


class Fails(Classifier):
    """Raises in the middle of its forward pass, in the second batch, with the weights of the third variant."""

    error: ClassVar[BaseException | None] = None
    num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        output = super().forward(x)
        if self.num_calls == 8 and Fails.error is not None:
            raise Fails.error
        return output


@pytest.fixture
def handler() -> Iterator[None]:
    """Lightning has interrupts ignored from the first on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class TestAfterwards:
    @pytest.mark.parametrize("sequential", [False, True])
    def test_the_module_has_the_finetuned_weights(self, tmp_path: Path, sequential: bool) -> None:
        model = Classifier(Net(num_classes=NUM_CLASSES))
        for editor in (
            MonoSoupEditor(*models(), sequential=sequential),
            MonoSoupEditor(*files(tmp_path), model, sequential=sequential),
        ):
            x = samples(20, 0).tensors[0]
            expected = models()[1].eval()(x)
            for _ in range(2):
                assert torch.equal(editor(x), expected)
                assert_equal(weights(editor.model), weights(models()[1]))
                trainer(tmp_path).test(editor, loader(), verbose=False)
            assert torch.equal(editor(x), expected)
            assert_equal(weights(editor.model), weights(models()[1]))
            assert num_hooks(editor) == 0
            assert not any(parameter.requires_grad for parameter in editor.parameters())

    @pytest.mark.usefixtures("handler")
    @pytest.mark.parametrize("sequential", [False, True])
    @pytest.mark.parametrize("error", [ZeroDivisionError("bad"), KeyboardInterrupt()], ids=["error", "interrupt"])
    @pytest.mark.parametrize("where", ["data", "model"])
    def test_errors_leave_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, sequential: bool
    ) -> None:
        expected = MonoSoupEditor(*models())
        trainer(tmp_path).test(expected, loader(), verbose=False)
        pair = [Fails(model.net) for model in models()]
        editor = MonoSoupEditor(*pair, sequential=sequential)
        monkeypatch.setattr(Fails, "error", error if where == "model" else None)
        data = DataLoader(Failing(error), batch_size=8) if where == "data" else loader()
        # Lightning ends the program at an interrupt.
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
            trainer(tmp_path).test(editor, data, verbose=False)
        assert_equal(weights(editor.model), weights(models()[1]))
        assert num_hooks(editor) == 0
        assert editor.results is None
        monkeypatch.setattr(Fails, "error", None)
        trainer(tmp_path).test(editor, data, verbose=False)
        assert editor.results == expected.results

    def test_second_test_is_of_its_own_data(self, tmp_path: Path) -> None:
        editor, run = MonoSoupEditor(*models()), trainer(tmp_path)
        run.test(editor, Sets(), verbose=False)
        first = editor.results
        run.test(editor, loader(11), verbose=False)
        assert editor.results.num_samples == {"test_0": 11}
        trainer(tmp_path).test(editor, Sets(), verbose=False)
        assert editor.results == first

    def test_no_tensor_is_of_inference_mode(self, tmp_path: Path) -> None:
        """Such a one could never be trained, nor written to."""
        editor = MonoSoupEditor(*models())
        trainer(tmp_path).test(editor, loader(), verbose=False)
        tensors = [*weights(editor.model).values()]
        tensors += [value for each in editor.edited.variants.values() for value in each.values()]
        assert not any(value.is_inference() for value in tensors)
        assert not any(value.is_inference() for value in editor.model.state_dict().values())


class TestSequential:
    def test_gives_the_same(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"wise_ft": (0.5,), "lines": (0.3, 0.6), "soup": [models()[0]]}
        editors = [MonoSoupEditor(*models(), sequential=sequential, **options) for sequential in (False, True)]
        for editor in editors:
            trainer(tmp_path).test(editor, Sets(), verbose=False)
        assert editors[1].results == editors[0].results
        assert editors[1].edited.records == editors[0].edited.records
        for variant, expected in editors[0].edited.variants.items():
            assert_equal(editors[1].edited.variants[variant], expected)

    def test_tied_weights_are_edited_once(self, tmp_path: Path) -> None:
        pair = models()
        for model in pair:
            model.net.blocks[2].linear.weight = model.net.blocks[0].linear.weight
        found = [MonoSoupEditor(*pair, sequential=sequential) for sequential in (False, True)]
        for editor in found:
            reasons = {record["name"]: record["reason"] for record in editor.edited.records}
            assert reasons["net.blocks.2.linear.weight"] == "tied to net.blocks.0.linear.weight"
            trainer(tmp_path).test(editor, loader(), verbose=False)
            assert editor.model.net.blocks[2].linear.weight is editor.model.net.blocks[0].linear.weight
        assert found[0].results == found[1].results

    def test_files_go_with_the_editor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        editor = MonoSoupEditor(*models(), sequential=True)
        trainer(tmp_path).test(editor, loader(), verbose=False)
        (folder,) = (tmp_path / "temporary").iterdir()
        names = len({value.data_ptr() for each in editor.edited.variants.values() for value in each.values()})
        assert len(list(folder.iterdir())) == names
        del editor
        gc.collect()
        assert list((tmp_path / "temporary").iterdir()) == []


class TestPrecision:
    @pytest.mark.parametrize(("precision", "close"), [("64-true", 1e-5), ("bf16-mixed", 0.1), ("bf16-true", 0.2)])
    def test_numbers_are_near_those_of_float32(self, tmp_path: Path, precision: Any, close: float) -> None:
        editor, expected = MonoSoupEditor(*models()), MonoSoupEditor(*models())
        trainer(tmp_path).test(expected, loader(), verbose=False)
        trainer(tmp_path, precision=precision).test(editor, loader(), verbose=False)
        for variant in VARIANTS:
            found, right = (each.results.metrics[variant]["test_0"] for each in (editor, expected))
            assert found["loss"] == pytest.approx(right["loss"], rel=close)
            assert found["loss"] != right["loss"]
            assert found["top1"] == pytest.approx(right["top1"], abs=close)
            if variant != "pretrained":
                scores = (each.results.cka["test_0"][variant] for each in (editor, expected))
                assert next(scores) == pytest.approx(next(scores), abs=close / 4)
        # The edit itself does not depend on it.
        assert_equal(editor.edited.variants["monosoup"], expected.edited.variants["monosoup"])
        assert editor.edited.variants["monosoup"]["net.head.weight"].dtype == torch.float32


class TestNames:
    def test_of_dataloaders(self, tmp_path: Path) -> None:
        for loaders, names in (
            (loader(), ["test_0"]),
            ([loader(), loader(9)], ["test_0", "test_1"]),
            ({"near": loader(), "far": loader(9)}, ["near", "far"]),
        ):
            editor = MonoSoupEditor(*models())
            trainer(tmp_path).test(editor, loaders, verbose=False)
            assert editor.results.test_names == names

    def test_datamodule_of_another_kind(self, tmp_path: Path) -> None:
        class Other(pl.LightningDataModule):
            test_sets = [samples(20, 0)]  # noqa: RUF012  # of other things than test sets

            def test_dataloader(self) -> Any:
                return loader()

        editor = MonoSoupEditor(*models())
        trainer(tmp_path).test(editor, datamodule=Other(), verbose=False)
        assert editor.results.test_names == ["test_0"]

    def test_the_data_get_to_know_the_model(self, tmp_path: Path) -> None:
        root = image_folder(tmp_path / "data")
        folders = {"same": str(root / "val"), "shifted": str(root / "test")}
        options = {"img_size": 224, "patch_size": 56, "embed_dim": 16, "depth": 2, "num_heads": 2}

        def vit(num_classes: int) -> ImageClassifier:
            return ImageClassifier("vit_tiny_patch16_224", num_classes, model_kwargs=options)

        editor = MonoSoupEditor(vit(3), vit(3))
        data = ImageFolderTestsDataModule(folders, batch_size=5, num_workers=0)
        trainer(tmp_path).test(editor, data, verbose=False)
        assert editor.results.num_samples == {"same": 12, "shifted": 12}
        with pytest.raises(ValueError, match="model of the test sets' 3 classes, but it has 4"):
            trainer(tmp_path).test(MonoSoupEditor(vit(4), vit(4)), data, verbose=False)
        assert not hasattr(MonoSoupEditor(*models()), "tokenizer_name")


def bad_batches(*batches: Any) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)


X = torch.randn(4, WIDTH)


class Empty(TestSetsDataModule):
    def read_test_sets(self) -> list[TestSet]:
        return []


class TestMisuse:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rule": "all"}, "Expected `rule` to be one of 'effective_rank', .* but got 'all'"),
            ({"rule": "energy", "R": 0.0}, r"Expected `R`.* in \(0, 1\], but got 0.0"),
            ({"rule": "energy", "R": 1.1}, r"Expected `R`.* in \(0, 1\], but got 1.1"),
            ({"rule": "energy", "R": float("nan")}, "Expected `R`"),
            ({"min_rel_update": -1.0}, "Expected `min_rel_update` to be at least 0, but got -1.0"),
            ({"max_cka_batches": -1}, "Expected `max_cka_batches` to be at least 0, or None, but got -1"),
            ({"layers": "net.block.0"}, "net.blocks.0"),
            ({"pooling": "median"}, "Expected `pooling`.*median"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MonoSoupEditor(*models(), **options)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (bad_batches((X, torch.tensor([0, 1, 2, NUM_CLASSES]))), "labels from 0 to 6, .* labels from 0 to 7"),
            (bad_batches((X, torch.tensor([0, 1, 2, -1]))), "labels from 0 to 6, .* labels from -1 to 2"),
            (bad_batches((X, torch.rand(4))), r"whole labels \(samples,\), .* torch.float32 labels"),
            (bad_batches((torch.randn(7, WIDTH), torch.eye(7).long())), r"labels of shape \(7, 7\)"),
            (bad_batches((X, torch.zeros(3).long())), r"labels of shape \(3,\)"),
            (bad_batches(X), "batches `\\(inputs, labels\\)`, .* a batch of type Tensor"),
            (bad_batches((X, X, X)), "batch of type (list|tuple)"),
            (bad_batches({"x": X}), "batch of type dict"),
            (bad_batches("text"), "batch of type str"),
            ([loader(), DataLoader(samples(0, 0))], "all test sets to have samples, but 'test_1' had none"),
            ([DataLoader(samples(0, 0)), loader()], "all test sets to have samples, but 'test_0' had none"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`", "ignore:Total length of `DataLoader`")
    def test_data(self, tmp_path: Path, data: Any, message: str) -> None:
        editor = MonoSoupEditor(*models())
        with pytest.raises(ValueError, match=f"(?s){message}"):
            trainer(tmp_path).test(editor, data, verbose=False)
        assert num_hooks(editor) == 0
        assert_equal(weights(editor.model), weights(models()[1]))

    def test_no_test_set(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one test set, but got none"):
            trainer(tmp_path).test(MonoSoupEditor(*models()), Empty(), verbose=False)

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ("fit", r"No `training_step\(\)` method"),
            ("validate", r"No `validation_step\(\)` method"),
            ("predict", r"is for `trainer.test\(editor, datamodule\)`, but got 'predict'"),
        ],
    )
    def test_other_stages(self, tmp_path: Path, stage: str, message: str) -> None:
        with pytest.raises((ValueError, MisconfigurationException), match=message):
            getattr(trainer(tmp_path), stage)(MonoSoupEditor(*models()), loader())

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("role", ["pretrained", "fine-tuned"])
    def test_damaged_weights_are_named(self, tmp_path: Path, role: str, value: float) -> None:
        pair = models()
        with torch.no_grad():
            pair[role != "pretrained"].net.blocks[1].linear.weight[2, 3] = value
        editor = MonoSoupEditor(*pair)
        name = re.escape("'net.blocks.1.linear.weight'")
        with pytest.raises(ValueError, match=f"{name} of the {role} model holds NaN or infinity"):
            trainer(tmp_path).test(editor, loader(), verbose=False)

    def test_layer_that_does_not_run(self, tmp_path: Path) -> None:
        class Idle(Classifier):
            def __init__(self, net: nn.Module) -> None:
                super().__init__(net)
                self.idle = nn.Linear(3, 3)

        editor = MonoSoupEditor(*(Idle(model.net) for model in models()), layers=["net.blocks.*", "idle"])
        with pytest.raises(ValueError, match="Layer 'idle' has not run"):
            trainer(tmp_path).test(editor, loader(), verbose=False)
        assert num_hooks(editor) == 0

    def test_model_of_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`model=`, a module that takes the weights in '.*finetuned\.pt'"):
            MonoSoupEditor(*files(tmp_path))


def test_many_threads_of_data(tmp_path: Path) -> None:
    """Worker processes that load the data give the same."""
    data, editors = samples(20, 0), [MonoSoupEditor(*models()) for _ in range(2)]
    for editor, num_workers in zip(editors, (0, 2), strict=True):
        run = DataLoader(
            data, batch_size=8, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None
        )
        trainer(tmp_path).test(editor, run, verbose=False)
    assert editors[0].results == editors[1].results


@pytest.mark.slow
def test_sequential_takes_less_memory_for_the_same_results(tmp_path: Path) -> None:
    """One module and a copy of its own weights, next to one module and five sets."""
    found = {}
    for mode in ("together", "sequential"):
        run_to_end(str(Path(__file__).with_name("memory_worker.py")), mode, tmp_path / mode, seconds=100)
        found[mode] = json.loads((tmp_path / mode).read_text())
    assert found["together"]["metrics"] == found["sequential"]["metrics"]
    assert 5.5 < found["together"]["models"] < 6.8
    assert found["sequential"]["models"] < 2.8


def test_a_trainer_that_had_a_datamodule_forgets_its_names(tmp_path: Path) -> None:
    run, editor = trainer(tmp_path), MonoSoupEditor(*models())
    run.test(editor, datamodule=Sets(), verbose=False)
    assert editor.results is not None
    assert "test_0" not in editor.results.metrics["monosoup"]
    run.test(editor, [loader() for _ in Sets.sizes], verbose=False)
    assert {"test_0", "test_1", "test_2"} <= editor.results.metrics["monosoup"].keys()
