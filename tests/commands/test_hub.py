"""Names on a hub that can't be reached: a line that says which option takes something local."""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lit_cka import analysis, data, models
from lit_cka.__main__ import run
from lit_cka.commands import hub
from lit_cka.commands.hub import HubName, hub_failure, hub_names, offline_if_unreachable

ROOT = Path(__file__).parents[2]
NOWHERE = "http://hub.invalid"  # a name that never has an address


def spec(class_name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lit_cka.somewhere.{class_name}", "init_args": arguments}


def test_which_options_have_names(tmp_path: Path) -> None:
    options = {
        "model": spec("TextClassifier", model_name="distilbert", num_classes=2),
        "models": [spec("TextModel", path="bert", tokenizer=None), spec("TextModel", path=str(tmp_path))],
        "editor": {"pretrained": spec("ImageClassifier", model_name="vit", pretrained=True), "R": 0.8},
        "other": spec("ImageClassifier", model_name="vit", pretrained=False),
        "local": spec("ImageClassifier", model_name="local-dir:/x", pretrained=True),
        "data": spec("TextDataModule", dataset="imdb", train="train"),
        "image": {"model": spec("ImageModel", model=spec("CLIPImageClassifier", pretrained="openai"))},
        "theirs": spec("Model", model_name="distilbert"),
    }
    assert [(each.option, each.name, each.library) for each in hub_names(options)] == [
        ("model.init_args.model_name", "distilbert", "transformers"),
        ("models[0].init_args.path", "bert", "transformers"),
        ("editor.pretrained.init_args.model_name", "vit", "timm"),
        ("data.init_args.dataset", "imdb", "datasets"),
        ("image.model.init_args.model.init_args.pretrained", "openai", "open_clip"),
    ]
    assert all(isinstance(each, HubName) and each.takes for each in hub_names(options))


def test_the_options_that_have_names_are_there() -> None:
    for class_name, argument in hub._TAKES:
        owner = next(module for module in (models, data, analysis) if class_name in module.__all__)
        assert argument in inspect.signature(getattr(owner, class_name).__init__).parameters


def test_an_error_that_is_not_of_a_hub() -> None:
    options = {"model": spec("TextClassifier", model_name="distilbert")}
    assert hub_failure(ValueError("Expected a."), options) is None
    assert hub_failure(FileNotFoundError("none"), options) is None


def test_a_hub_failure_of_another_class() -> None:
    said = hub_failure(ConnectionError("no\nroute"), {})
    assert said == "Expected a hub that can be reached, or a local folder in place of a name, but: no route"


@pytest.mark.parametrize(
    ("options", "endpoint", "expected"),
    [
        ({"model": spec("TextClassifier", model_name="distilbert")}, NOWHERE, "1"),
        ({"model": spec("TextClassifier", model_name="distilbert")}, "http://localhost", None),
        ({"model": spec("TextClassifier", model_name=str(ROOT))}, NOWHERE, None),
    ],
)
def test_offline_where_names_have_no_hub(
    options: dict[str, Any], endpoint: str, expected: str | None, unreachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    offline_if_unreachable(options)
    assert os.environ.get("HF_HUB_OFFLINE") == expected
    assert (expected is not None) == constants.HF_HUB_OFFLINE


def test_a_proxy_may_know_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    offline_if_unreachable({"model": spec("TextClassifier", model_name="distilbert")})
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, an empty cache, and what is found out about that forgotten at the end."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "put back at the end")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the libraries, on their way to the error
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "fit --config text_classification",
            "`model.init_args.model_name` to be in the cache, or on a hub that can be reached, but "
            "'distilbert-base-uncased' is not. It also takes a local folder in `save_pretrained` format.",
        ),
        (
            "fit --config convnext_imagefolder",
            "'convnext_small.in12k' is not. It also takes `local-dir:FOLDER`, or",
        ),
        (
            "fit --config clip_imagefolder",
            "`model.init_args.pretrained` to be in the cache, or on a hub",
        ),
        ("compare --config compare_bert --data.init_args.path t.jsonl", "Expected `models[0].init_args.path` to be in"),
        ("monosoup --config monosoup_convnext", "So does `editor.finetuned.init_args.model_name`"),
    ],
)
def test_the_configs_with_names_on_the_hub(
    line: str, said: str, unreachable: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.jsonl").write_text('{"text": "a"}\n')
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run(line.split())
    assert time.monotonic() - start < 40  # retries take 50 seconds a name
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "Seed set to 0"]
    assert len(lines) <= 2  # open_clip has one of its own
    assert lines[-1].startswith("error: Expected `")
    assert said in lines[-1]


def test_a_dataset_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library that is asked: the model is local here, and the dataset is not."""
    options = {
        "model": spec("TextClassifier", model_name="distilbert"),
        "data": spec("TextDataModule", dataset="imdb"),
    }
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as raised:
        datasets.load_dataset("imdb")
    said = hub_failure(raised.value, options)
    assert said is not None
    assert "`data.init_args.dataset` to be in the cache" in said
    assert "It also takes a local folder, or give `train`, `val` and `test` files without it." in said
