"""Does the matrix of two language models depend on the batch size?

BERT, GPT-2 and DistilBERT in their published sizes with random weights, on random tokens, as in the notebooks of
pytorch-cka: all blocks of one by all blocks of the other, on all tokens of a text in one long row. pytorch-cka computes
in the dtype of the model, so that it is shown for models in float32 and for the same models in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import Result, new_parser, parse, report
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_cka.analysis import Settings, compare

Matrix = NDArray[np.float64]
PAIRS = (("BERT", "BERT"), ("BERT", "GPT-2"), ("BERT", "DistilBERT"))


def random_models(vocabulary: int) -> dict[str, tuple[nn.Module, list[str]]]:
    """Models in eval mode, and the names of their blocks."""
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, GPT2Config, GPT2Model

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    models: dict[str, tuple[nn.Module, list[str]]] = {
        "BERT": (BertModel(BertConfig(vocab_size=vocabulary)), [f"encoder.layer.{i}" for i in range(12)]),
        "GPT-2": (GPT2Model(GPT2Config(vocab_size=vocabulary, **special)), [f"h.{i}" for i in range(12)]),
        "DistilBERT": (
            DistilBertModel(DistilBertConfig(vocab_size=vocabulary)),
            [f"transformer.layer.{i}" for i in range(6)],
        ),
    }
    return {name: (model.eval(), layers) for name, (model, layers) in models.items()}


def matrices_by(
    a: tuple[nn.Module, list[str]], b: tuple[nn.Module, list[str]], tokens: torch.Tensor
) -> dict[str, Callable[[int], Matrix]]:
    """By method, the matrix of the blocks of two models for a batch size."""

    def ours(settings: Settings, batch_size: int) -> Matrix:
        loader = DataLoader(TensorDataset(tokens), batch_size)
        second = None if a[0] is b[0] else b[0]
        names = {"layers": a[1], "layers_b": b[1], "pooling": "flatten:NTC"}
        return compare(a[0], second, loader, settings=settings, progress=False, **names).values

    def theirs(dtype: torch.dtype, batch_size: int) -> Matrix:
        from cka import compute_cka

        loader = DataLoader(TensorDataset(tokens), batch_size)
        for model in (a[0], b[0]):
            model.to(dtype)
        options = {"layers": a[1], "model2_layers": b[1], "device": torch.device("cpu"), "progress": False}
        try:
            return compute_cka(a[0], b[0], loader, **options)[0].double().numpy()
        finally:
            for model in (a[0], b[0]):
                model.to(torch.float32)

    return {
        "pytorch-cka, model in float32": lambda size: theirs(torch.float32, size),
        "pytorch-cka, model in float64": lambda size: theirs(torch.float64, size),
        "minibatch_cka": lambda size: ours(Settings(measure="minibatch_cka", batch_size=size), size),
        "cka, debiased": lambda size: ours(Settings(), size),
    }


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parse(parser, {"tokens": 4, "batch_sizes": [8, 16]})

    models = random_models(args.vocabulary)
    tokens = torch.randint(0, args.vocabulary, (args.samples, args.tokens), generator=torch.Generator().manual_seed(0))
    rows, apart = [], []
    for a, b in PAIRS:
        methods = matrices_by(models[a], models[b], tokens)
        found = {name: [method(size) for size in args.batch_sizes] for name, method in methods.items()}
        for name, matrices in found.items():
            change = np.ptp(np.stack(matrices), axis=0).max()
            rows.append([f"{a} and {b}", name, *(float(matrix.mean()) for matrix in matrices), float(change)])
        own = found["minibatch_cka"]
        for name in list(found)[:2]:
            # They cut off what is below 0.
            largest = [np.abs(x - y.clip(0, 1)).max() for x, y in zip(found[name], own, strict=True)]
            apart.append([f"{a} and {b}", name, *map(float, largest)])
    sizes = [f"batches of {size}" for size in args.batch_sizes]
    report(
        "language_models",
        args,
        [
            Result("Mean of the matrix by batch size", ["models", "by", *sizes, "largest change of a cell"], rows),
            Result("Largest difference of a cell from minibatch_cka", ["models", "by", *sizes], apart),
        ],
    )


if __name__ == "__main__":
    main()
