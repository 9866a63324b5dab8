"""Features of language models, against transformers on one text at a time, and against its padded batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_cka.analysis.text_model import TextModel
from lit_cka.analysis.texts import Samples

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "film", "plot", "was", "not", "very", "good"]
WORDS += ["bad", "and"]
TEXTS = [
    "the cat was good",
    "a",
    "the film was not very bad and the plot was not bad and the dog was very very good",
    "the dog and the cat",
    "not good",
]
SAMPLES = Samples([f"s{index}" for index in range(5)], TEXTS, [0, 1, 1, 0, 1], "films")
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS = ["bert", "distilbert", "roberta", "t5"]
DECODERS = ["gpt2", "llama", "opt"]
WITH_NORM = ["gpt2", "llama", "opt", "t5"]


def config(family: str) -> Any:
    import transformers

    size = {"vocab_size": len(WORDS), "max_position_embeddings": 32}
    names = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = {
        "bert": lambda: transformers.BertConfig(**SMALL, **size, initializer_range=0.4),
        "distilbert": lambda: transformers.DistilBertConfig(
            **size, dim=16, n_layers=3, n_heads=2, hidden_dim=32, initializer_range=0.4
        ),
        # Two rows of its table of positions are never used.
        "roberta": lambda: transformers.RobertaConfig(
            **SMALL, **{**size, "max_position_embeddings": 34}, **{**names, "pad_token_id": 1}, initializer_range=0.4
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=16, n_layer=3, n_head=2, n_positions=32, initializer_range=0.4, **names
        ),
        "llama": lambda: transformers.LlamaConfig(**SMALL, **size, **names, initializer_range=0.4),
        "opt": lambda: transformers.OPTConfig(
            **size, **names, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=2,
            ffn_dim=32, init_std=0.4,
        ),
        # With a convolution and its norm behind the first block.
        "deberta": lambda: transformers.DebertaV2Config(**SMALL, **size, conv_kernel_size=3, relative_attention=True),
        "albert": lambda: transformers.AlbertConfig(**SMALL, **size, embedding_size=8),
        "xlnet": lambda: transformers.XLNetConfig(vocab_size=len(WORDS), d_model=16, n_layer=3, n_head=2, d_inner=32),
    }  # fmt: skip
    return made[family]()


def save_tokenizer(folder: Path, family: str, **options: Any) -> None:
    """Of whole words, with special tokens around a text for encoders; gives out token types, as the default is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family in ENCODERS:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save(folder: Path, family: str, head: str = "AutoModel", **options: Any) -> Path:
    import transformers

    torch.manual_seed(5)
    getattr(transformers, head).from_config(config(family)).save_pretrained(folder)
    save_tokenizer(folder, family, **options)
    return folder


@pytest.fixture(scope="module", params=[*ENCODERS, *DECODERS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / request.param, request.param)


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    body = AutoModel.from_pretrained(folder).eval()
    return body.encoder if folder.name == "t5" else body, AutoTokenizer.from_pretrained(folder)


def pooled(states: torch.Tensor, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Rows (n, d) of hidden states (n, tokens, d)."""
    rows = [state[kept == 1] for state, kept in zip(states.double().numpy(), mask, strict=True)]
    return np.stack([{"mean": row.mean(axis=0), "last": row[-1], "cls": row[0]}[pooling] for row in rows])


@torch.no_grad()
def by_transformers(folder: Path, pooling: str = "mean") -> list[np.ndarray]:
    """Of each hidden state of transformers, (n, d), from one text at a time, so that nothing is padded."""
    body, tokenizer = load(folder)
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = body(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
        rows.append([pooled(state, np.ones(ids.shape), pooling) for state in states])
    return [np.concatenate(values) for values in zip(*rows, strict=True)]


def assert_close(features: dict[str, torch.Tensor], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Equal but for rounding, which goes by the largest features."""
    assert list(features) == list(expected)
    for name, value in features.items():
        X = np.asarray(expected[name])
        np.testing.assert_allclose(value.numpy(), X, rtol=0, atol=tolerance * np.abs(X).max(), err_msg=name)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_layers_are_the_hidden_states_of_transformers(folder: Path, pooling: Any) -> None:
    features = TextModel(folder, pooling=pooling, batch_size=3).features(SAMPLES, progress=False)
    states = by_transformers(folder, pooling)
    names = ["embeddings", "layers.0", "layers.1", "layers.2"]
    if folder.name not in WITH_NORM:
        assert_close(features.layers, dict(zip(names, states, strict=True)))
    else:
        assert list(features.layers) == [*names, "final_norm"]
        before = features.layers.pop("layers.2")
        assert_close(features.layers, dict(zip([*names[:3], "final_norm"], states, strict=True)))
        assert not np.allclose(before, states[-1], atol=0.01)
        if pooling != "mean":  # of one token, so that the norm can be applied by hand
            body = load(folder)[0]
            norm = {"gpt2": "ln_f", "llama": "norm", "opt": "decoder.final_layer_norm", "t5": "final_layer_norm"}
            with torch.no_grad():
                after = body.get_submodule(norm[folder.name])(before.float())
            np.testing.assert_allclose(after.numpy(), states[-1], rtol=1e-4, atol=1e-4)
    assert (features.ids, features.labels, features.data) == (SAMPLES.ids, SAMPLES.labels, "films")
    assert (features.model, features.pooling) == (folder.name, pooling)


def test_layers_are_those_of_padded_batches_of_transformers(tmp_path: Path) -> None:
    path = save(tmp_path / "bert", "bert")
    body, tokenizer = load(path)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = body(**batch, output_hidden_states=True).hidden_states
    expected = [pooled(state, batch["attention_mask"].numpy(), "mean") for state in states]
    names = ["embeddings", "layers.0", "layers.1", "layers.2"]
    assert_close(TextModel(path).features(SAMPLES, False).layers, dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_padding_and_batches_change_nothing(folder: Path, tmp_path: Path, pooling: Any) -> None:
    exact: dict[str, Any] = {"pooling": pooling, "dtype": "float64"}  # so that rounding hides nothing
    expected = TextModel(folder, **exact, batch_size=1).features(SAMPLES, False).layers
    for side, batch_size, options in (
        ("left", 5, {}),
        ("right", 5, {}),
        ("left", 2, {"pad_token": None}),
        ("left", 3, {"pad_token": None, "eos_token": None}),
        ("right", 3, {"pad_token": "the"}),  # a token that texts have, too
    ):
        save_tokenizer(tmp_path, folder.name, padding_side=side, **options)
        model = TextModel(folder, tokenizer=tmp_path, **exact, batch_size=batch_size)
        assert model.tokenizer.padding_side == side
        assert_close(model.features(SAMPLES, False).layers, expected, 1e-7)
    order = [2, 0, 4, 1, 3]
    shuffled = Samples([SAMPLES.ids[index] for index in order], [TEXTS[index] for index in order])
    features = model.features(shuffled, False)
    assert features.ids == shuffled.ids
    assert_close(features.layers, {name: value[order] for name, value in expected.items()}, 1e-7)


def test_a_padding_token_that_the_model_has_no_embedding_for(tmp_path: Path) -> None:
    path = save(tmp_path / "gpt2", "gpt2")
    expected = TextModel(path).features(SAMPLES, False).layers
    save_tokenizer(path, "gpt2", pad_token="[PAD]")
    model = TextModel(path)
    assert model.tokenizer.pad_token_id == len(WORDS)
    assert_close(model.features(SAMPLES, False).layers, expected)


@pytest.mark.parametrize(
    ("family", "head", "body"),
    [
        ("bert", "AutoModelForSequenceClassification", "bert"),
        ("bert", "AutoModelForMaskedLM", "bert"),  # which has no pooler
        ("distilbert", "AutoModelForSequenceClassification", "distilbert"),
        ("gpt2", "AutoModelForCausalLM", "transformer"),
        ("llama", "AutoModelForCausalLM", "model"),
        ("t5", "AutoModelForSeq2SeqLM", "encoder"),
        ("t5", "AutoModelForTextEncoding", "encoder"),  # which has no decoder
    ],
)
def test_models_with_a_head_have_the_weights_and_names_of_their_body(
    tmp_path: Path, family: str, head: str, body: str
) -> None:
    import transformers

    path = save(tmp_path / "tuned", family, head)
    model = TextModel(path)
    saved = getattr(transformers, head).from_pretrained(path).get_submodule(body).state_dict()
    weights = {name: value for name, value in model.network.model.state_dict().items() if "pooler" not in name}
    assert weights
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in weights.items())
    bare = TextModel(save(tmp_path / "bare", family))
    assert list(bare.features(SAMPLES, False).layers) == list(model.features(SAMPLES, False).layers)


@pytest.mark.parametrize(("prefix", "num_missing"), [("bert.", 53), ("bert.encoder.layer.1.attention.self.query", 2)])
def test_missing_weights_of_the_body_are_an_error(tmp_path: Path, prefix: str, num_missing: int) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "bert", "bert", "AutoModelForMaskedLM")
    tensors = load_file(path / "model.safetensors")
    renamed = {f"net.{name}" if name.startswith(prefix) else name: value for name, value in tensors.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"all weights of BertModel in '.*bert', but {num_missing} are missing, such"):
        TextModel(path)


def test_each_text_is_run_once_in_eval_mode_and_nothing_stays_behind(folder: Path) -> None:
    model = TextModel(folder, batch_size=2)
    rows = []
    model.network.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((len(kwargs["input_ids"]), module.training)), with_kwargs=True
    )
    model.features(SAMPLES, False)
    assert rows == [(2, False), (2, False), (1, False)]
    hooks = [hook for module in model.network.modules() for hook in module._forward_hooks.values()]
    hooks += [hook for module in model.network.modules() for hook in module._forward_pre_hooks.values()]
    assert len(hooks) == 1


def test_layers_can_be_chosen_also_within_the_network(folder: Path) -> None:
    expected = TextModel(folder).features(SAMPLES, False).layers
    chosen = TextModel(folder, layers="layers.*").features(SAMPLES, False).layers
    assert_close(chosen, {name: value for name, value in expected.items() if name.startswith("layers")})
    blocks = {"bert": "encoder.layer", "roberta": "encoder.layer", "distilbert": "transformer.layer", "t5": "block"}
    blocks |= {"gpt2": "h", "llama": "layers", "opt": "decoder.layers"}
    own = f"model.{blocks[folder.name]}.1"
    layers = TextModel(folder, layers=[own, "layers.1"]).features(SAMPLES, False).layers
    assert set(layers) == {own, "layers.1"}
    assert all(torch.equal(value, expected["layers.1"]) for value in layers.values())
    with pytest.raises(ValueError, match=r"Unknown layer 'layers.3'.*layers.0"):
        TextModel(folder, layers="layers.3").features(SAMPLES, False)


@pytest.mark.parametrize(
    ("options", "tokenizer", "limit"),
    [({}, {}, 32), ({"max_length": 8}, {}, 8), ({}, {"model_max_length": 9}, 9), ({"max_length": 2**40}, {}, 32)],
)
def test_long_texts_are_cut_with_one_warning(
    folder: Path, tmp_path: Path, options: dict[str, int], tokenizer: dict[str, int], limit: int
) -> None:
    save_tokenizer(tmp_path, folder.name, **tokenizer)
    model = TextModel(folder, tokenizer=tmp_path, batch_size=2, **options)
    if folder.name == "t5" and limit == 32:  # its positions are relative
        assert model.max_length == min(options.get("max_length", 512), 2**31)
        return
    assert model.max_length == limit
    exact = " ".join(["good"] * (limit - 2 * (folder.name in ENCODERS)))
    long = Samples(["a", "b", "c", "d"], [exact + " bad", exact, "bad", exact + " bad bad"], None, "films")
    with pytest.warns(UserWarning, match=rf"^2 of 4 texts of 'films' were cut to {limit} tokens\.$") as warned:
        layers = model.features(long, False).layers
    assert len(warned) == 1
    for value in layers.values():  # what is left of two is the second
        assert_close({"cut": value[[0, 3]]}, {"cut": value[[1, 1]]})
        assert not torch.allclose(value[2], value[1], atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, family: str) -> None:
    import transformers

    transformers.AutoModel.from_config(config(family)).save_pretrained(tmp_path / family)
    with pytest.raises(ValueError, match=rf"a tokenizer at '.*{family}', but there is none; `tokenizer` can name"):
        TextModel(tmp_path / family)
    save_tokenizer(tmp_path / "tokenizer", family)
    model = TextModel(tmp_path / family, tokenizer=str(tmp_path / "tokenizer"), name="mine")
    assert model.features(SAMPLES, False).model == "mine"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a transformers model at '.*none', but found none"):
        TextModel(tmp_path / "none")
    path = save(tmp_path / "bert", "bert")
    (path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TextModel(path)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("albert", "AlbertModel to hold its 3 blocks in one list, but there are 0 such lists"),
        ("xlnet", r"block of XLNetModel to run once and to return hidden states \(1, 2, d\).* got \[\(2, 1, 'd'\)"),
    ],
)
def test_architectures_of_another_kind(tmp_path: Path, family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextModel(save(tmp_path / family, family))


def test_only_a_norm_behind_the_last_block_is_the_final_one(tmp_path: Path) -> None:
    model = TextModel(save(tmp_path / "deberta", "deberta"))
    assert list(model.features(SAMPLES, False).layers) == ["embeddings", "layers.0", "layers.1", "layers.2"]


def test_texts_that_do_not_fit_the_model(tmp_path: Path) -> None:
    path = save(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match="every text to have tokens, but sample 'b' has none for gpt2"):
        TextModel(path).features(Samples(["a", "b"], ["the", " "]), False)
    names = json.loads((path / "tokenizer.json").read_text())
    names["model"]["vocab"]["dog"] = 40
    shutil.copytree(path, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"tokens below 16, those that gpt2 knows, .* gives 40 in sample 's2'"):
        TextModel(path, tokenizer=tmp_path / "other").features(SAMPLES, False)
    assert TextModel(path).features(Samples(["a"], ["the"]), False).num_samples == 1


def test_dtypes_and_options(tmp_path: Path) -> None:
    path = save(tmp_path / "gpt2", "gpt2")
    load(path)[0].to(torch.bfloat16).save_pretrained(path)
    for dtype, expected in (("auto", "bfloat16"), ("float32", "float32"), (torch.float64, "float64")):
        model = TextModel(path, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in model.network.parameters()} == {getattr(torch, expected)}
        assert {value.dtype for value in model.features(SAMPLES, False).layers.values()} == {torch.float64}
    with pytest.raises(ValueError, match="'mean', 'last' or 'cls', but got 'flatten'"):
        TextModel(path, pooling="flatten")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of 1 or more, got 0 and 32"):
        TextModel(path, max_length=0)
    with pytest.raises(ValueError, match="of 1 or more, got 512 and 0"):
        TextModel(path, batch_size=0)
