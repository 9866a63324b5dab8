"""Test sets for language models from json lines: texts, questions with choices, questions with an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from lit_cka.data.from_model import padding_token, tokenizer_for
from lit_cka.data.test_sets import TestSet, TestSetsDataModule
from lit_cka.parallel.warning import warn

Kind = Literal["perplexity", "multiple_choice", "exact_match"]


class TokenRow(NamedTuple):
    """Tokens of which the last `num_scored` are scored; the `length` of a choice in characters."""

    tokens: list[int]
    num_scored: int
    length: int = 0


class Sample(NamedTuple):
    """A row, or one for each choice of which `answer` is the right one."""

    rows: list[TokenRow]
    answer: int = 0


def read_language_rows(path: str | Path) -> tuple[Kind, list[tuple[str, dict[str, Any]]]]:
    """Returns what the rows of a json lines file are for, and each as `(where, row)`, where `where` is for messages.

    Raises:
        ValueError: if a line is no JSON object, lacks keys, or is of another kind than the first, or there is no line.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    kind: Kind | None = None
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Expected a JSON object in each line, but {where} is none: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"Expected a JSON object in each line, but {where} is {line.decode().strip():.80}.")
            of_row = _kind(row, where)
            if kind not in (None, of_row):
                raise ValueError(f"Expected rows of one kind, {kind} as in the first, but {where} is for {of_row}.")
            kind = of_row
            rows.append((where, row))
    if kind is None:
        raise ValueError(f"Expected {str(path)!r} to hold JSON lines, but it has no rows.")
    return kind, rows


def _kind(row: Mapping[str, Any], where: str) -> Kind:
    num_prompts = ("prompt" in row) + ("question" in row)
    if num_prompts == 1 and "answer" in row:
        return "multiple_choice" if "choices" in row else "exact_match"
    if num_prompts == 0 and "text" in row and "choices" not in row:
        return "perplexity"
    expected = "`text`, or `prompt` or `question` with `answer` and perhaps `choices`"
    raise ValueError(f"Expected the keys {expected}, but {where} has {list(row)}.")


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected `{key}` to be a text that is not empty, but {where} has {value!r}.")
    return value


def _choices(row: Mapping[str, Any], where: str) -> tuple[list[str], int]:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"Expected `choices` to be a list of two or more texts, but {where} has {choices!r}.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise ValueError(f"Expected `answer` to be the index of a choice, 0 to {last}, but {where} has {answer!r}.")
    return [_text(choice, "choices", where) for choice in choices], answer


class Encoder:
    """From rows of a file to tokens, after what the tokenizer puts before every text (BOS), if anything; without EOS.

    Prompt and continuation are tokenized as one string, joined as they are. What comes after as many tokens as the
    prompt has alone (without trailing whitespace, which then belongs to the continuation) is the continuation,
    as in lm-evaluation-harness: many tokenizers make one token of a space and the word after it.

    Args:
        tokenizer: of transformers.
        max_length: the most tokens for a row. Texts are cut at the end; prompts at the beginning, after BOS, and by
            as much for all choices; continuations never.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_cut = 0
        bare, whole = self._tokens("a"), list(tokenizer("a")["input_ids"])
        starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        self.beginning = whole[: next(starts, 0)]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _content(self, text: str) -> list[int]:
        tokens, num = self._tokens(text), len(self.beginning)
        # A text that was rendered for this tokenizer, say by a chat template, has its own BOS.
        return tokens[num:] if tokens[:num] == self.beginning else tokens

    def text(self, text: str, where: str) -> list[TokenRow]:
        tokens = self.beginning + self._content(text)
        if not tokens:
            raise ValueError(f"Expected the text to have tokens, but that in {where} has none.")
        self.num_cut += len(tokens) > self.max_length
        tokens = tokens[: self.max_length]
        return [TokenRow(tokens, max(0, len(tokens) - max(1, len(self.beginning))))]

    def continuations(self, prompt: str, continuations: Sequence[str], where: str) -> list[TokenRow]:
        start = len(self._content(prompt.rstrip()))
        contents = [self._content(prompt + continuation) for continuation in continuations]
        num_scored = [len(content) - start for content in contents]
        if min(num_scored) < 1 or not start + len(self.beginning):
            raise ValueError(f"Expected prompt and answers to have tokens of their own, but in {where} one has none.")
        excess = len(self.beginning) + max(map(len, contents)) - self.max_length
        if excess > start - (not self.beginning):
            room, most = self.max_length - max(1, len(self.beginning)), max(num_scored)
            raise ValueError(f"Expected answers of at most {room} tokens by `max_length`, but {where} has {most}.")
        self.num_cut += excess > 0
        return [
            TokenRow(self.beginning + content[max(0, excess) :], num, len(continuation))
            for content, num, continuation in zip(contents, num_scored, continuations, strict=True)
        ]

    def sample(self, kind: Kind, row: Mapping[str, Any], where: str) -> Sample:
        """Returns the sample in a row; raises a ValueError if a text is empty or too long, or a choice is missing."""
        if kind == "perplexity":
            return Sample(self.text(_text(row["text"], "text", where), where))
        key = "prompt" if "prompt" in row else "question"
        prompt = _text(row[key], key, where)
        if kind == "exact_match":
            return Sample(self.continuations(prompt, [_text(row["answer"], "answer", where)], where))
        choices, answer = _choices(row, where)
        return Sample(self.continuations(prompt, choices, where), answer)


def collate(samples: Sequence[Sample], kind: Kind, padding: int) -> dict[str, Any]:
    """Returns a batch for `CausalLanguageModel.evaluate`, padded on the right with a token that is masked."""
    rows = [row for sample in samples for row in sample.rows]
    tokens = [torch.tensor(row.tokens) for row in rows]
    targets = [ids.clone() for ids in tokens]
    for row, ids in zip(rows, targets, strict=True):
        ids[: len(ids) - row.num_scored] = -100
    batch: dict[str, Any] = {
        "kind": kind,
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True),
        "targets": pad_sequence(targets, batch_first=True, padding_value=-100),
        "sample": torch.tensor([index for index, sample in enumerate(samples) for _ in sample.rows]),
    }
    if kind == "multiple_choice":
        batch["answer"] = torch.tensor([sample.answer for sample in samples])
        batch["length"] = torch.tensor([row.length for row in rows])
    return batch


class LanguageTestsDataModule(TestSetsDataModule):
    """Files of json lines to test a causal language model on, with the model's tokenizer.

    All rows of a file have the same keys, which tell what they are for:

    - `{"text": ...}`: perplexity. The first token is not predicted, unless it follows a BOS of the tokenizer.
    - `{"prompt": ..., "answer": "..."}`: exact match, whether greedy decoding gives the answer.
    - `{"prompt": ..., "choices": ["...", ...], "answer": 0}`: multiple choice by log p of each choice after the prompt.

    `question` is another name for `prompt`. Prompt and answer are joined as they are, so that most answers and choices
    should start with a space. Other keys are left alone.

    Args:
        files: path of each test set by its name; the first is in-distribution, the others are shifted.
        tokenizer: name or folder for `AutoTokenizer`; None for the model's (`CausalLanguageModel.tokenizer_name`).
        max_length: the most tokens; texts are cut at the end, prompts at the beginning, with a warning.
        batch_size: samples per batch; every choice of a sample is a row.
        num_workers: processes that load.

    Raises:
        FileNotFoundError: if files are missing; it lists all of them.
        ValueError: if a row is not as described, or there is no tokenizer.

    Example:
        >>> data = LanguageTestsDataModule({"prose": "texts.jsonl", "questions": "questions.jsonl"})
        >>> list(data.files)
        ['prose', 'questions']
    """

    def __init__(
        self,
        files: dict[str, str],
        tokenizer: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if max_length < 2:
            raise ValueError(f"Expected `max_length` to be at least 2, but got {max_length}.")
        self.files = {name: Path(path).expanduser() for name, path in files.items()}
        self.tokenizer = tokenizer
        self.max_length = max_length

    @override
    def read_test_sets(self) -> list[TestSet]:
        missing = [f"{name} at {path}" for name, path in self.files.items() if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"Expected files of json lines, but there is no {', no '.join(missing)}.")
        read = {name: read_language_rows(path) for name, path in self.files.items()}
        tokenizer = tokenizer_for(self, self.tokenizer)
        padding = padding_token(tokenizer)
        test_sets = []
        for name, (kind, rows) in read.items():
            encoder = Encoder(tokenizer, self.max_length)
            samples: Any = [encoder.sample(kind, row, where) for where, row in rows]
            if encoder.num_cut:
                what = "texts were cut at the end" if kind == "perplexity" else "prompts were cut at the beginning"
                warn(f"{encoder.num_cut} of {len(samples)} {what} in {self.files[name]}, see `max_length`.")
            test_sets.append(TestSet(name, samples, collate=partial(collate, kind=kind, padding=padding)))
        return test_sets
