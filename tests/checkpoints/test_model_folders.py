"""Folders from strangers: no code in them runs unasked, and nothing outside of them is opened, whatever they name."""

from __future__ import annotations

import ast
import io
import json
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_cka.analysis import TextModel
from lit_cka.checkpoints.model_folders import reading_model
from lit_cka.commands.training import TrainCLI
from lit_cka.data.tokenizer import load_tokenizer
from lit_cka.editing.files import edit_files
from lit_cka.editing.sources import load_folder, weights_for
from lit_cka.models import CausalLanguageModel, TextClassifier
from tests import small_models

PACKAGE = Path(__file__).parents[2] / "lit_cka"
LOADERS = {"from_pretrained", "from_config", "load_dataset", "cached_file", "snapshot_download", "hf_hub_download"}
READERS: dict[str, Callable[[str], Any]] = {
    "TextClassifier": lambda path: TextClassifier(path, 2),
    "CausalLanguageModel": CausalLanguageModel,
    "TextModel": lambda path: TextModel(path, device="cpu"),
    "load_folder": load_folder,
    "tokenizer": load_tokenizer,
}


def test_every_call_says_whether_code_of_others_runs() -> None:
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in LOADERS:
                said = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "trust_remote_code" in said, f"{path.name}, line {node.lineno}"
                value = said["trust_remote_code"]
                is_option = isinstance(value, ast.Name) and value.id == "trust_remote_code"
                assert is_option or (isinstance(value, ast.Constant) and value.value is False), (path.name, node.lineno)
                calls.append(node)
    assert len(calls) >= 8


@pytest.mark.parametrize("reader", [TextClassifier, CausalLanguageModel, TextModel, load_tokenizer])
def test_no_code_runs_by_default(reader: Any) -> None:
    import inspect

    assert inspect.signature(reader).parameters["trust_remote_code"].default is False


LOOKED_UP: list[Any] = []


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    small_models.tiny_distilbert(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, next to which there is no network, and nobody at the keyboard who says no."""

    def refuse(*args: Any, **options: Any) -> None:
        LOOKED_UP.append(args)
        raise OSError("no network")

    LOOKED_UP.clear()
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    shutil.copytree(sound, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "model"


def read(reader: str, folder: Path) -> None:
    """Read a folder, or fail with one error that names it."""
    error: Exception | None = None
    try:
        READERS[reader](str(folder))
    except (ValueError, FileNotFoundError) as raised:
        error = raised
    assert error is None or str(folder) in str(error)


def change(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **entries}))


def with_code(folder: Path) -> None:
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\n"
        "from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast\n"
        "class EvilConfig(DistilBertConfig): pass\n"  # of its own: transformers marks the classes that it finds here
        "class EvilModel(DistilBertModel): pass\n"
        "class EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )


def of_unknown_kind(folder: Path) -> None:
    with_code(folder)
    kinds = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto = {"AutoConfig": "evil.EvilConfig", **dict.fromkeys(kinds, "evil.EvilModel")}
    change(folder / "config.json", model_type="evil", auto_map=auto, architectures=["EvilForSequenceClassification"])


def tokenizer_of_unknown_kind(folder: Path) -> None:
    with_code(folder)
    auto = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto)


def code_on_the_hub(folder: Path) -> None:
    of_unknown_kind(folder)
    change(folder / "config.json", auto_map={"AutoConfig": "someone/evil--evil.EvilConfig"})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [of_unknown_kind, tokenizer_of_unknown_kind, code_on_the_hub])
def test_code_in_a_folder_does_not_run(folder: Path, make: Callable[[Path], None], reader: str) -> None:
    make(folder)
    read(reader, folder)
    assert not Path("ran").exists()
    assert LOOKED_UP == []


def test_code_in_a_folder_runs_where_it_is_asked_for(folder: Path) -> None:
    """So that the tests above would see it."""
    of_unknown_kind(folder)
    with suppress(ValueError):  # the code makes a configuration of another kind
        TextModel(str(folder), device="cpu", trust_remote_code=True)
    assert Path("ran").exists()


NAMES: dict[str, Any] = {
    "above": "../outside.safetensors", "absolute": "/tmp/outside.safetensors", "http": "http://127.0.0.1:9/x.safetensors",
    "s3": "s3://bucket/x.safetensors", "file": "file:///tmp/outside.safetensors", "hub": "owner/name",
    "fsspec": "simplecache::http://127.0.0.1/x", "drive": "C:x.safetensors", "share": "\\\\host\\share\\x.safetensors",
    "number": 3, "none": None, "list": ["model.safetensors"], "empty": "", "dots": "..", "nul": "a\0b",
    "surrogate": "\ud800.safetensors",
}  # fmt: skip


def with_index(folder: Path, shard: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder.parent / "outside.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_in_their_folder(folder: Path, sound: Path, name: str) -> None:
    with_index(folder, NAMES[name])
    all_of_them: list[Callable[[], Any]] = [
        lambda: edit_files(sound, folder, folder.parent / "out", progress=False),
        lambda: weights_for(CausalHolder(sound), folder, "fine-tuned"),
        lambda: TextClassifier(str(folder), 2),
        lambda: TextModel(folder, device="cpu"),
    ]
    for one in all_of_them:
        with pytest.raises(ValueError, match=r"model.safetensors.index.json' names shards that are not beside it"):
            one()
    assert LOOKED_UP == []


class CausalHolder(torch.nn.Module):
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("base", ["someone/base", "http://127.0.0.1:9/base", "/tmp", None, 3])
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_s_base_is_not_opened(folder: Path, base: Any, has_config: bool) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    if not has_config:
        (folder / "config.json").unlink()
    for reader in set(READERS) - {"tokenizer"}:
        with pytest.raises(ValueError, match="it holds an adapter for"):
            READERS[reader](str(folder))
    assert LOOKED_UP == []


@pytest.mark.parametrize("key", ["_name_or_path", "name_or_path", "backbone", "tokenizer_file", "transformers_weights"])
def test_addresses_in_a_configuration_are_not_opened(folder: Path, key: str) -> None:
    address = {key: "http://127.0.0.1:9/x", "use_pretrained_backbone": True, "use_timm_backbone": False}
    for name in ("config.json", "tokenizer_config.json"):
        change(folder / name, **address)
    for reader in READERS:
        read(reader, folder)
    assert LOOKED_UP == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"model_type": 3}',
        b'{"model_type": "distilbert", "dim": "x"}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
    ids=["empty", "cut", "list", "number", "type", "word", "bytes", "deep"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "adapter_config.json"])
def test_damage_is_one_error_that_names_the_folder(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    for reader in READERS:
        read(reader, folder)


def test_names_on_the_hub_are_looked_up_still(folder: Path) -> None:
    import huggingface_hub.constants

    with reading_model("someone/model"):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with reading_model(folder):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_checkpoint_does_not_say_which_model_is_made(folder: Path) -> None:
    """Lightning's command line would make the class, of the arguments, that stand in the file."""
    parameters = {"_class_path": "lit_cka.models.TextClassifier", "model_name": "someone/evil", "num_classes": 2}
    torch.save({"hyper_parameters": parameters, "state_dict": {}}, folder.parent / "evil.ckpt")
    args = ["validate", "--model=lit_cka.models.ImageClassifier", "--model.init_args.model_name=none"]
    args += ["--model.init_args.num_classes=2", "--data=lit_cka.data.DigitsDataModule", "--ckpt_path=evil.ckpt"]
    args += ["--seed_everything=0"]
    with pytest.raises(Exception, match="none"):  # of timm, which knows no model of this name
        TrainCLI(args, {})
    assert LOOKED_UP == []


def test_checkpoints_do_not_keep_the_permission(folder: Path) -> None:
    model = TextClassifier(str(folder), 2, trust_remote_code=True)
    assert model.trust_remote_code
    assert "trust_remote_code" not in model.hparams
