"""Causal language models to evaluate: any of transformers, by perplexity, choices and exact answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_cka.checkpoints.model_folders import reading_model

_NOT_SCORED = -100


class CausalLanguageModel(pl.LightningModule):
    """A causal language model of transformers, named after transformers below `model.`, in eval mode.

    It is there to be evaluated, on batches of `LanguageTestsDataModule`, and has no training loop.

    Args:
        model_name: a name on the hub ("gpt2") or a local folder in `save_pretrained` format. The weights keep the
            dtype that they were saved with.
        trust_remote_code: run code that comes with the model and its tokenizer; only for a model that you trust. It is
            not stored in checkpoints.

    Raises:
        ValueError: if a folder is damaged, or names something outside of it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with TemporaryDirectory() as folder:  # a name on the hub does as well
        ...     config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        ...     GPT2LMHeadModel(config).save_pretrained(folder)
        ...     model = CausalLanguageModel(folder)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape
        torch.Size([1, 3, 50])
    """

    def __init__(self, model_name: str | PathLike[str], trust_remote_code: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="trust_remote_code")
        self.trust_remote_code = trust_remote_code
        from transformers import AutoModelForCausalLM

        # Releases before 4.56 do not know `dtype` yet; later ones still take `torch_dtype`.
        with reading_model(model_name):
            self.model = AutoModelForCausalLM.from_pretrained(
                model_name, torch_dtype="auto", trust_remote_code=trust_remote_code
            )

    @property
    def tokenizer_name(self) -> str:
        """Where the model's tokenizer is, for the data."""
        return str(self.hparams["model_name"])

    def forward(self, inputs: Mapping[str, Any], positions: Tensor | None = None) -> Tensor:
        """Returns logits (rows, tokens, vocabulary) of token ids (rows, tokens) that are padded on the right.

        Args:
            inputs: the two, in a mapping that may hold more.
            positions: indices (n,) of the positions to get logits of, then (rows, n, vocabulary); None for all.

        Raises:
            ValueError: if a row is longer than the model's context.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        num_tokens = inputs["input_ids"].shape[1]
        # Learned positions would fail without a word about it, on a GPU for good; rotary ones would give poor results.
        if limit is not None and num_tokens > limit:
            raise ValueError(f"Expected at most {limit} tokens, the model's context, but got {num_tokens}.")
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if positions is None:
            logits: Tensor = self.model(**arguments).logits
            return logits
        # The logits of a long prompt with a large vocabulary take more memory than all else.
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(**arguments, logits_to_keep=positions).logits
            return logits
        logits = self.model(**arguments).logits[:, positions]
        return logits

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns values of each sample (samples,), float64, from one forward pass; they do not depend on the padding.

        The batch holds `input_ids`, `attention_mask`, `targets` (rows, tokens), where `targets[:, t]` is the token at t
        or -100 where that is not scored, `sample` (rows,), the sample that a row belongs to, in order, and a `kind`:

        - "perplexity", a row for each sample: `nll`, the sum of -log p over the scored tokens (natural logarithm), and
          `num_tokens`, how many they are. Perplexity is `exp(nll.sum() / num_tokens.sum())` over all samples.
        - "exact_match", a row for each sample: `exact_match`, 1 if every scored token has the highest logit given the
          true tokens before it, else 0; `nll` and `num_tokens` of the answer. This is the same as greedy decoding from
          the prompt beginning with the answer's tokens: as long as each token was the one decoded, the true tokens
          before the next are the decoded ones. What the model would go on to say is not looked at.
        - "multiple_choice", a row for each choice, with `answer` (samples,), the index of the right one, and `length`
          (rows,) in characters: `choice_accuracy`, 1 if the right choice has the highest log p, and
          `choice_accuracy_normalized`, the same for log p per character. The first of equals counts as the highest.

        A sample whose log p is NaN has NaN for all but `num_tokens`.
        """
        next_tokens = batch["targets"][:, 1:]
        positions = (next_tokens != _NOT_SCORED).any(dim=0).nonzero().flatten()
        logits, next_tokens = self(batch, positions), next_tokens[:, positions]
        rows = [_score(*row) for row in zip(logits, next_tokens, strict=True)]
        nll, num_tokens, matches = (torch.stack(values) for values in zip(*rows, strict=True))
        if batch["kind"] == "perplexity":
            return {"nll": nll, "num_tokens": num_tokens}
        if batch["kind"] == "exact_match":
            return {"exact_match": matches, "nll": nll, "num_tokens": num_tokens}
        if batch["kind"] == "multiple_choice":
            sample, answer = batch["sample"], batch["answer"]
            return {
                "choice_accuracy": _choice_accuracy(-nll, sample, answer),
                "choice_accuracy_normalized": _choice_accuracy(-nll / batch["length"], sample, answer),
            }
        raise ValueError(f"Expected the kind perplexity, exact_match or multiple_choice, but got {batch['kind']!r}.")


def _score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what logits (n, vocabulary) give tokens (n,): the sum of -log p, the number of tokens that are scored,
    and whether all of them are the most likely.
    """
    scored = tokens != _NOT_SCORED
    logits, tokens = logits[scored], tokens[scored]
    nll = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens, reduction="none")
    total, matches = nll.double().sum(), (logits.argmax(dim=-1) == tokens).all().double()
    return total, scored.sum().double(), matches.where(~total.isnan(), torch.nan)


def _choice_accuracy(scores: Tensor, sample: Tensor, answer: Tensor) -> Tensor:
    """Returns 1 for each sample of whose choices, with `scores` (rows,), the highest is at `answer`, else 0."""
    of_sample = sample == torch.arange(len(answer), device=sample.device)[:, None]
    best, row = scores.where(of_sample, -torch.inf).max(dim=-1)
    first = of_sample.int().argmax(dim=-1)
    return (row - first == answer).double().where(~best.isnan(), torch.nan)
