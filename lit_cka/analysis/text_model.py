"""Language models of transformers, to take features from: `TextModel`."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_cka.analysis.extraction import extract
from lit_cka.analysis.features import Features
from lit_cka.analysis.texts import Samples, collate, tokenize
from lit_cka.data.tokenizer import load_tokenizer
from lit_cka.features.extractor import tensors_in
from lit_cka.features.layers import Layers, named_layers

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

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if there is no tokenizer, weights of the body are missing, or its blocks cannot be found.
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
    ) -> None:
        if pooling not in get_args(TokenPooling):
            raise ValueError(f"Expected `pooling` to be 'mean', 'last' or 'cls', but got {pooling!r}.")
        if min(max_length, batch_size) < 1:
            raise ValueError(f"Expected `max_length` and `batch_size` of 1 or more, got {max_length} and {batch_size}.")
        self.name = Path(path).name if name is None else name
        self.pooling = pooling
        self.batch_size = batch_size
        _check_model(path)
        self.tokenizer = load_tokenizer(path if tokenizer is None else tokenizer)  # before what may take minutes
        body = _load_body(path, dtype)
        body.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = TextNetwork(body)
        self.layers = self.network.hidden_states if layers is None else layers
        self.max_length = min(max_length, self.tokenizer.model_max_length, _context(body))
        self._num_embeddings = body.get_input_embeddings().weight.shape[0]

    def features(self, samples: Samples, progress: bool = True, distributed: bool = False) -> Features:
        """The features of texts, from one run over them; on several ranks if `distributed`, see `extract`.

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
        """Batches for `network`: `input_ids`, `attention_mask` (n, tokens), `id`, and `labels` if any; may raise."""
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
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        padding = next((id for id in candidates if id is not None and id < self._num_embeddings), 0)
        rows: Any = list(zip(samples.ids, tokens, labels, strict=True))  # a list is a map-style dataset
        return DataLoader(rows, self.batch_size, collate_fn=partial(collate, padding=padding))


class TextNetwork(nn.Module):
    """A body of transformers whose hidden states pass by as the outputs of modules with plain names: for hooks.

    Args:
        body: a model without a head, in eval mode.

    Raises:
        ValueError: if its blocks cannot be found, or do not return hidden states (n, tokens, d).
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        blocks = _find_blocks(body)
        final_norm = _find_final_norm(body, blocks)
        self.embeddings = nn.Identity()
        self.layers = nn.ModuleList(nn.Identity() for _ in blocks)
        if final_norm is not None:
            self.final_norm = nn.Identity()
        self.hidden_states = [name for name in named_layers(self) if name != "layers"]
        self.model = body
        # In a tuple, so that they have no second name here.
        self._first = (blocks[0],)
        self._watched = tuple(zip(blocks, self.layers, strict=True))
        if final_norm is not None:
            self._watched += ((final_norm, self.final_norm),)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """What the body returns."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.embeddings(_block_input(args, kwargs))

        with ExitStack() as hooks:
            hooks.callback(self._first[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module, stand_in in self._watched:
                hooks.callback(module.register_forward_hook(partial(_show, stand_in)).remove)
            return self.model(input_ids=input_ids, attention_mask=attention_mask)


def _show(stand_in: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
    stand_in(output)


def _block_input(args: Any, kwargs: Any) -> Tensor:
    return next(tensor for tensor in tensors_in((kwargs.get("hidden_states"), args)) if tensor.is_floating_point())


def _find_blocks(body: Any) -> list[nn.Module]:
    """What the only list of as many blocks as the configuration says holds."""
    num = body.config.get_text_config().num_hidden_layers
    found = {
        name: list(module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num
        and all(any(True for _ in block.children()) for block in module)
    }
    outer = [blocks for name, blocks in found.items() if not any(name.startswith(f"{around}.") for around in found)]
    if len(outer) != 1:
        raise ValueError(
            f"Expected {type(body).__name__} to hold its {num} blocks in one list, but there are {len(outer)} such "
            "lists. Use `lit_cka.analysis.extraction.extract` with `layers` that you name."
        )
    return outer[0]


def _find_final_norm(body: Any, blocks: list[nn.Module]) -> nn.Module | None:
    """The normalisation that runs behind the last block; from a run on two tokens."""
    shapes: list[torch.Size] = []
    behind: list[nn.Module] = []

    def after_block(module: nn.Module, args: Any, output: Any) -> None:
        shapes.extend(tensor.shape[:-1] for tensor in list(tensors_in(output))[:1])

    def after_norm(module: nn.Module, args: Any, output: Any) -> None:
        if len(shapes) == len(blocks):
            behind.append(module)

    inside = {id(module) for block in blocks for module in block.modules()}
    tokens = torch.arange(2, device=body.device)[None]
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            hooks.callback(block.register_forward_hook(after_block).remove)
        for module in body.modules():
            if "norm" in type(module).__name__.lower() and id(module) not in inside:
                hooks.callback(module.register_forward_hook(after_norm).remove)
        body(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if shapes != [tokens.shape] * len(blocks):
        raise ValueError(
            f"Expected every block of {type(body).__name__} to run once and to return hidden states (1, 2, d) for two "
            f"tokens, but got {[(*shape, 'd') for shape in shapes]}."
        )
    return behind[0] if behind else None


def _context(body: Any) -> int:
    """The most tokens by the model's configuration and table of positions."""
    positions = getattr(body.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in body.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa's positions start behind that of padding
    return positions if positions > 0 else 2**31


def _check_model(path: str | os.PathLike[str]) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"Expected a transformers model at {str(path)!r}, but found none: {error}") from error


def _load_body(path: str | os.PathLike[str], dtype: str | torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    # Saved by itself, the encoder of an encoder-decoder no longer says that it is one.
    is_encoder = ((AutoConfig.from_pretrained(path).architectures or [""])[0]).endswith("EncoderModel")
    loader: Any = AutoModelForTextEncoding if is_encoder else AutoModel
    # Releases before 4.56 do not know `dtype` yet; later ones still take `torch_dtype`.
    model, info = loader.from_pretrained(path, torch_dtype=dtype, output_loading_info=True)
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
