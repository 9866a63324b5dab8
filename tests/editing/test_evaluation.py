"""What `MonoSoupEditor` measures, against torchmetrics and textbook CKA of each variant on its own; on ranks."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lit_cka import CKACallback, MonoSoupEditor
from lit_cka.editing.evaluation import MetricSums, sample_values
from lit_cka.editing.results import EvaluationResults
from lit_cka.models import ImageClassifier
from tests.editing import evaluation_worker
from tests.editing.evaluation_worker import NUM_CLASSES, OPTIONS, Sets, choose, models, samples, weights
from tests.models.test_language import QUESTIONS, TEXTS, save_model, save_tokenizer
from tests.sync_worker import run_to_end
from tests.tracking.helpers import Classifier, hand_cka, trainer

VARIANTS = ["pretrained", "finetuned", "monosoup", "highonly", "lowonly"]
LAYERS = [f"net.blocks.{index}" for index in range(3)]


def evaluate(editor: MonoSoupEditor, data: Any, folder: Path, **options: Any) -> EvaluationResults:
    run = trainer(folder, **options)
    if isinstance(data, pl.LightningDataModule):
        run.test(editor, datamodule=data, verbose=False)
    else:
        run.test(editor, data, verbose=False)
    assert editor.results is not None
    return editor.results


def variant_of(editor: MonoSoupEditor, variant: str, module: nn.Module) -> nn.Module:
    """A fresh copy of a module, with a variant's weights."""
    fresh = copy.deepcopy(module)
    fresh.load_state_dict(editor.edited.variants[variant])
    return fresh.eval()


def metrics_by_hand(logits: Tensor, labels: Tensor) -> dict[str, float]:
    num_classes = logits.shape[1]
    accuracies = {
        f"top{k}": MulticlassAccuracy(num_classes, average="micro", top_k=k)(logits, labels).item() for k in (1, 5)
    }
    error = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")(logits, labels).item()
    return {**accuracies, "loss": cross_entropy(logits, labels).item(), "calibration_error": error}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[MonoSoupEditor, Sets]:
    """Of the three sets, in float32, with ragged last batches."""
    editor, data = MonoSoupEditor(*models(), **OPTIONS, soup=[models()[0]]), Sets()
    evaluate(editor, data, tmp_path_factory.mktemp("run"))
    return editor, data


def test_each_sample_is_loaded_once(run: tuple[MonoSoupEditor, Sets]) -> None:
    editor, data = run
    for counted, size in zip(data.data, Sets.sizes, strict=True):
        assert counted.counts == dict.fromkeys(range(size), 1)
    assert editor.results.num_samples == dict(zip(("clean", "chosen", "few"), Sets.sizes, strict=True))
    assert editor.results.num_cka_samples == editor.results.num_samples


def test_all_variants_are_evaluated_on_all_sets(run: tuple[MonoSoupEditor, Sets]) -> None:
    editor, _ = run
    names = [*VARIANTS, "lines", "wise_ft_0.25", "wise_ft_0.5", "uniform_soup"]
    assert list(editor.edited.variants) == list(editor.results.metrics) == names
    for by_set in editor.results.metrics.values():
        assert list(by_set) == ["clean", "chosen", "few"]
    compared = (*names[1:6], "uniform_soup")  # not WiSE-FT
    assert {tuple(scores) for scores in editor.results.cka.values()} == {compared}
    losses = {name: by_set["clean"]["loss"] for name, by_set in editor.results.metrics.items()}
    assert len(set(losses.values())) == len(names)


def test_metrics_are_those_of_torchmetrics(run: tuple[MonoSoupEditor, Sets]) -> None:
    editor, data = run
    for variant in editor.edited.variants:
        model = variant_of(editor, variant, models()[0])
        for name, counted, to_classes in zip(data.test_names, data.data, (None, choose, None), strict=True):
            x, labels = counted.data.tensors
            with torch.no_grad():
                logits = model(x).double()
            expected = metrics_by_hand(logits if to_classes is None else to_classes(logits), labels)
            assert editor.results.metrics[variant][name] == pytest.approx(expected, abs=1e-6), (variant, name)
            assert 0 < expected["top1"] < expected["top5"]


def test_shifted_average_is_the_mean_over_all_sets_but_the_first(run: tuple[MonoSoupEditor, Sets]) -> None:
    results = run[0].results
    for variant, by_set in results.metrics.items():
        expected = {key: np.mean([by_set[name][key] for name in ("chosen", "few")]) for key in by_set["clean"]}
        assert results.shifted_average[variant] == pytest.approx(expected, abs=1e-12)


def test_cka_is_the_textbooks(run: tuple[MonoSoupEditor, Sets]) -> None:
    editor, data = run
    for name, loader in zip(data.test_names, data.test_dataloader(), strict=True):
        for variant, scores in editor.results.cka[name].items():
            pair = [variant_of(editor, each, models()[0]) for each in ("pretrained", variant)]
            assert scores == pytest.approx(hand_cka(*pair, LAYERS, list(loader)), abs=1e-8), (name, variant)
            assert max(scores.values()) < 0.9999


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_is_that_of_the_callback(tmp_path: Path, debiased: bool) -> None:
    pretrained, finetuned = models()
    editor, data = MonoSoupEditor(pretrained, finetuned, debiased=debiased), samples(44, 3)
    results = evaluate(editor, DataLoader(data, batch_size=16), tmp_path)
    for variant in VARIANTS[1:]:
        callback = CKACallback(reference=pretrained, debiased=debiased)
        model = variant_of(editor, variant, finetuned)
        trainer(tmp_path, callback).test(model, DataLoader(data, batch_size=16), verbose=False)
        assert results.cka["test_0"][variant] == pytest.approx(callback.history[-1]["scores"], abs=1e-12)
        expected = hand_cka(pretrained, model, LAYERS, DataLoader(data, batch_size=16), debiased=debiased)
        assert results.cka["test_0"][variant] == pytest.approx(expected, abs=1e-8)


def vit(seed: int) -> ImageClassifier:
    torch.manual_seed(seed)
    kwargs = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return ImageClassifier("vit_tiny_patch16_224", 6, model_kwargs=kwargs)


@pytest.mark.parametrize("options", [{}, {"pooling": "cls"}, {"layers": "model.blocks.1"}])
def test_features_of_tokens_are_pooled_as_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    images = torch.randn(19, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(19) % 6), batch_size=7)
    editor = MonoSoupEditor(vit(0), vit(1), **options)
    results = evaluate(editor, loader, tmp_path)
    names = ["model.blocks.1"] if "layers" in options else ["model.blocks.0", "model.blocks.1"]
    pool = (lambda output, batch: output[:, 0]) if "pooling" in options else (lambda output, batch: output.mean(1))
    monosoup = variant_of(editor, "monosoup", vit(2))
    expected = hand_cka(vit(0), monosoup, names, loader, pool=pool)
    assert results.cka["test_0"]["monosoup"] == pytest.approx(expected, abs=1e-6)
    assert len(expected) == len(names)


@pytest.mark.parametrize(("most", "num_samples"), [(0, 0), (1, 8), (2, 16), (99, 37), (None, 37)])
def test_max_cka_batches(tmp_path: Path, most: int | None, num_samples: int) -> None:
    editor = MonoSoupEditor(*models(), max_cka_batches=most)
    results = evaluate(editor, DataLoader(samples(37, 0), batch_size=8), tmp_path)
    assert results.num_cka_samples == {"test_0": num_samples}
    assert results.num_samples == {"test_0": 37}
    if not num_samples:
        assert results.cka == {"test_0": {}}
        return
    pretrained, finetuned = models()
    first = [tuple(values[:num_samples] for values in samples(37, 0).tensors)]
    assert results.cka["test_0"]["finetuned"] == pytest.approx(hand_cka(pretrained, finetuned, LAYERS, first), abs=1e-8)


def test_results_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """One sample in a batch, all in one, and a last one of one."""
    found = []
    for batch_size in (1, 18, 64):
        editor = MonoSoupEditor(*(model.double() for model in models()))
        loader = DataLoader(samples(37, 0), batch_size=batch_size)
        results = evaluate(editor, loader, tmp_path, precision="64-true")
        found.append([*results.flat().values(), *results.cka["test_0"]["lowonly"].values()])
    assert found[1] == pytest.approx(found[0], abs=1e-12)
    assert found[2] == pytest.approx(found[0], abs=1e-12)


def test_all_numbers_are_logged(tmp_path: Path) -> None:
    editor, run = MonoSoupEditor(*models(), wise_ft=[0.5]), trainer(tmp_path)
    run.test(editor, Sets(), verbose=False)
    logged = {key: value.item() for key, value in run.callback_metrics.items()}
    assert logged == pytest.approx(editor.results.flat(), abs=1e-6)
    assert logged["chosen/monosoup/top5"] == pytest.approx(editor.results.metrics["monosoup"]["chosen"]["top5"])
    scores = editor.results.cka["few"]["lowonly"].values()
    assert logged["few/lowonly/cka_mean"] == pytest.approx(np.mean(list(scores)))
    assert "shifted_average/wise_ft_0.5/calibration_error" in logged
    assert "few/wise_ft_0.5/cka_mean" not in logged


@pytest.mark.parametrize("verbose", [True, False])
def test_one_table_is_printed(tmp_path: Path, verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per variant, where Lightning's has a row per number; none where none is wanted."""
    editor, run = MonoSoupEditor(*models()), trainer(tmp_path)
    returned = run.test(editor, Sets(), verbose=verbose)
    printed = capsys.readouterr().out
    assert len(returned[0]) > 20
    assert [printed.count(f"│ {variant} ") for variant in VARIANTS] == [int(verbose)] * 5
    assert "calibration_error" not in printed
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize("batch_sizes", [[50], [7, 1, 42], [1] * 50])
def test_calibration_error_of_sums_is_torchmetrics(batch_sizes: list[int]) -> None:
    """Over-confident logits, spread over many of the bins, with confidences at both ends."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 30, 50)[:, None]
    labels = torch.where(torch.arange(50) % 3 == 0, torch.arange(50) % 6, logits.argmax(1))
    sums = MetricSums()
    for x, y in zip(logits.split(batch_sizes), labels.split(batch_sizes), strict=True):
        sums.add(sample_values(nn.Identity(), (x, y), None), None)
    metrics = sums.metrics(sums.names, torch.device("cpu"))
    assert metrics.pop("n") == 50
    assert metrics == pytest.approx(metrics_by_hand(logits, labels), abs=1e-6)
    assert metrics["calibration_error"] > 0.05


def test_top5_of_fewer_classes_is_always_right() -> None:
    values = sample_values(nn.Identity(), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), None)
    assert values["top5"].tolist() == [1, 1, 1, 1]


def test_logits_of_nan_make_metrics_of_nan() -> None:
    sums = MetricSums()
    sums.add(sample_values(nn.Identity(), (torch.full((4, 6), torch.nan), torch.arange(4)), None), None)
    metrics = sums.metrics(sums.names, torch.device("cpu"))
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["calibration_error"])
    assert metrics["n"] == 4


def test_batches_of_mappings(tmp_path: Path) -> None:
    class Named(Classifier):
        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": self.net(x)})

    pair = [Named(model.net) for model in models()]
    data = [{"x": x, "labels": labels} for x, labels in samples(20, 0)]
    named = evaluate(MonoSoupEditor(*pair), DataLoader(data, batch_size=8), tmp_path)
    assert named == evaluate(MonoSoupEditor(*models()), DataLoader(samples(20, 0), batch_size=8), tmp_path)


def test_single_sample_has_no_cka(tmp_path: Path) -> None:
    results = evaluate(MonoSoupEditor(*models()), DataLoader(samples(1, 0)), tmp_path)
    assert all(math.isnan(score) for score in results.cka["test_0"]["monosoup"].values())
    assert results.num_samples == {"test_0": 1}


# --- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    pair(folder, "gpt2")
    write_rows(folder)
    run_to_end(evaluation_worker.__file__, folder, seconds=200)
    return folder


def pair(folder: Path, family: str) -> None:
    """`pretrained` and `finetuned`: a language model, and the same with other weights."""
    from transformers import AutoModelForCausalLM

    for name in ("pretrained", "finetuned"):
        (folder / name).mkdir(parents=True)
        save_tokenizer(folder / name, family)
        save_model(folder / name, family)
    network = AutoModelForCausalLM.from_pretrained(folder / "finetuned")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder / "finetuned")


def write_rows(folder: Path) -> None:
    """Five texts, six questions of two to four choices, six of one right answer."""
    answers = [{"prompt": row["question"], "answer": row["choices"][row["answer"]]} for row in QUESTIONS]
    rows = {"texts": [{"text": text} for text in TEXTS if len(text) > 1], "choices": QUESTIONS[:5], "answers": answers}
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def of_ranks(folder: Path, job: str, world_size: int) -> list[Any]:
    """What the ranks have seen; all of them have to have come to the end."""
    files = [folder / f"all_jobs-{world_size}-{rank}.json" for rank in range(world_size)]
    assert [file.name for file in files if not file.exists()] == []
    return [json.loads(file.read_text())[job] for file in files]


@pytest.fixture(scope="module")
def alone(ranks: Path) -> dict[str, Any]:
    """What one process sees, without ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation_worker.ranks_worker,
            "trainer",
            lambda folder, world_size, **options: trainer(
                folder, **{key: value for key, value in options.items() if key != "use_distributed_sampler"}
            ),
        )
        jobs = (evaluation_worker.evaluated, evaluation_worker.shared, evaluation_worker.languages)
        jobs += (evaluation_worker.limited,)
        return {job.__name__: job(0, 1, ranks) for job in jobs}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """All that nested mappings and lists hold, by its path."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, item in items for key, leaf in leaves(item, f"{path}/{name}").items()}


def assert_same(found: Any, expected: Any) -> None:
    """The same, numbers to 1e-9, or in float32 what is logged."""
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, float) and "/logged/" in path:
            assert found[path] == pytest.approx(value, rel=1e-6), path
        elif isinstance(value, float):
            assert found[path] == pytest.approx(value, abs=1e-9, nan_ok=True), path
        else:
            assert found[path] == value, path


@pytest.mark.parametrize("job", ["evaluated", "shared", "languages", "limited"])
def test_on_ranks_as_in_one_process(ranks: Path, alone: dict[str, Any], job: str) -> None:
    for seen in of_ranks(ranks, job, 3):
        assert_same(seen, json.loads(json.dumps(alone[job])))


def test_one_process_counts_each_sample_once(alone: dict[str, Any]) -> None:
    assert alone["evaluated"]["True"]["num_samples"] == {"clean": 37, "chosen": 41, "few": 10}
    assert alone["evaluated"]["True"]["num_cka_samples"] == {"clean": 37, "chosen": 41, "few": 10}
    assert alone["shared"]["num_samples"] == {"test_0": 37}
    assert [each["num_cka_samples"] for each in alone["limited"]] == [
        {"clean": 16, "chosen": 16, "few": 10},
        {"texts": 4, "choices": 12},
    ]
    assert alone["languages"]["num_samples"] == {"texts": 4, "choices": 5, "answers": 6}
    assert alone["languages"]["num_cka_samples"] == {"texts": 4, "choices": 14, "answers": 6}


def test_ranks_write_the_same(ranks: Path, alone: dict[str, Any]) -> None:
    folders = [ranks / f"results-{size}" for size in (1, 3)]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in folders}) == 1
    for name in ("monosoup.json", "summary.json"):
        one, several = (json.loads((folder / name).read_text()) for folder in folders)
        for written in (one, several):
            del written["written_at"], written["seconds"]
        assert_same(several, one)


def test_damaged_weights_are_an_error_on_all_ranks(ranks: Path) -> None:
    for message in of_ranks(ranks, "damaged", 3):
        assert "'net.blocks.1.linear.weight' of the fine-tuned model holds NaN" in message


def test_language_models_are_measured_by_what_they_are_asked(ranks: Path, alone: dict[str, Any]) -> None:
    """Perplexity against transformers' own loss, one text at a time; choices by their share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen = alone["languages"]
    for variant in ("pretrained", "finetuned"):
        network = AutoModelForCausalLM.from_pretrained(ranks / variant).eval().double()
        tokenizer = AutoTokenizer.from_pretrained(ranks / variant)
        nll = num_tokens = 0.0
        for line in (ranks / "texts.jsonl").read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                nll += network(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            num_tokens += ids.shape[1] - 1
        metrics = seen["metrics"][variant]
        assert metrics["texts"] == {"perplexity": pytest.approx(math.exp(nll / num_tokens), rel=1e-6)}
        assert set(metrics["choices"]) == {"choice_accuracy", "choice_accuracy_normalized"}
        assert metrics["choices"]["choice_accuracy"] in [pytest.approx(count / 5) for count in range(6)]
        assert set(metrics["answers"]) == {"exact_match", "perplexity"}
    results = EvaluationResults(
        **{key: seen[key] for key in ("metrics", "shifted_average", "cka", "num_samples", "num_cka_samples")}
    )
    assert [results.main_metric(name) for name in results.test_names] == [
        "perplexity",
        "choice_accuracy",
        "exact_match",
    ]


def test_worker_models_differ_in_all_that_is_edited() -> None:
    before, after = map(weights, models())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert before["net.head.weight"].shape[0] == NUM_CLASSES
