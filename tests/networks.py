"""Small networks of the libraries in use, built from their configurations: no download, random weights."""

from __future__ import annotations

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

VOCABULARY = 50
_SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}

# The names of the blocks that are tracked by default, by network.
BLOCKS = {
    "timm ViT": ["blocks.0", "blocks.1", "blocks.2"],
    "timm Swin": ["layers.0.blocks.0", *(f"layers.{stage}.blocks.{block}" for stage in (1, 2) for block in (0, 1))],
    "timm ConvNeXt": [f"stages.{stage}.blocks.{block}" for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))],
    "timm ResNet": ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"],
    "open_clip ViT": ["transformer.resblocks.0", "transformer.resblocks.1", "transformer.resblocks.2"],
    "open_clip ResNet": ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"],
    "open_clip CLIP": [f"{tower}transformer.resblocks.{block}" for tower in ("visual.", "") for block in range(2)],
    "BERT": ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"],
    "DistilBERT": ["transformer.layer.0", "transformer.layer.1", "transformer.layer.2"],
    "GPT-2": ["h.0", "h.1", "h.2"],
    "Llama": ["layers.0", "layers.1", "layers.2"],
    "transformers ViT": ["layers.0", "layers.1", "layers.2"],
}
TEXT = ("BERT", "DistilBERT", "GPT-2", "Llama")
IMAGES = tuple(name for name in BLOCKS if name not in TEXT and name != "open_clip CLIP")


def build(name: str) -> nn.Module:
    """One of `BLOCKS`, in eval mode; without the last norm where the library takes its last hidden state behind it."""
    torch.manual_seed(0)
    model = _build(name)
    final_norm = {"GPT-2": "ln_f", "Llama": "norm", "transformers ViT": "layernorm"}.get(name)
    if final_norm is not None:
        assert isinstance(getattr(model, final_norm), nn.Module)
        setattr(model, final_norm, nn.Identity())
    return model.eval()


def _build(name: str) -> nn.Module:
    from open_clip import CLIP, CLIPVisionCfg
    from open_clip.model import _build_vision_tower

    clip_vit = {"width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    match name:
        case "timm ViT":
            return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3)
        case "timm Swin":
            sizes = {"img_size": 56, "embed_dim": 12, "depths": (1, 2, 2), "num_heads": (1, 2, 4)}
            return timm.create_model("swin_tiny_patch4_window7_224", **sizes)
        case "timm ConvNeXt":
            return timm.create_model("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 8, 16, 16))
        case "timm ResNet":
            return ResNet(BasicBlock, (1, 2, 1, 1), channels=(8, 8, 16, 16))
        case "open_clip ViT":
            return _build_vision_tower(16, CLIPVisionCfg(layers=3, **clip_vit))
        case "open_clip ResNet":
            return _build_vision_tower(16, CLIPVisionCfg(layers=(1, 2, 1, 1), width=8, head_width=16, image_size=64))
        case "open_clip CLIP":
            text = {"context_length": 8, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
            return CLIP(16, {"layers": 2, **clip_vit}, text)
        case "BERT":
            return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SIZES))
        case "DistilBERT":
            return DistilBertModel(
                DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=3, n_heads=2, hidden_dim=20)
            )
        case "GPT-2":
            tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
            return GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2, **tokens))
        case "Llama":
            return LlamaModel(LlamaConfig(vocab_size=VOCABULARY, **_SIZES))
        case "transformers ViT":
            return ViTModel(ViTConfig(image_size=32, patch_size=8, **_SIZES))
    raise AssertionError(name)


def images(name: str, n: int = 3) -> Tensor:
    size = {"timm Swin": 56, "timm ConvNeXt": 64, "timm ResNet": 64, "open_clip ResNet": 64}.get(name, 32)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def texts(lengths: list[int], *, left: bool = False) -> dict[str, Tensor]:
    """Random tokens of these lengths, padded on the right or on the left to the longest, and their mask."""
    longest = max(lengths)
    ids = torch.randint(VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}
