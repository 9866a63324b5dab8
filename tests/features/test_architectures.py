"""Layers of real architectures of transformers against their own `output_hidden_states`, masks and layouts included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from lit_cka.features import FeatureExtractor

WORDS = 60
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": WORDS,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BOTH_SIDES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    layer: str
    states: str = "hidden_states"


def t5() -> nn.Module:
    return transformers.T5Model(
        transformers.T5Config(d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=32, vocab_size=WORDS)
    )


def bart() -> nn.Module:
    return transformers.BartModel(transformers.BartConfig(**BOTH_SIDES, vocab_size=WORDS))


def fsmt() -> nn.Module:
    return transformers.FSMTModel(
        transformers.FSMTConfig(langs=["en", "de"], src_vocab_size=WORDS, tgt_vocab_size=WORDS, **BOTH_SIDES)
    )


def longformer() -> nn.Module:
    return transformers.LongformerModel(transformers.LongformerConfig(**SIZES, attention_window=4))


def xlnet() -> nn.Module:
    return transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=32)
    )


CASES = {
    "bert": Case(lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), "encoder.layer.0"),
    "llama": Case(lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), "layers.0"),
    "longformer": Case(longformer, "encoder.layer.0"),
    "xlnet": Case(xlnet, "layer.0"),
    "t5 encoder": Case(t5, "encoder.block.0", "encoder_hidden_states"),
    "t5 decoder": Case(t5, "decoder.block.0", "decoder_hidden_states"),
    "bart encoder": Case(bart, "encoder.layers.0", "encoder_hidden_states"),
    "bart decoder": Case(bart, "decoder.layers.0", "decoder_hidden_states"),
    "fsmt encoder": Case(fsmt, "encoder.layers.0", "encoder_hidden_states"),
}


def kept_mean(states: Tensor, mask: Tensor) -> Tensor:
    kept = mask.to(torch.float64)[..., None]
    return (states.double() * kept).sum(1) / kept.sum(1)


def right_padded(n: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) < torch.randint(2, tokens + 1, (n, 1))).long()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Passing a tuple of `past_key_values`")
@pytest.mark.parametrize(("n", "tokens"), [(5, 8), (5, 7), (8, 8)], ids=["5 of 8", "5 of 7", "8 of 8"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_pooled_over_its_own_real_tokens(name: str, n: int, tokens: int) -> None:
    """Also with as many samples as tokens, and where the model makes another mask of the one it is given."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().eval()
    ids, mask, decoder_mask = torch.randint(3, WORDS, (n, tokens)), right_padded(n, tokens), right_padded(n, tokens)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    calls = [(given, mask)]
    if case.states != "hidden_states":
        given["decoder_input_ids"] = ids
        in_decoder = case.states.startswith("decoder")
        with_own = {**given, "decoder_attention_mask": decoder_mask}
        calls = [
            (given, torch.ones_like(mask) if in_decoder else mask),
            (with_own, decoder_mask if in_decoder else mask),
        ]
    for arguments, expected in calls:
        with torch.no_grad(), FeatureExtractor(model, case.layer) as extractor:
            states = model(**arguments)[case.states][1]
            features = extractor.collect()[case.layer]
        torch.testing.assert_close(features, kept_mean(states, expected), rtol=0, atol=1e-6)
