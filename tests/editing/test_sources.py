"""Weights from every kind of source, what is refused, and variants written back in the format that they came in."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lit_cka import MonoSoupEditor
from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.data.language import LanguageTestsDataModule
from lit_cka.editing.artifacts import describe_edit
from lit_cka.models import CLIPImageClassifier, ImageClassifier, TextClassifier
from tests import small_models
from tests.editing.evaluation_worker import models, weights
from tests.editing.test_evaluation import pair, write_rows
from tests.tracking.helpers import Classifier, Net, trainer

NET = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(seed: int, num_classes: int = 6) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier("vit_tiny_patch16_224", num_classes, model_kwargs=NET)


def clip(seed: int) -> CLIPImageClassifier:
    torch.manual_seed(seed)
    return CLIPImageClassifier(small_models.CLIP_NAME, 3)


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    small_models.tiny_clip(tmp_path_factory.mktemp("clip"))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "partial" in path.name]


# --- Files, of each kind: written from a model, and read back into one.


def soups(model: nn.Module) -> dict[str, Tensor]:
    """As in model-soups: no more names than needed, each behind the one of DataParallel; and CLIP's scale."""
    return {**{f"module.{name}": value for name, value in weights(model).items()}, "module.model.logit_scale": ONE}


ONE = torch.ones([])


def write_soups(model: nn.Module, path: Path) -> None:
    torch.save(soups(model), path)


def read_soups(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    assert torch.equal(content.pop("module.model.logit_scale"), ONE)
    assert all(name.startswith(("module.model.visual.", "module.classification_head.")) for name in content)
    model = clip(9)
    model.load_state_dict({name.removeprefix("module."): value for name, value in content.items()})
    return weights(model)


def write_plain(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def read_plain_clip(path: Path) -> dict[str, Tensor]:
    model = clip(9)
    model.load_state_dict(torch.load(path, weights_only=True))
    return weights(model)


def write_lightning(model: Any, path: Path) -> None:
    trainer(path.parent).strategy.connect(model)
    run = trainer(path.parent)
    run.strategy.connect(model)
    run.save_checkpoint(path, weights_only=True)


def read_lightning(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=False)
    assert content["hyper_parameters"]["model_kwargs"] == NET
    assert {"epoch", "global_step", "pytorch-lightning_version", "state_dict"} <= set(content)
    return weights(ImageClassifier.load_from_checkpoint(path))


def write_safetensors(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(weights(model), path, {"format": "pt", "made_by": "hand"})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "hand"}
    model = vit(9)
    model.load_state_dict(safetensors.torch.load_file(path))
    return weights(model)


def write_timm(model: Any, path: Path) -> None:
    torch.save({"arch": "vit", "epoch": 3, "state_dict": model.model.state_dict(), "args": {"lr": 0.1}}, path)


def read_timm(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    assert {key: value for key, value in content.items() if key != "state_dict"} == {
        "arch": "vit", "epoch": 3, "args": {"lr": 0.1},
    }  # fmt: skip
    model = vit(9)
    model.model.load_state_dict(content["state_dict"])
    return weights(model)


def write_half(model: nn.Module, path: Path) -> None:
    torch.save({name: value.half() for name, value in weights(model).items()}, path)


def read_half(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    assert {value.dtype for value in content.values()} == {torch.float16}
    return content


FORMATS: dict[str, tuple[Callable[[int], nn.Module], str, Callable[..., None], Callable[[Path], dict[str, Tensor]]]] = {
    "model-soups": (clip, "soup.pt", write_soups, read_soups),
    "clip": (clip, "clip.pt", write_plain, read_plain_clip),
    "lightning": (vit, "last.ckpt", write_lightning, read_lightning),
    "safetensors": (vit, "model.safetensors", write_safetensors, read_safetensors),
    "timm": (vit, "timm.pth.tar", write_timm, read_timm),
    "half": (vit, "half.pt", write_half, read_half),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_files_come_back_in_their_format(tmp_path: Path, kind: str, sequential: bool) -> None:
    make, name, write, read = FORMATS[kind]
    for seed, folder in enumerate(("pretrained", "finetuned")):
        (tmp_path / folder).mkdir()
        write(make(seed), tmp_path / folder / name)
    sources = [tmp_path / folder / name for folder in ("pretrained", "finetuned")]
    before = [path.read_bytes() for path in sources]
    editor = MonoSoupEditor(*sources, make(5), sequential=sequential, wise_ft=[0.5])
    expected = MonoSoupEditor(make(0), make(1), wise_ft=[0.5])
    for variant, value in editor.edited.variants.items():
        path = tmp_path / "new" / variant / name
        editor.export(variant, path)
        if kind == "half":
            assert_equal(read(path), {name: each.half() for name, each in value.items()})
            continue
        assert_equal(value, expected.edited.variants[variant])
        assert_equal(read(path), value)
    assert [path.read_bytes() for path in sources] == before
    assert partials(tmp_path) == []


def test_files_change_between_formats_under_their_own_names(tmp_path: Path) -> None:
    for seed, name in enumerate(("0.pth", "1.pth")):
        write_timm(vit(seed), tmp_path / name)
    editor = MonoSoupEditor(tmp_path / "0.pth", tmp_path / "1.pth", vit(5))
    editor.export("monosoup", tmp_path / "new.safetensors")
    expected = {name.removeprefix("model."): value for name, value in editor.edited.variants["monosoup"].items()}
    assert_equal(safetensors.torch.load_file(tmp_path / "new.safetensors"), expected)
    back = MonoSoupEditor(tmp_path / "0.pth", tmp_path / "new.safetensors", vit(5))
    back.export("finetuned", tmp_path / "again.pt")
    assert_equal(torch.load(tmp_path / "again.pt", weights_only=True), expected)


def test_tensors_that_the_model_has_no_place_for_are_counted(tmp_path: Path) -> None:
    """Of a model-soups file: CLIP's text side, which the classifier of images has not, stays as it is."""
    text = {
        "module.model.positional_embedding": torch.ones(7, 4), "module.model.token_embedding.weight": torch.ones(9, 4),
        "module.model.ln_final.weight": torch.ones(4),
    }  # fmt: skip
    for seed in range(2):
        torch.save({**soups(clip(seed)), **text}, tmp_path / f"{seed}.pt")
    editor = MonoSoupEditor(tmp_path / "0.pt", tmp_path / "1.pt", clip(5))
    reasons = {record["name"]: record["reason"] for record in editor.edited.records}
    unused = {"model.logit_scale", *(name.removeprefix("module.") for name in text)}
    assert {name for name, reason in reasons.items() if reason == "no part of the model"} == unused
    assert "4 (no part of the model)" in describe_edit(editor.edited.records)
    editor.export("monosoup", tmp_path / "new.pt")
    written = torch.load(tmp_path / "new.pt", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in text.items())


def tied_models() -> dict[str, Callable[[], nn.Module]]:
    import transformers

    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    bert = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 32,
    }
    return {
        "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)),
        "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0)),
        "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**bert)),
        "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**bart, **heads)),
    }


@pytest.mark.parametrize("name", ["GPT-2", "T5", "BERT", "BART"])
def test_tied_weights_that_a_file_names_once(tmp_path: Path, name: str) -> None:
    make = tied_models()[name]
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(make())
        networks[seed].save_pretrained(tmp_path / str(seed))
    held = load_state_dict(tmp_path / "0" / "model.safetensors")
    assert len(held) < len(weights(networks[0]))  # so that the test would notice
    editor = MonoSoupEditor(*(tmp_path / str(seed) / "model.safetensors" for seed in range(2)), model=make())
    expected = MonoSoupEditor(*networks)
    for variant, value in expected.edited.variants.items():
        assert_equal(editor.edited.variants[variant], value)
    assert [record["reason"] for record in editor.edited.records] == [
        each["reason"] for each in expected.edited.records
    ]
    editor.export("monosoup", tmp_path / "new.safetensors")
    assert load_state_dict(tmp_path / "new.safetensors").keys() == held.keys()


class TestSets:
    @pytest.mark.parametrize(("suffix", "nested"), [(".pt", False), (".pt", True), (".safetensors", False)])
    def test_one_of_several_sets(self, tmp_path: Path, suffix: str, nested: bool) -> None:
        pretrained, finetuned = models()
        other = {name: value + 1 for name, value in weights(pretrained).items()}
        names = ("state_dict", "state_dict_ema") if nested else ("student", "teacher")
        content: dict[str, Any] = dict(zip(names, (other, weights(finetuned)), strict=True))
        if not nested:
            content = {f"{start}.{name}": value for start, held in content.items() for name, value in held.items()}
        save: Any = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save(content, tmp_path / f"1{suffix}")
        save(weights(pretrained), tmp_path / f"0{suffix}")
        sources = [tmp_path / f"{number}{suffix}" for number in range(2)]
        message = "holds 2: 'state_dict' .*'state_dict_ema'" if nested else r"with 'student\.' and with 'teacher\.' do"
        with pytest.raises(ValueError, match=message):
            MonoSoupEditor(*sources, models()[0])
        editor = MonoSoupEditor(*sources, models()[0], weights=names[1])
        expected = MonoSoupEditor(pretrained, finetuned)
        for variant, value in expected.edited.variants.items():
            assert_equal(editor.edited.variants[variant], value)
        with pytest.raises(ValueError, match=r"called 'ema'"):
            MonoSoupEditor(sources[0], sources[0], models()[0], weights="ema")
        editor.export("monosoup", tmp_path / f"new{suffix}")
        for name, value in zip(names, (other, expected.edited.variants["monosoup"]), strict=True):
            assert_equal(load_state_dict(tmp_path / f"new{suffix}", weights=name), value)


@pytest.mark.parametrize("name", ["new.pt", "new.safetensors"])
def test_modules_are_written_as_state_dicts(tmp_path: Path, name: str) -> None:
    tied = models()
    for model in tied:
        model.net.blocks[2].linear.weight = model.net.blocks[0].linear.weight
    editor = MonoSoupEditor(*tied)
    editor.export("lowonly", tmp_path / name)
    assert_equal(load_state_dict(tmp_path / name), editor.edited.variants["lowonly"])


class TestWriting:
    def test_existing_path_is_refused(self, tmp_path: Path) -> None:
        editor = MonoSoupEditor(*models())
        (tmp_path / "there.pt").write_text("mine")
        (tmp_path / "folder").mkdir()
        for name in ("there.pt", "folder"):
            with pytest.raises(ValueError, match=f"a path to write to, but '.*{name}' exists already"):
                editor.export("monosoup", tmp_path / name)
        assert (tmp_path / "there.pt").read_text() == "mine"

    def test_unknown_variant(self, tmp_path: Path) -> None:
        editor = MonoSoupEditor(*models(), wise_ft=[0.5])
        with pytest.raises(ValueError, match=r"pretrained, .*, wise_ft_0\.5, but got 'wise_ft_0\.6'"):
            editor.export("wise_ft_0.6", tmp_path / "new.pt")

    @pytest.mark.parametrize("kind", ["lightning", "safetensors"])
    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        make, name, write, _ = FORMATS[kind]
        for seed in range(2):
            write(make(seed), tmp_path / f"{seed}{name}")
        editor = MonoSoupEditor(tmp_path / f"0{name}", tmp_path / f"1{name}", make(5))

        def fail(content: Any, path: Any, *args: Any) -> None:
            Path(path).write_text("half of it")
            raise OSError("no space left")

        monkeypatch.setattr("lit_cka.editing.exporting.torch.save", fail)
        monkeypatch.setattr("lit_cka.editing.exporting.save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            editor.export("monosoup", tmp_path / "new" / name)
        assert list((tmp_path / "new").iterdir()) == []


# --- Folders of transformers.


@pytest.fixture(scope="module")
def text_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pretrained` and `finetuned`, DistilBERTs for sequence classification; `headless`, one without a head."""
    from transformers import DistilBertForSequenceClassification

    root = tmp_path_factory.mktemp("text")
    small_models.tiny_distilbert(root / "headless")
    for seed, name in enumerate(("pretrained", "finetuned")):
        shutil.copytree(root / "headless", root / name)
        torch.manual_seed(seed)
        network = DistilBertForSequenceClassification.from_pretrained(root / "headless", num_labels=2)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        network.save_pretrained(root / name)
    return root


def sentences(folder: Path) -> list[Any]:
    """Two batches of tokenized sentences of several lengths, with labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = small_models.text_rows(13)
    return [
        {**tokenizer([row["text"] for row in part], padding=True, return_tensors="pt"),
         "labels": torch.tensor([row["label"] for row in part])}
        for part in (rows[:8], rows[8:])
    ]  # fmt: skip


def test_folders_of_text_classifiers(tmp_path: Path, text_folders: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    editor = MonoSoupEditor(text_folders / "pretrained", text_folders / "finetuned")
    assert editor.tokenizer_name == str(text_folders / "finetuned")
    batches = sentences(text_folders / "finetuned")
    trainer(tmp_path).test(editor, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    assert editor.results.num_samples == {"test_0": 13}
    editor.export("monosoup", tmp_path / "new")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    assert_equal({f"model.{key}": value for key, value in weights(network).items()}, editor.edited.variants["monosoup"])
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("good film") == AutoTokenizer.from_pretrained(
        text_folders / "finetuned"
    )("good film")
    right = 0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            right += int((network(**inputs).logits.argmax(dim=1) == batch["labels"]).sum())
    assert editor.results.metrics["monosoup"]["test_0"]["top1"] == pytest.approx(right / 13)
    with pytest.raises(ValueError, match="exists already"):
        editor.export("monosoup", tmp_path / "new")


def test_features_of_text_are_pooled_over_its_own_tokens(tmp_path: Path, text_folders: Path) -> None:
    from tests.tracking.helpers import hand_cka

    editor = MonoSoupEditor(text_folders / "pretrained", text_folders / "finetuned", layers="**.layer.*")
    batches = sentences(text_folders / "finetuned")
    trainer(tmp_path).test(editor, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)

    def pool(output: Any, batch: Any) -> Tensor:
        mask = batch["attention_mask"][:, :, None]
        hidden = output if isinstance(output, Tensor) else output[0]
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def run(model: nn.Module, batch: Any) -> Any:
        return model({key: value for key, value in batch.items() if key != "labels"})

    pair = [TextClassifier(str(text_folders / name), 2) for name in ("pretrained", "finetuned")]
    expected = hand_cka(*pair, editor.layer_names, batches, run=run, pool=pool)
    assert len(expected) == 3
    assert editor.results.cka["test_0"]["finetuned"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folders_of_language_models(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair(tmp_path, family)
    write_rows(tmp_path)
    editor = MonoSoupEditor(tmp_path / "pretrained", tmp_path / "finetuned")
    data = LanguageTestsDataModule({name: str(tmp_path / f"{name}.jsonl") for name in ("texts", "choices", "answers")})
    trainer(tmp_path).test(editor, data, verbose=False)
    assert [editor.results.main_metric(name) for name in data.test_names] == [
        "perplexity", "choice_accuracy", "exact_match",
    ]  # fmt: skip
    reasons = {record["name"]: record["reason"] for record in editor.edited.records}
    assert (
        (reasons["model.lm_head.weight"] == "tied to model.transformer.wte.weight")
        if family == "gpt2"
        else (reasons["model.lm_head.weight"] is None)
    )
    editor.export("monosoup", tmp_path / "new")
    assert partials(tmp_path) == []
    variant = editor.edited.variants["monosoup"]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert_equal({f"model.{name}": value for name, value in weights(network).items()}, variant)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("finetuned", "new")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    # The folder is a source again, and gives what the variant gave.
    trainer(tmp_path).test(again := MonoSoupEditor(tmp_path / "pretrained", tmp_path / "new"), data, verbose=False)
    for key, value in again.results.metrics["finetuned"].items():
        assert value == pytest.approx(editor.results.metrics["monosoup"][key], rel=1e-6)


def test_tied_weights_stay_tied_in_the_model(tmp_path: Path) -> None:
    pair(tmp_path, "gpt2")
    editor = MonoSoupEditor(tmp_path / "pretrained", tmp_path / "finetuned")
    for variant in editor.edited.variants.values():
        assert variant["model.lm_head.weight"] is variant["model.transformer.wte.weight"]
    network = editor.model.model
    assert network.lm_head.weight is network.transformer.wte.weight


class TestDifferences:
    def test_other_depth(self) -> None:
        with pytest.raises(ValueError, match=r"(?s)pretrained weights are of another architecture.*missing") as caught:
            MonoSoupEditor(Classifier(Net(2, num_classes=7)), Classifier(Net(3, num_classes=7)))
        message = str(caught.value)
        assert "6 of 23 tensors differ" in message
        assert "  net.blocks.2.linear.weight" in message
        assert "`shared`" in message

    @pytest.mark.parametrize("start", [None, "", "module.", "net."])
    def test_deeper_model(self, tmp_path: Path, start: str | None) -> None:
        deeper: Any = Classifier(Net(4, num_classes=7))
        if start is not None:
            named = {name.removeprefix("net."): value for name, value in weights(deeper).items()}
            torch.save({start + name: value for name, value in named.items()}, tmp_path / "deeper.pt")
            deeper = tmp_path / "deeper.pt"
        with pytest.raises(ValueError, match=r"(?s)pretrained weights are of a deeper model, with 7 .*blocks\.3\."):
            MonoSoupEditor(deeper, models()[1])

    def test_other_parts_of_a_file_do_not_count(self, tmp_path: Path) -> None:
        held = weights(models()[0])
        held |= {f"text.blocks.{name.split('.')[-3]}.other": value for name, value in held.items() if "blocks" in name}
        held |= {"text.blocks.7.linear.weight": torch.zeros(6, 6)}
        torch.save(held, tmp_path / "more.pt")
        assert MonoSoupEditor(tmp_path / "more.pt", models()[1]).edited.records

    def test_other_width(self, tmp_path: Path) -> None:
        torch.save(Classifier(Net(3, 8, num_classes=7)).state_dict(), tmp_path / "wide.pt")
        with pytest.raises(ValueError, match=r"parameter +expected +in the file\n") as caught:
            MonoSoupEditor(tmp_path / "wide.pt", models()[1])
        rows = [line.split() for line in str(caught.value).splitlines()]
        assert ["net.blocks.0.linear.weight", "(6,", "6)", "(8,", "8)"] in rows
        assert "and 9 more" in str(caught.value)

    def test_file_of_another_model(self, tmp_path: Path) -> None:
        torch.save(vit(0).state_dict(), tmp_path / "vit.pt")
        with pytest.raises(ValueError, match=r"fine-tuned weights are of another architecture.*: 20 of 23"):
            MonoSoupEditor(models()[0], tmp_path / "vit.pt", models()[1])

    @pytest.mark.parametrize("lacking", ["net.blocks.1.norm.running_var", "net.blocks.1.linear.weight"])
    @pytest.mark.parametrize("role", ["pretrained", "fine-tuned", "soup's"])
    def test_missing_tensor(self, tmp_path: Path, role: str, lacking: str) -> None:
        content = weights(models()[0])
        del content[lacking]
        torch.save(content, tmp_path / "less.pt")
        roles = {
            "pretrained": models()[0],
            "fine-tuned": models()[1],
            "soup's": models()[1],
            role: tmp_path / "less.pt",
        }
        with pytest.raises(ValueError, match=rf"(?s)The {role} weights .*: 1 of 23 .*{lacking} +\(.*missing"):
            MonoSoupEditor(roles["pretrained"], roles["fine-tuned"], models()[0], soup=[roles["soup's"]])

    def test_number_of_batches_may_be_missing(self, tmp_path: Path) -> None:
        """Older files do not have it, and nothing depends on it."""
        content = {name: value for name, value in weights(models()[0]).items() if "num_batches" not in name}
        torch.save(content, tmp_path / "old.pt")
        editor = MonoSoupEditor(tmp_path / "old.pt", models()[1])
        assert torch.equal(editor.edited.variants["pretrained"]["net.head.weight"], content["net.head.weight"])

    def test_head_of_other_classes_is_shared(self, tmp_path: Path) -> None:
        """As with ConvNeXts of ImageNet-22k, whose fine-tuned head has other classes."""
        import timm

        kwargs = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
        torch.manual_seed(0)
        torch.save(timm.create_model("convnext_atto", num_classes=9, **kwargs).state_dict(), tmp_path / "big.pt")
        finetuned = ImageClassifier("convnext_atto", 5, model_kwargs=kwargs)
        with pytest.raises(ValueError, match=r"(?s)2 of \d+ .*model.head.fc.weight +\(5, 32\) +\(9, 32\).*`shared`"):
            MonoSoupEditor(tmp_path / "big.pt", finetuned)
        editor = MonoSoupEditor(tmp_path / "big.pt", finetuned, shared="model.head.fc.")
        before, after = torch.load(tmp_path / "big.pt", weights_only=True), weights(finetuned)
        for variant, value in editor.edited.variants.items():
            assert torch.equal(value["model.head.fc.weight"], after["model.head.fc.weight"]), variant
        assert torch.equal(editor.edited.variants["pretrained"]["model.stem.0.weight"], before["stem.0.weight"])
        reasons = {record["name"]: record["reason"] for record in editor.edited.records}
        assert reasons["model.head.fc.weight"] == "unchanged"
        images = torch.utils.data.TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 5)
        trainer(tmp_path).test(editor, torch.utils.data.DataLoader(images, batch_size=4), verbose=False)
        assert editor.results.metrics["pretrained"] != editor.results.metrics["monosoup"]

    def test_shared_weights_are_the_finetuned_even_where_both_have_some(self) -> None:
        editor = MonoSoupEditor(*models(), shared=["net.head."])
        for value in editor.edited.variants.values():
            assert torch.equal(value["net.head.weight"], models()[1].net.head.weight)

    def test_folder_without_a_head(self, text_folders: Path) -> None:
        """Transformers would make one up at random."""
        head = ("model.pre_classifier.", "model.classifier.")
        with pytest.raises(ValueError, match=r"(?s)pretrained .*: 4 of .*model.classifier.weight .*missing.*`shared`"):
            MonoSoupEditor(text_folders / "headless", text_folders / "finetuned")
        editor = MonoSoupEditor(text_folders / "headless", text_folders / "finetuned", shared=head)
        value = editor.edited.variants["pretrained"]["model.classifier.weight"]
        assert torch.equal(value, TextClassifier(str(text_folders / "finetuned"), 2).model.classifier.weight)
        with pytest.raises(ValueError, match=r"for sequence classification or causal .* says 'DistilBertModel'"):
            MonoSoupEditor(text_folders / "pretrained", text_folders / "headless")

    def test_finetuned_folder_that_lacks_the_head_it_claims_to_have(self, tmp_path: Path, text_folders: Path) -> None:
        shutil.copytree(text_folders / "finetuned", tmp_path / "less")
        content = safetensors.torch.load_file(tmp_path / "less" / "model.safetensors")
        content = {name: value for name, value in content.items() if "classifier" not in name}
        safetensors.torch.save_file(content, tmp_path / "less" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"(?s)fine-tuned .*: 4 of .*model.classifier.weight .*missing"):
            MonoSoupEditor(text_folders / "pretrained", tmp_path / "less")

    def test_folder_of_other_classes_or_another_model(self, tmp_path: Path, text_folders: Path) -> None:
        from transformers import DistilBertForSequenceClassification

        DistilBertForSequenceClassification.from_pretrained(text_folders / "headless", num_labels=3).save_pretrained(
            tmp_path / "three"
        )
        with pytest.raises(ValueError, match=r"(?s)model.classifier.weight +\(2, 32\) +\(3, 32\)"):
            MonoSoupEditor(tmp_path / "three", text_folders / "finetuned")
        with pytest.raises(ValueError, match=r"`model` to hold a transformers model, since '.*finetuned' is a folder"):
            MonoSoupEditor(text_folders / "finetuned", models()[1])


class Unpickled:
    """Tells by a file that it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestDamage:
    @pytest.mark.parametrize("name", ["text.pt", "text.safetensors", "short.pt", "short.safetensors", "empty.pt"])
    @pytest.mark.parametrize("is_pretrained", [True, False])
    def test_files_that_are_no_checkpoints(self, tmp_path: Path, name: str, is_pretrained: bool) -> None:
        whole = tmp_path / f"whole{Path(name).suffix}"
        (torch.save if whole.suffix == ".pt" else safetensors.torch.save_file)(weights(models()[0]), whole)
        content = {"text": b"hello, this is a text", "short": whole.read_bytes()[:-700], "empty": b""}
        (tmp_path / name).write_bytes(content[Path(name).stem])
        sources = [models()[0], tmp_path / name]
        pretrained, finetuned = reversed(sources) if is_pretrained else sources
        with pytest.raises(ValueError, match=f"'.*{name}' is damaged or no (checkpoint|safetensors file)"):
            MonoSoupEditor(pretrained, finetuned, models()[0])

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"checkpoint file at '.*none\.pt', but there is none"):
            MonoSoupEditor(tmp_path / "none.pt", models()[1])

    def test_content_without_weights(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "epoch.pt")
        with pytest.raises(ValueError, match=r"to hold a state dict of tensors, but it holds keys \['epoch'\]"):
            MonoSoupEditor(tmp_path / "epoch.pt", models()[1])

    @pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
    def test_pickled_objects_are_not_unpickled(self, tmp_path: Path, save: Callable[..., Any]) -> None:
        save({"state_dict": weights(models()[0]), "callback": Unpickled(tmp_path / "mark")}, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt' (holds pickled objects|is damaged)"):
            MonoSoupEditor(tmp_path / "bad.ckpt", models()[1])
        with pytest.raises(ValueError, match=r"bad\.ckpt' (holds pickled objects|is damaged)"):
            MonoSoupEditor(models()[0], tmp_path / "bad.ckpt", models()[1])
        assert not (tmp_path / "mark").exists()

    def test_folder_without_weights_or_configuration(self, tmp_path: Path, text_folders: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "short").mkdir()
        shutil.copy(text_folders / "finetuned" / "config.json", tmp_path / "short")
        for name in ("empty", "short"):
            with pytest.raises(ValueError, match=f"'.*{name}'"):
                MonoSoupEditor(tmp_path / name, text_folders / "finetuned")
            with pytest.raises((ValueError, OSError), match=name):
                MonoSoupEditor(text_folders / "pretrained", tmp_path / name)

    def test_folder_of_truncated_weights(self, tmp_path: Path, text_folders: Path) -> None:
        shutil.copytree(text_folders / "finetuned", tmp_path / "cut")
        file = tmp_path / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ValueError, match=r"'.*cut' could not be loaded"):
            MonoSoupEditor(tmp_path / "cut", text_folders / "finetuned")
        with pytest.raises(ValueError, match=r"'.*cut' could not be loaded"):
            MonoSoupEditor(text_folders / "pretrained", tmp_path / "cut")

    def test_damaged_configuration(self, tmp_path: Path, text_folders: Path) -> None:
        shutil.copytree(text_folders / "finetuned", tmp_path / "bad")
        (tmp_path / "bad" / "config.json").write_text('{"architectures": ["DistilBert')
        with pytest.raises(ValueError, match=r"'.*bad' could not be loaded"):
            MonoSoupEditor(text_folders / "pretrained", tmp_path / "bad")


def test_folder_keeps_its_configuration(tmp_path: Path, text_folders: Path) -> None:
    editor = MonoSoupEditor(text_folders / "pretrained", text_folders / "finetuned")
    editor.export("highonly", tmp_path / "new")
    found, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "new", text_folders / "finetuned")
    )
    assert found == expected
    assert {path.name for path in (text_folders / "finetuned").iterdir()} == {
        path.name for path in (tmp_path / "new").iterdir()
    }
