"""Image classifiers to fine-tune: any timm model, and the visual tower of any open_clip model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from lit_cka.models.classifier import Classifier, start_from


class ImageClassifier(Classifier):
    """A timm model with a classification head. Blocks are named `model.blocks.0` and so on, after timm.

    Args:
        model_name: any name that `timm.create_model` takes, also `local-dir:/path` and `hf-hub:owner/name`.
        num_classes: number of classes; another number than the weights have starts the head anew.
        pretrained: take the pretrained weights of that name.
        checkpoint: a file of weights to start from instead, see `lit_cka.checkpoints.load_state_dict`; all but the
            head's must fit.
        model_kwargs: further arguments for `timm.create_model` (`img_size`, `in_chans`, `drop_path_rate`, ...).
        learning_rate: the highest, after warm-up.
        weight_decay: of AdamW, for weights of two or more dimensions.
        warmup: the part of the training that warm-up takes.
        weights: which of several sets of weights in the checkpoint, such as "state_dict_ema".
        layer_decay: of the learning rate, from each layer to the one before it (Howard & Ruder 2018, arXiv 1801.06146,
            section 3.2; as BEiT and MAE are fine-tuned): the head has `learning_rate`, the last block that times
            `layer_decay`, the one before it times its square. 1 for one learning rate; below, the first layers stay
            closer to what they were.

    Raises:
        ValueError: if the checkpoint has another architecture or is damaged, or `layer_decay` is not in (0, 1].

    Example:
        >>> import torch
        >>> size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        >>> model = ImageClassifier("vit_tiny_patch16_224", 10, model_kwargs=size)
        >>> model(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        weights: str | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(num_classes, learning_rate, weight_decay, warmup)
        if not 0 < layer_decay <= 1:
            raise ValueError(f"Expected `layer_decay` to be in (0, 1], but got {layer_decay}.")
        self.save_hyperparameters()
        self.layer_decay = layer_decay
        import timm

        self.model = timm.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, **(model_kwargs or {})
        )
        config = timm.data.resolve_model_data_config(self.model)
        self.train_transform: Callable[[Any], Tensor] = timm.data.create_transform(**config, is_training=True)
        self.eval_transform: Callable[[Any], Tensor] = timm.data.create_transform(**config, is_training=False)
        if checkpoint is not None:
            head = self.model.pretrained_cfg.get("classifier") or ()
            heads = (head,) if isinstance(head, str) else tuple(head)
            start_from(self.model, checkpoint, weights, heads)

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.layer_decay == 1:
            return super().parameter_groups()
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(self.model, self.weight_decay, layer_decay=self.layer_decay)
        return [
            {
                "params": group["params"],
                "weight_decay": group["weight_decay"],
                "lr": self.learning_rate * group["lr_scale"],
            }
            for group in groups
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (n, num_classes) of images (n, channels, height, width)."""
        logits: Tensor = self.model(images)
        return logits


class _VisualTower(nn.Module):
    """The visual tower of CLIP, alone and one level down, so that weights are named as in model-soups."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images)
        return features


class CLIPImageClassifier(Classifier):
    """The visual tower of an open_clip model under a linear head, named and normalised as in model-soups.

    Its state dict holds `model.visual.*` and `classification_head.*`. A model-soups checkpoint, whose text tower is
    left out, with or without `module.` before its names, loads by `checkpoint`; those were trained from OpenAI's
    weights, so name a `-quickgelu` model for them.

    Args:
        model_name: any name that `open_clip.create_model` takes ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14", ...).
        num_classes: number of classes.
        pretrained: a tag of open_clip ("openai", "laion2b_s34b_b79k", ...) or the path of CLIP weights.
        checkpoint: a model-soups state dict, or another one of this class, to start from; its head may be missing or
            have another number of classes, and then starts at random.
        normalize: give the head features of unit length, as model-soups does.
        learning_rate: the highest, after warm-up.
        weight_decay: of AdamW, for weights of two or more dimensions.
        warmup: the part of the training that warm-up takes.
        weights: which of several sets of weights in the checkpoint, such as "state_dict_ema".

    Raises:
        ValueError: if the checkpoint has another architecture or is damaged.

    Example:
        >>> import torch
        >>> model = CLIPImageClassifier("ViT-S-32-alt", 10)  # of random weights
        >>> model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        normalize: bool = True,
        learning_rate: float = 3e-5,
        weight_decay: float = 0.1,
        warmup: float = 0.1,
        weights: str | None = None,
    ) -> None:
        super().__init__(num_classes, learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        import open_clip

        clip, self.train_transform, self.eval_transform = open_clip.create_model_and_transforms(
            model_name, pretrained=pretrained
        )
        self.model = _VisualTower(clip.visual)
        width = getattr(clip.visual, "output_dim", None) or open_clip.get_model_config(model_name)["embed_dim"]
        self.classification_head = nn.Linear(width, num_classes)
        self.normalize = normalize
        if checkpoint is not None:
            start_from(self, checkpoint, weights, ("classification_head",))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (n, num_classes) of images (n, 3, height, width)."""
        features = self.model(images)
        logits: Tensor = self.classification_head(normalize(features, dim=-1) if self.normalize else features)
        return logits
