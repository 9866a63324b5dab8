"""Language models on files of texts, choices and answers, against transformers one text at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_cka.data.language import Encoder, LanguageTestsDataModule, collate, read_language_rows
from lit_cka.models.language import CausalLanguageModel

CORPUS = [
    "the cat sat on the mat and the dog ran in the park",
    "a question: which animal is the fastest? answer: the cat or the dog",
    "what did the dog do in the park? it sat, and ran, and sat again",
]
TEXTS = [
    "the cat sat",
    "which animal ran in the park and sat on the dog, the fastest dog",
    "a",
    "what is the answer to the question? the mat",
    "again and again it ran",
]
QUESTIONS = [
    {"question": "which animal sat?", "choices": [" the cat", " the dog and the fastest cat", " a"], "answer": 0},
    {"question": "what did it do ", "choices": ["sat", "ran in the park"], "answer": 1},
    {"question": "the question: the answer:", "choices": [" it", " on", " in", " the fastest animal"], "answer": 2},
    {"question": "the dog", "choices": [" ran again", " sat again", " ran"], "answer": 1},
    {"question": "a cat, a dog", "choices": [" and a mat", " or"], "answer": 0},
    {"question": "on the mat\n", "choices": ["the cat", "it is the park"], "answer": 1},
]


def save_tokenizer(folder: Path, family: str) -> None:
    """Byte-level without BOS, as GPT-2 has it, or of whole words' pieces after a BOS, as Llama has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>"] if family == "gpt2" else ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token=None if family == "gpt2" else "<unk>"))
    if family == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([text + "\n" for text in CORPUS], trainer)
    names = {"eos_token": specials[-1]}
    if family == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names |= {"bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, TrOCRConfig

    torch.manual_seed(5)
    # Wide enough weights for the predictions to differ from place to place.
    config = {
        "gpt2": GPT2Config(
            vocab_size=90, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4, bos_token_id=0
        ),
        "llama": LlamaConfig(
            vocab_size=90,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.4,
        ),
        "trocr": TrOCRConfig(
            vocab_size=90,
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.4,
        ),
    }[family]
    config.eos_token_id = None
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)


@pytest.fixture(params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", request.param)
    save_tokenizer(tmp_path / "model", request.param)
    return tmp_path / "model"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "llama", "llama")
    return tmp_path / "llama"


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def batches(folder: Path, rows: list[Any], **options: Any) -> Iterator[Any]:
    """What the data module makes of rows in a file."""
    data = LanguageTestsDataModule(
        {"rows": write(folder / "rows.jsonl", rows)}, **{"tokenizer": str(folder), **options}
    )
    data.setup("test")
    yield from data.test_dataloader()[0]


def evaluate(folder: Path, rows: list[Any], **options: Any) -> dict[str, torch.Tensor]:
    module = CausalLanguageModel(folder)
    values = [module.evaluate(batch) for batch in batches(folder, rows, **options)]
    return {key: torch.cat([value[key] for value in values]) for key in values[0]}


def answer_rows(folder: Path, num_tokens: int = 3) -> list[dict[str, str]]:
    """Prompts, each with what the model goes on to say (1) and with something else (0), in turn."""
    model, tokenizer = CausalLanguageModel(folder).model, load_tokenizer(folder)
    rows = []
    for text in TEXTS + CORPUS:
        for words in range(1, len(text.split()) + 1):
            prompt = " ".join(text.split()[:words])
            tokens = tokenizer(prompt, return_tensors="pt")
            decoded = model.generate(**tokens, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[0]
            answer = tokenizer.decode(decoded, skip_special_tokens=True).removeprefix(prompt)
            # Not all that a random model says is tokenized as it was said.
            if tokenizer(prompt + answer)["input_ids"] == decoded.tolist() and answer.strip():
                rows += [{"prompt": prompt, "answer": answer}, {"prompt": prompt, "answer": answer[:-1] + "q"}]
    assert len(rows) >= 16
    return rows


def test_perplexity_is_that_of_transformers_text_by_text(folder: Path) -> None:
    values = evaluate(folder, [{"text": text} for text in TEXTS], batch_size=3)
    model, tokenizer = CausalLanguageModel(folder).model, load_tokenizer(folder)
    nll, num_tokens = [], []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        num_tokens.append(ids.shape[1] - 1)
        nll.append(model(ids, labels=ids).loss.item() * num_tokens[-1] if num_tokens[-1] else 0.0)
    assert values["num_tokens"].tolist() == num_tokens
    assert values["nll"].tolist() == pytest.approx(nll, rel=1e-6)
    assert all(value.dtype == torch.float64 for value in values.values())


def test_exact_match_is_greedy_decoding(folder: Path) -> None:
    rows = answer_rows(folder)
    values = evaluate(folder, rows, batch_size=5)
    assert values["exact_match"].tolist() == [1.0, 0.0] * (len(rows) // 2)
    model, tokenizer = CausalLanguageModel(folder).model, load_tokenizer(folder)
    for index, row in enumerate(rows):
        whole = tokenizer(row["prompt"] + row["answer"], return_tensors="pt")["input_ids"]
        start = len(tokenizer(row["prompt"])["input_ids"])
        labels = whole.clone()
        labels[:, :start] = -100
        num_tokens = whole.shape[1] - start
        assert values["num_tokens"][index] == num_tokens
        assert values["nll"][index].item() == pytest.approx(model(whole, labels=labels).loss.item() * num_tokens)
        decoded = model.generate(whole[:, :start], max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        assert values["exact_match"][index] == torch.equal(decoded, whole)


def hand_scores(folder: Path, row: dict[str, Any]) -> list[float]:
    model, tokenizer = CausalLanguageModel(folder).model, load_tokenizer(folder)
    scores = []
    for choice in row["choices"]:
        ids = tokenizer(row["question"] + choice)["input_ids"]
        start = len(tokenizer(row["question"].rstrip())["input_ids"])
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        scores.append(sum(log_p[position - 1, ids[position]].item() for position in range(start, len(ids))))
    return scores


def test_choices_are_those_by_hand(folder: Path) -> None:
    rows = [{**row, "answer": answer} for row in QUESTIONS for answer in range(len(row["choices"]))]
    values = evaluate(folder, rows, batch_size=4)
    plain, normalized = [], []
    for row in rows:
        scores = hand_scores(folder, row)
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        plain.append(float(scores.index(max(scores)) == row["answer"]))
        normalized.append(float(by_length.index(max(by_length)) == row["answer"]))
    assert values["choice_accuracy"].tolist() == plain
    assert values["choice_accuracy_normalized"].tolist() == normalized
    assert plain != normalized
    assert sum(plain) == sum(normalized) == len(QUESTIONS)


@pytest.mark.parametrize("kind", ["perplexity", "exact_match", "multiple_choice"])
def test_values_do_not_depend_on_batches_and_padding(folder: Path, kind: str) -> None:
    rows: list[Any] = {
        "perplexity": [{"text": text} for text in TEXTS],
        "exact_match": answer_rows(folder)[:9],
        "multiple_choice": QUESTIONS,
    }[kind]
    one_by_one = evaluate(folder, rows, batch_size=1)
    for size in (2, 5, 16):
        torch.testing.assert_close(evaluate(folder, rows, batch_size=size), one_by_one, rtol=1e-6, atol=1e-6)
    module = CausalLanguageModel(folder)
    (batch,) = batches(folder, rows, batch_size=16)
    assert batch["kind"] == kind
    before = module.evaluate(batch)
    batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, 7)
    torch.testing.assert_close(module.evaluate(batch), before, rtol=1e-6, atol=1e-6)


def test_batches_are_padded_on_the_right_with_a_token_that_is_masked(folder: Path) -> None:
    (batch,) = batches(folder, QUESTIONS[:2])
    mask, tokenizer = batch["attention_mask"], load_tokenizer(folder)
    assert batch["sample"].tolist() == [0, 0, 0, 1, 1]
    assert batch["answer"].tolist() == [0, 1]
    assert batch["length"].tolist() == [8, 28, 2, 3, 15]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    texts = [row["question"] + choice for row in QUESTIONS[:2] for choice in row["choices"]]
    assert mask.sum(dim=1).tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert (batch["input_ids"][mask == 0] == tokenizer.eos_token_id).all()
    scored = [ids[target != -100] for ids, target in zip(batch["input_ids"], batch["targets"], strict=True)]
    expected = [choice.strip() for row in QUESTIONS[:2] for choice in row["choices"]]
    assert [tokenizer.decode(ids).strip() for ids in scored] == expected


def test_a_space_belongs_to_the_word_after_it(folder: Path) -> None:
    (batch,) = batches(folder, [{"prompt": "the cat ", "answer": "sat on"}, {"prompt": "the cat", "answer": " sat on"}])
    assert torch.equal(batch["targets"][0], batch["targets"][1])
    tokenizer = load_tokenizer(folder)
    assert batch["input_ids"][0].tolist() == tokenizer("the cat sat on")["input_ids"]
    num_prompt = len(tokenizer("the cat")["input_ids"])
    assert (batch["targets"][0] == -100).sum() == num_prompt


def test_beginning_comes_once_and_no_end(llama: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(llama)
    assert Encoder(tokenizer, 64).beginning == [1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoder = Encoder(tokenizer, 64)
    rows = encoder.text("the cat sat", "here") + encoder.text("<s>the cat sat", "here")
    rows += encoder.continuations("<s>the cat", [" sat"], "here") + encoder.continuations("the cat", [" sat"], "here")
    for row in rows:
        assert row.tokens[0] == 1
        assert not {1, 2} & set(row.tokens[1:])
    assert rows[2] == rows[3]
    assert rows[0].num_scored == len(rows[0].tokens) - 1


def test_long_texts_are_cut_with_one_warning(folder: Path) -> None:
    rows = [{"text": text} for text in [*CORPUS, "a"]]
    with pytest.warns(UserWarning, match=r"3 of 4 texts were cut at the end in .*rows.jsonl") as warned:
        (batch,) = batches(folder, rows, max_length=10)
    assert len(warned) == 1
    assert (batch["targets"] != -100).sum(dim=1).tolist()[:3] == [9, 9, 9]
    for ids, text in zip(batch["input_ids"], CORPUS, strict=False):
        assert ids.tolist() == load_tokenizer(folder)(text)["input_ids"][:10]


def test_long_prompts_lose_their_beginning_alike_for_all_choices(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    row = {"prompt": CORPUS[0], "choices": [" a cat", " the fastest animal"], "answer": 0}
    with pytest.warns(UserWarning, match="1 of 1 prompts were cut at the beginning"):
        (batch,) = batches(folder, [row], max_length=14)
    (whole,) = batches(folder, [row])
    num = batch["attention_mask"].sum(dim=1)
    assert num.max() == 14
    lost = whole["attention_mask"].sum(dim=1) - num
    assert lost[0] == lost[1] > 0
    begin = int(tokenizer.bos_token_id is not None and tokenizer.bos_token == "<s>")
    for index in range(2):
        full = whole["input_ids"][index, : num[index] + lost[index]].tolist()
        assert batch["input_ids"][index, : num[index]].tolist() == full[:begin] + full[begin + lost[index] :]
        scored = [values["targets"][index][values["targets"][index] != -100].tolist() for values in (batch, whole)]
        assert scored[0] == scored[1]


def test_an_answer_needs_room(folder: Path) -> None:
    answer = " the cat sat on the mat"
    prompt = "which animal is the fastest?"
    tokenizer = load_tokenizer(folder)
    num = len(tokenizer(prompt + answer)["input_ids"]) - len(tokenizer(prompt)["input_ids"])
    rows = [{"prompt": prompt, "answer": answer}]
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        (batch,) = batches(folder, rows, max_length=num + 1)
    assert (batch["targets"][0] != -100).tolist() == [False] + [True] * num
    with pytest.raises(ValueError, match=rf"at most {num - 1} tokens by `max_length`, but line 1 of .* has {num}"):
        next(batches(folder, rows, max_length=num))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "", '{"text": "a"'], r"JSON object in each line, but line 3 of '.*rows.jsonl' is none"),
        (['["a"]'], r"JSON object in each line, but line 1 of .* is \[\"a\"\]"),
        (['{"text": "a"}', '{"prompt": "a", "answer": "b"}'], "one kind, perplexity .* line 2 of .* for exact_match"),
        (['{"body": "a"}'], r"Expected the keys `text`, or .*, but line 1 of .* has \['body'\]"),
        (['{"prompt": "a", "question": "a", "answer": "b"}'], "Expected the keys"),
        (['{"text": "a"}', '{"text": " "}'], r"`text` to be a text that is not empty, but line 2 of .* has ' '"),
        (['{"text": 3}'], "`text` to be a text"),
        (['{"prompt": "", "answer": "a"}'], "`prompt` to be a text that is not empty"),
        (['{"question": "a", "answer": ""}'], "`answer` to be a text that is not empty"),
        (['{"question": "a", "answer": 4}'], "`answer` to be a text that is not empty"),
        (['{"question": "a", "choices": [], "answer": 0}'], r"two or more texts, but line 1 of .* has \[\]"),
        (['{"question": "a", "choices": ["a", ""], "answer": 0}'], "`choices` to be a text that is not empty"),
        (['{"question": "a", "choices": ["a", "b"], "answer": 2}'], r"index of a choice, 0 to 1, but line 1 .* has 2"),
        (['{"question": "a", "choices": ["a", "b"], "answer": -1}'], "index of a choice"),
        (['{"question": "a", "choices": ["a", "b"], "answer": true}'], "index of a choice"),
        (['{"question": "a", "choices": ["a", "b"], "answer": "b"}'], "index of a choice"),
        (["", " "], "has no rows"),
    ],
)
def test_bad_files(llama: Path, lines: list[str], message: str) -> None:
    path = llama / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        LanguageTestsDataModule({"rows": str(path)}, tokenizer=str(llama)).setup("test")


def test_text_that_is_no_utf_8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl' is none"):
        read_language_rows(tmp_path / "a.jsonl")


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    files = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    with pytest.raises(FileNotFoundError, match=r"no a at .*a\.jsonl, no b at .*b\.jsonl"):
        LanguageTestsDataModule(files).setup("test")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_missing_tokenizer(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, family)
    files = {"a": write(tmp_path / "a.jsonl", [{"text": "a"}])}
    with pytest.raises(ValueError, match=r"Expected a tokenizer at .*, but there is none"):
        LanguageTestsDataModule(files, tokenizer=str(tmp_path)).setup("test")
    with pytest.raises(ValueError, match="`tokenizer` to name a tokenizer"):
        LanguageTestsDataModule(files).setup("test")


def test_options(llama: Path) -> None:
    with pytest.raises(ValueError, match="`max_length` to be at least 2"):
        LanguageTestsDataModule({"a": "a.jsonl"}, max_length=1)
    with pytest.raises(ValueError, match="at least one test set"):
        LanguageTestsDataModule({}, tokenizer=str(llama)).setup("test")


class Collecting(CausalLanguageModel):
    """Collects what `evaluate` returns under a trainer."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.collected.setdefault(dataloader_idx, []).append(self.evaluate(batch))


def test_trainer_tests_with_the_tokenizer_of_the_model(folder: Path) -> None:
    files = {
        "texts": write(folder / "texts.jsonl", [{"text": text} for text in TEXTS]),
        "questions": write(folder / "questions.jsonl", QUESTIONS),
    }
    module, data = Collecting(str(folder)), LanguageTestsDataModule(files, batch_size=2, num_workers=1)
    module.collected = {}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", default_root_dir=folder, **options).test(module, data, verbose=False)
    assert data.test_names == ["texts", "questions"]
    nll = torch.cat([values["nll"] for values in module.collected[0]])
    assert nll.tolist() == pytest.approx(evaluate(folder, [{"text": text} for text in TEXTS])["nll"].tolist())
    assert sum(len(values["choice_accuracy"]) for values in module.collected[1]) == len(QUESTIONS)
    assert pickle.loads(pickle.dumps(data.test_sets[1].collate)).func is collate


def test_weights_keep_their_dtype_and_values_are_accurate(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", torch.bfloat16)
    save_tokenizer(tmp_path, "llama")
    module = CausalLanguageModel(tmp_path)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not module.model.training
    (batch,) = batches(tmp_path, [{"text": CORPUS[0]}])
    log_p = module(batch)[0].double().log_softmax(dim=-1)
    expected = -log_p[:-1].gather(1, batch["input_ids"][0, 1:, None]).sum().item()
    assert module.evaluate(batch)["nll"].item() == pytest.approx(expected, rel=1e-5)


def test_models_that_give_all_logits_or_none_have_the_same_values(tmp_path: Path) -> None:
    save_model(tmp_path, "trocr")  # which has no `logits_to_keep`
    save_tokenizer(tmp_path, "gpt2")
    (batch,) = batches(tmp_path, QUESTIONS[:3])
    module = CausalLanguageModel(tmp_path)
    positions = torch.tensor([1, 3])
    assert torch.equal(module(batch, positions), module(batch)[:, positions])
    values = module.evaluate(batch)
    expected = [float(max(scores := hand_scores(tmp_path, row)) == scores[row["answer"]]) for row in QUESTIONS[:3]]
    assert values["choice_accuracy"].tolist() == expected


def test_broken_weights_give_nan_rather_than_an_accuracy(folder: Path) -> None:
    module = CausalLanguageModel(folder)
    torch.nn.init.constant_(next(module.model.parameters()), torch.nan)
    for rows in (QUESTIONS, [{"prompt": "a", "answer": " cat"}], [{"text": "the cat"}]):
        (batch,) = batches(folder, rows)
        for key, value in module.evaluate(batch).items():
            assert value.isnan().all() == (key != "num_tokens")


def test_more_tokens_than_the_context_and_other_kinds_are_refused(folder: Path) -> None:
    module = CausalLanguageModel(folder)
    (batch,) = batches(folder, [{"text": " ".join(CORPUS * 2)}])
    with pytest.raises(ValueError, match=r"at most 64 tokens, the model's context, but got \d+"):
        module.evaluate(batch)
    (batch,) = batches(folder, [{"text": CORPUS[0]}])
    with pytest.raises(ValueError, match="but got 'other'"):
        module.evaluate({**batch, "kind": "other"})


class Bare(LightningModule):
    """Without a tokenizer's name."""


def test_a_module_without_a_tokenizer(tmp_path: Path) -> None:
    data = LanguageTestsDataModule({"a": write(tmp_path / "a.jsonl", [{"text": "a"}])})
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(Bare())
    data.trainer = trainer
    with pytest.raises(ValueError, match="since the LightningModule has none"):
        data.setup("test")
