"""Rows of packed images, and of texts without padding, are those of their samples: against each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lit_cka.features import FeatureExtractor
from lit_cka.features.packed import Packed, PackedCalls, _parts_in

IMAGE, WORDS, PATCH = 59, 60, 4
TEXT_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
# The patches of the images of three samples: of unequal sizes, and one sample has two.
GRIDS = [[[1, 4, 8]], [[1, 4, 4], [1, 8, 8]], [[1, 8, 4]]]


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=TEXT_SIZES, image_token_id=IMAGE)
    return transformers.Qwen2VLModel(config)


def qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
        "patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT_SIZES, image_token_id=IMAGE)
    return transformers.Qwen2_5_VLModel(config)


MODELS = {"Qwen2-VL": qwen2_vl, "Qwen2.5-VL": qwen2_5_vl}


def images(grid: list[list[int]]) -> dict[str, Tensor]:
    sizes = torch.tensor(grid)
    return {"pixel_values": torch.randn(int(sizes.prod(1).sum()), 3 * 2 * PATCH**2), "image_grid_thw": sizes}


def text_of(grid: list[list[int]], length: int = 32) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (1, length))
    start = 3
    for _, h, w in grid:
        ids[:, start : start + h * w // 4] = IMAGE
        start += h * w // 4 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long()}


def features_of(model: nn.Module, layers: Any, /, pooling: Any = "mean", **inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad(), FeatureExtractor(model, layers, pooling) as extractor:
        model(**inputs)
        return extractor.collect()


def raw_of(model: nn.Module, layer: str, **inputs: Any) -> Tensor:
    """What a layer returns, by a hook of this test."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return outputs[0].double()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_images_of_unequal_sizes_in_a_tower_by_itself(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    tower = make().eval().visual
    packed = [images([grid]) for sample in GRIDS for grid in sample]
    given = [{"hidden_states": each["pixel_values"], "grid_thw": each["image_grid_thw"]} for each in packed]
    together = {name: torch.cat([each[name] for each in given]) for name in given[0]}
    for layer in ("blocks.0", "blocks.1", "merger"):
        alone = torch.stack([raw_of(tower, layer, **each).mean(0) for each in given])
        assert alone.std(0).max() > 1e-3
        torch.testing.assert_close(features_of(tower, layer, **together)[layer], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_several_images_of_a_sample_are_the_sample_s(make: Callable[[], nn.Module]) -> None:
    """In the whole model, which is not told whose an image is but by the text."""
    torch.manual_seed(0)
    model = make().eval()
    samples = [{**images(grid), **text_of(grid)} for grid in GRIDS]
    together = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    with torch.no_grad(), FeatureExtractor(model) as extractor:
        extractor.num_samples = 3  # as a callback knows it
        model(**together)
        features = extractor.collect()
    assert set(features) == {f"{tower}.{i}" for tower in ("visual.blocks", "language_model.layers") for i in (0, 1)}
    for layer in features:
        alone = torch.stack([raw_of(model, layer, **sample).flatten(0, -2).mean(0) for sample in samples])
        torch.testing.assert_close(features[layer], alone, rtol=0, atol=1e-5)
    merged = features_of(model, "visual.merger", **together)["visual.merger"]
    alone = torch.stack([raw_of(model, "visual.merger", **sample).mean(0) for sample in samples])
    torch.testing.assert_close(merged, alone, rtol=0, atol=1e-5)
    del together["mm_token_type_ids"]
    calls = PackedCalls()
    calls.note("", model, together, outermost=True)  # by the placeholders' id
    assert calls._images[0].num_parts == [1, 2, 1]


def test_first_and_last_patches_and_what_can_t_be_flattened() -> None:
    torch.manual_seed(0)
    tower = qwen2_vl().eval().visual
    given = images([[1, 4, 8], [1, 4, 4]])
    call = {"hidden_states": given["pixel_values"], "grid_thw": given["image_grid_thw"]}
    rows = raw_of(tower, "blocks.0", **call)
    assert torch.equal(features_of(tower, "blocks.0", "cls", **call)["blocks.0"], rows[[0, 32]])
    assert torch.equal(features_of(tower, "blocks.0", "last", **call)["blocks.0"], rows[[31, 47]])
    with pytest.raises(ValueError, match="Expected samples of one length to flatten, but got 32, 16"):
        features_of(tower, "blocks.0", "flatten", **call)


def test_pixtral_packs_images_by_their_sizes() -> None:
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = transformers.PixtralVisionModel(config).eval()
    pixels, sizes = torch.randn(3, 3, 32, 32), torch.tensor([[32, 16], [16, 16], [32, 32]])
    layer = "transformer.layers.1"
    for given in ({"image_sizes": sizes}, {}):
        call = {"pixel_values": pixels, **given}
        each = [{name: value[i : i + 1] for name, value in call.items()} for i in range(3)]
        alone = torch.stack([raw_of(model, layer, **sample)[0].mean(0) for sample in each])
        seen = features_of(model, layer, **call)[layer]
        torch.testing.assert_close(seen, alone, rtol=0, atol=1e-5)


class Tower(nn.Module):
    """Takes packed rows, and merges some: three are no square of patches."""

    def __init__(self, merged: int = 3) -> None:
        super().__init__()
        self.merged = merged
        self.merge = nn.Linear(3, 3)

    def forward(self, rows: Tensor, grid_thw: Tensor) -> Tensor:
        return self.merge(rows.unflatten(0, (-1, self.merged)).mean(1))


def test_rows_of_nobody_knows_which_image_are_an_error() -> None:
    grid = torch.tensor([[1, 3, 2], [1, 3, 4]])
    with pytest.raises(ValueError, match="Layer 'merge' returned 6 rows for 2 packed sequences, and nothing tells"):
        features_of(Tower(), "merge", rows=torch.randn(18, 3), grid_thw=grid)


class Texts(nn.Module):
    """Texts and their images, without placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        return self.tower(pixel_values, image_grid_thw)


def test_images_of_nobody_knows_which_text_are_an_error() -> None:
    grid = torch.tensor([[1, 3, 2]] * 3)
    call = {"input_ids": torch.zeros(2, 5).long(), "pixel_values": torch.randn(18, 3), "image_grid_thw": grid}
    with pytest.raises(ValueError, match=r"18 rows for 3 packed sequences, .* which of 2 samples"):
        features_of(Texts(), "tower.merge", **call)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_without_images_are_an_error(pooling: str) -> None:
    torch.manual_seed(0)
    model = qwen2_vl().eval()
    samples = [{**images(GRIDS[0]), **text_of(GRIDS[0])}, {**images(GRIDS[1])}, text_of([]), text_of(GRIDS[1])]
    together = {name: torch.cat([each[name] for each in samples if name in each]) for name in samples[0]}
    with pytest.raises(ValueError, match=r"returned rows for all but 1 of 3 samples \(texts without images, say\)"):
        features_of(model, "visual.blocks.1", pooling, **together)
    assert (
        features_of(model, "language_model.layers.1", pooling, **together)["language_model.layers.1"].isfinite().all()
    )


def test_texts_without_padding() -> None:
    """Joined to one sequence, with the limits of each, as transformers' collators do for flash attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT_SIZES, "rope_parameters": None}, attn_implementation="eager")
    model = transformers.LlamaModel(config).eval()
    ids, limits = torch.randint(3, 50, (1, 9)), torch.tensor([0, 2, 5, 9], dtype=torch.int32)
    call = {"input_ids": ids, "cu_seq_lens_q": limits, "use_cache": False}
    rows = raw_of(model, "layers.0", **call)[0]
    expected = torch.stack([rows[:2].mean(0), rows[2:5].mean(0), rows[5:].mean(0)])
    torch.testing.assert_close(features_of(model, "layers.0", **call)["layers.0"], expected)


@pytest.mark.parametrize(
    ("lengths", "counts", "parts"),
    [
        ([16, 16, 32], [4, 4, 8], [1, 1, 1]),
        ([16, 16, 32], [8, 8], [2, 1]),
        ([16, 16, 32], [16, 0], [3, 0]),
        ([16, 16], [0, 4, 4], [0, 1, 1]),
        ([16, 16, 32], [6, 10], None),  # a part in two texts
        ([16, 16, 32], [4, 4], None),  # lengths of 64 patches are no multiple of these counts' squares
        ([16], [], None),
    ],
)
def test_whose_the_parts_are(lengths: list[int], counts: list[int], parts: list[int] | None) -> None:
    assert _parts_in(lengths, counts) == parts


def test_rows_of_samples() -> None:
    calls = PackedCalls()
    calls._by_name[""] = Packed([16, 32])
    assert calls.rows_of_samples("layer", torch.Size([48, 6]), None) == [16, 32]
    assert calls.rows_of_samples("layer", torch.Size([1, 12, 6]), 2) == [4, 8]
    assert calls.rows_of_samples("layer", torch.Size([2, 6]), 2) == [1, 1]
    assert calls.rows_of_samples("layer", torch.Size([2, 7, 6]), 2) is None
    with pytest.raises(ValueError, match="48 rows for 2 packed sequences, and nothing tells which of 3 samples"):
        calls.rows_of_samples("layer", torch.Size([48, 6]), 3)


def siglip2() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4)
    kept = torch.arange(16) < torch.tensor([[8], [16], [4]])
    call = {
        "pixel_values": torch.randn(3, 16, 48), "pixel_attention_mask": kept.long(),
        "spatial_shapes": torch.tensor([[2, 4], [4, 4], [2, 2]]),
    }  # fmt: skip
    return transformers.Siglip2VisionModel(config), call, kept


def idefics2() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.models.idefics2.Idefics2VisionConfig(**sizes, image_size=16, patch_size=4)
    kept = torch.zeros(3, 4, 4, dtype=torch.bool)
    kept[0, :2, :], kept[1], kept[2, :2, :2] = True, True, True
    model = Idefics2VisionTransformer(config)
    return model, {"pixel_values": torch.randn(3, 3, 16, 16), "patch_attention_mask": kept}, kept.flatten(1)


@pytest.mark.parametrize("make", [siglip2, idefics2])
def test_patches_that_fill_up_an_image_do_not_count(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor], Tensor]],
) -> None:
    torch.manual_seed(0)
    model, call, kept = make()
    model.eval()
    layer = next(name for name, _ in model.named_modules() if name.endswith("layers.1"))
    each = [{name: value[i : i + 1] for name, value in call.items()} for i in range(3)]
    alone = torch.stack([raw_of(model, layer, **each[i])[0, kept[i]].mean(0) for i in range(3)])
    torch.testing.assert_close(features_of(model, layer, **call)[layer], alone, rtol=0, atol=1e-5)
