"""Language models of transformers, to take features from: `TextModel`."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader

from lit_cka.analysis.extraction import extract
from lit_cka.analysis.features import Features
from lit_cka.analysis.text_network import TextNetwork
from lit_cka.analysis.texts import Samples, collate, tokenize
from lit_cka.checkpoints.model_folders import reading_model
from lit_cka.data.from_model import padding_token
from lit_cka.data.tokenizer import load_tokenizer
from lit_cka.features.layers import Layers

TokenPooling = Literal["mean", "last", "cls"]


class TextModel:
    """A language model, encoder or decoder, without its head, with its tokenizer; of an encoder-decoder, the encoder.

    Layers have the same names whatever the architecture, so that tables of several models read alike:

    - `embeddings`: what enters the first block, `hidden_states[0]` of transformers;
    - `layers.0`, `layers.1`, ...: what each block returns, `hidden_states[1:]`, the last one before the final norm;
    - `final_norm`: what the final norm makes of the last block's output, for models that have one (GPT-2, Llama);
      transformers gives it out as `hidden_states[-1]`.

    `layers` may also name modules of the network itself, below `model.` ("model.encoder.layer.*.attention").

    Features do not depend on padding: texts are padded on the right to the longest of their batch, whichever side the
    tokenizer pads, so that every token has the position that it has in its text alone.

    Args:
        path: a local folder in `save_pretrained` format or a name on the hub. Of a model with a head, the body is used.
        name: for tables and files; None for the last part of `path`.
        tokenizer: where the tokenizer is; None for `path`.
        layers: which layers, see `lit_cka.features.select_layers`; None for those above.
        pooling: over the tokens of a text, with the special ones that the tokenizer adds, without padding: "mean",
            "last" token, or "cls", the first.
        max_length: the most tokens of a text; longer ones are cut with a warning, as they are to what model and
            tokenizer allow.
        batch_size: texts per batch.
        device: where to run; None for the GPU where there is one.
        dtype: of the weights; "auto" for what they were saved with.
        trust_remote_code: run code that comes with the model and its tokenizer; only for a model that you trust.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if there is no tokenizer, weights of the body are missing, or its blocks cannot be found.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2}, unk_token="[PAD]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> with TemporaryDirectory() as folder:  # a name on the hub does as well
        ...     BertModel(BertConfig(vocab_size=3, **sizes)).save_pretrained(folder)
        ...     _ = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder)
        ...     model = TextModel(folder, name="tiny BERT")
        >>> model.name
        'tiny BERT'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        layers: Layers | None = None,
        pooling: TokenPooling = "mean",
        max_length: int = 512,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if pooling not in get_args(TokenPooling):
            raise ValueError(f"Expected `pooling` to be 'mean', 'last' or 'cls', but got {pooling!r}.")
        if min(max_length, batch_size) < 1:
            raise ValueError(f"Expected `max_length` and `batch_size` of 1 or more, got {max_length} and {batch_size}.")
        self.name = Path(path).name if name is None else name
        self.pooling = pooling
        self.batch_size = batch_size
        _check_model(path, trust_remote_code)
        self.tokenizer = load_tokenizer(  # before what may take minutes
            path if tokenizer is None else tokenizer, trust_remote_code=trust_remote_code
        )
        body = _load_body(path, dtype, trust_remote_code)
        body.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = TextNetwork(body)
        self.layers = self.network.hidden_states if layers is None else layers
        self.max_length = min(max_length, self.tokenizer.model_max_length, _context(body))
        self._num_embeddings = body.get_input_embeddings().weight.shape[0]

    def features(self, samples: Samples, progress: bool = True, distributed: bool = False) -> Features:
        """Returns the features of texts, from one run over them; on several ranks if `distributed`, see `extract`.

        Raises:
            ValueError: if a text has no tokens, or tokens that the model does not know.
        """
        features = extract(
            self.network,
            self.loader(samples),
            layers=self.layers,
            pooling=f"{self.pooling}:NTC",
            name=self.name,
            data=samples.name,
            progress=progress,
            distributed=distributed,
        )
        return dataclasses.replace(features, pooling=self.pooling)

    def loader(self, samples: Samples) -> DataLoader[Any]:
        """Returns batches for `network`: `input_ids`, `attention_mask` (n, tokens), `id`, and `labels` if any."""
        tokens = tokenize(self.tokenizer, samples, self.max_length)
        for sample, ids in zip(samples.ids, tokens, strict=True):
            if not ids:
                raise ValueError(f"Expected every text to have tokens, but sample {sample!r} has none for {self.name}.")
            if max(ids) >= self._num_embeddings:
                raise ValueError(
                    f"Expected tokens below {self._num_embeddings}, those that {self.name} knows, but its tokenizer "
                    f"gives {max(ids)} in sample {sample!r}. Is it another model's?"
                )
        labels = [None] * len(samples) if samples.labels is None else samples.labels
        padding = padding_token(self.tokenizer, self._num_embeddings)
        rows: Any = list(zip(samples.ids, tokens, labels, strict=True))  # a list is a map-style dataset
        return DataLoader(rows, self.batch_size, collate_fn=partial(collate, padding=padding))


def _context(body: Any) -> int:
    """Returns the most tokens by the model's configuration and table of positions."""
    positions = getattr(body.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in body.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa's positions start behind that of padding
    return positions if positions > 0 else 2**31


def _check_model(path: str | os.PathLike[str], trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    try:
        with reading_model(path):
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"Expected a transformers model at {str(path)!r}, but found none: {error}") from error


def _load_body(path: str | os.PathLike[str], dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    with reading_model(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        # Saved by itself, the encoder of an encoder-decoder no longer says that it is one.
        is_encoder = (config.architectures or [""])[0].endswith("EncoderModel")
        loader: Any = AutoModelForTextEncoding if is_encoder else AutoModel
        # Releases before 4.56 do not know `dtype` yet; later ones still take `torch_dtype`.
        model, info = loader.from_pretrained(
            path, torch_dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    body = model.get_encoder() if is_encoder or model.config.is_encoder_decoder else model
    # A pooler comes behind all layers, and models trained for tokens have none.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ValueError(
            f"Expected all weights of {type(model).__name__} in {str(path)!r}, but {len(missing)} are missing, such as "
            f"{missing[0]!r}."
        )
    body.config.use_cache = False
    return body.eval()
