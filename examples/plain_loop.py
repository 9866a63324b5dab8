"""The CKA of two models layer by layer, without Lightning's Trainer.

    python examples/plain_loop.py

trains a small vision transformer in a plain PyTorch loop, and prints the CKA of each block with that of the model
before training, over all validation images: a `LinearCKA` per layer, and a `FeatureExtractor` per model.
"""

import copy

import timm
import torch
from torch import nn

from lit_cka import LinearCKA
from lit_cka.data import DigitsDataModule
from lit_cka.features import FeatureExtractor

torch.manual_seed(0)
data = DigitsDataModule()  # yours: any dataloaders
data.setup("fit")

# A pretrained one: timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=10)
sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, class_token=False, global_pool="avg", **sizes)
before = copy.deepcopy(model).eval()

optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(4):
    for images, labels in data.train_dataloader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
model.eval()

# Any two models do, also of two architectures: the layers to compare need not have the same number of features.
with (
    torch.no_grad(),
    FeatureExtractor(before, layers="blocks.*", pooling="mean") as extractor_x,
    FeatureExtractor(model, layers="blocks.*", pooling="mean") as extractor_y,
):
    metrics = {name: LinearCKA(debiased=True) for name in extractor_x.layer_names}
    for images, _ in data.val_dataloader():
        before(images)
        model(images)
        X, Y = extractor_x.collect(), extractor_y.collect()
        for name, metric in metrics.items():
            metric.update(X[name], Y[name])

scores = {name: metric.compute().item() for name, metric in metrics.items()}
for name, score in scores.items():
    print(f"{name}  {score:.4f}")
