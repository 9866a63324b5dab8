"""Small inputs for what `architectures.py` tries: what a sample alone is, and how samples make a batch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
Sample = dict[str, Any]  # the arguments of a call with this sample alone
Maker = Callable[[int], Sample]  # from a sample's number


def joined(samples: list[Sample]) -> Sample:
    """The arguments of a call with all these samples: tensors along their first axis, lists one after the other."""
    batch = {}
    for name, first in samples[0].items():
        parts = [sample[name] for sample in samples]
        if isinstance(first, Tensor):
            batch[name] = torch.cat(parts)
        else:
            batch[name] = [*itertools.chain(*parts)] if isinstance(first, list) else first
    return batch


def with_padding(make: Maker) -> Maker:
    """The same samples, of which only the first tokens count: 8, 5, 2, 8, ..."""

    def masked(index: int) -> Sample:
        sample = make(index)
        length = sample["input_ids"].shape[1]
        return {**sample, "attention_mask": (torch.arange(length) < length - index % 3 * 3).long()[None]}

    return masked


def image_makers(size: int) -> Callable[[nn.Module], Iterator[Maker]]:
    """Images of few pixels, where the model takes them, or else of its own size."""

    def makers(model: nn.Module) -> Iterator[Maker]:
        for each in (64, 128, size):
            yield lambda index, each=each: {"x": noise(index, 1, 3, each, each)}

    return makers


def noise(index: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def ids(index: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(200 + index))


def transformers_makers(model: nn.Module) -> Iterator[Maker]:
    """Ways to call a model of transformers, those with most of its inputs first."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "image_grid_thw" in names and "pixel_values" in names:
        yield packed_images(names, config)
    if "grid_thw" in names:
        first = next(iter(names))
        merged = {"merge_sizes": torch.tensor([2])} if "merge_sizes" in names else {}
        yield lambda index: {**packed_tower(config, first, index), **merged}
    if "past_time_features" in names:
        yield lambda index: time_series(config, index)
        return
    for shapes in options(names, config):
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if token and "input_ids" in names and "pixel_values" in shapes and hasattr(model, "get_image_features"):
            yield text_around_images(model, token, shapes["pixel_values"])
        yield lambda index, shapes=shapes: plain(names, config, shapes, index)
    if "input_ids" in names:
        yield lambda index: plain(names, config, {}, index)


def options(names: Any, config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes, of one sample, that inputs of these names may have: all that the model takes, then fewer."""
    possible = {name: shapes(config) for name, shapes in SHAPES.items() if name in names}
    required = {name for name, value in names.items() if value.default is value.empty}
    is_needed = "input_ids" not in names and not required & {*possible}
    chosen = [name for name in possible if name in required or is_needed or name in PAIRED]
    chosen = chosen[:1] if len(chosen) > 1 and not required & {*chosen} and "input_ids" not in names else chosen
    for shapes in itertools.islice(itertools.product(*(possible[name] for name in chosen)), 16):
        yield dict(zip(chosen, shapes, strict=True))


def image_size(config: Any) -> list[int]:
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config", "image_config"))]
    sizes = [getattr(part, name, None) for part in parts for name in ("image_size", "img_size", "crop_size")]
    sizes = [size[0] if isinstance(size, (list, tuple)) else size for size in sizes if size]
    return list(dict.fromkeys([*(int(size) for size in sizes), 32, 64, 224]))


def image_shapes(config: Any) -> list[tuple[int, ...]]:
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    sizes = image_size(config)
    of_frames = getattr(config, "vision_config", config)
    frames = getattr(of_frames, "num_frames", None) or getattr(of_frames, "frames_per_clip", None)
    videos = [(frames, channels, sizes[0], sizes[0])] if isinstance(frames, int) else []
    patch = getattr(config, "patch_size", 8)
    patch = patch if isinstance(patch, int) else 8
    oblong = [(channels, *size)] if isinstance(size := getattr(config, "image_size", 0), (list, tuple)) else []
    return [
        *oblong,
        *videos,
        *((channels, size, size) for size in sizes),
        (1, channels, sizes[0], sizes[0]),
        (16, 3 * patch**2),
    ]


def mel(config: Any) -> int:
    return getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80


SHAPES: dict[str, Callable[[Any], list[tuple[int, ...]]]] = {
    "pixel_values": image_shapes,
    "pixel_values_videos": lambda config: [shape for shape in image_shapes(config) if len(shape) == 4],
    "input_values": lambda config: [
        (4000,), (1, 4000), (getattr(config, "max_length", 1024) or 1024, mel(config)), (1, 9600), (64, mel(config)),
    ],
    "input_features": lambda config: [
        (2 * getattr(config, "max_source_positions", 1500), mel(config)), (mel(config), 3000), (64, mel(config)),
        (mel(config), 2 * getattr(config, "max_source_positions", 1500)), (1, 1001, 64), (64, 160), (64, 128),
        (mel(config), 64),
    ],
    "audio_values": lambda config: [(1, 64, 128), (64, 128), (1, 4000)],
    "inputs": lambda config: [(12, getattr(config, "d_model", 32))],
    "hidden_states": lambda config: [(TOKENS, getattr(config, "hidden_size", 32))],
    "inputs_embeds": lambda config: [(TOKENS, getattr(config, "hidden_size", 32))],
    "encoder_hidden_states": lambda config: [(6, getattr(config, "encoder_hidden_size", 32)), (6, 32)],
    "past_values": lambda config: [
        (getattr(config, "context_length", None) or 32, getattr(config, "num_input_channels", 1)),
        (getattr(config, "context_length", None) or 32,), (32,), (512,),
    ],
    "waveform": lambda config: [(4000,), (1, 4000)],
    "spectrogram": lambda config: [(64, getattr(config, "model_in_dim", 80)), (64, 80)],
    "flattened_patches": lambda config: [(12, 2 + 3 * getattr(config, "patch_size", 16) ** 2)],
    "visual_feats": lambda config: [(6, getattr(config, "visual_feat_dim", 2048))],
    "visual_pos": lambda config: [(6, 4)],
    "visual_embeds": lambda config: [(6, getattr(config, "visual_embedding_dim", 512))],
    "query_embeds": lambda config: [(6, getattr(config, "hidden_size", 32))],
    "image": lambda config: [(3, size, size) for size in image_size(config)],
    "images": lambda config: [(3, size, size) for size in image_size(config)],
}  # fmt: skip
PAIRED = ("pixel_values", "input_features", "input_values", "visual_feats", "visual_pos")


def plain(names: Any, config: Any, shapes: dict[str, tuple[int, ...]], index: int) -> Sample:
    """Text, where the model takes text, beside what else has these shapes."""
    sample: Sample = {name: noise(index, 1, *shape) for name, shape in shapes.items()}
    if "input_ids" in names and ("inputs_embeds" not in shapes):
        sample["input_ids"] = ids(index)
    if "decoder_input_ids" in names:
        sample["decoder_input_ids"] = ids(50 + index)
    if "bbox" in names:
        corner = torch.arange(TOKENS)[None, :, None] * 5 + index
        sample["bbox"] = torch.cat([corner, corner, corner + 20, corner + 10], dim=2)
    if "noise" in names and hasattr(config, "mask_ratio"):
        sample["noise"] = noise(0, 1, (config.image_size // config.patch_size) ** 2)
    if type(config).__name__ == "TapasConfig":
        sample["token_type_ids"] = torch.zeros(1, TOKENS, 7, dtype=torch.long)
    if "input_features_mask" in names and "input_features" in shapes:
        sample["input_features_mask"] = torch.ones(1, max(shapes["input_features"]), dtype=torch.long)
    if "qformer_input_ids" in names:
        sample["qformer_input_ids"] = ids(50 + index)
    if "pixel_position_ids" in names and "pixel_values" in shapes:
        side = torch.arange(4)
        sample["pixel_position_ids"] = torch.cartesian_prod(side, side)[None]
    if {"spatial_shapes", "pixel_attention_mask"} <= {*names} and len(shapes.get("pixel_values", ())) == 2:
        sample |= {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16).long()}
    if "image_attention_mask" in names:
        sample["image_attention_mask"] = torch.ones(1, TOKENS, 1).long()
    if "image_embeds_position_mask" in names and "pixel_values" in shapes:
        sample["image_embeds_position_mask"] = (torch.arange(TOKENS) < config.latent_query_num)[None]
    if "past_values_padding" in names:
        sample |= {"past_values_padding": torch.zeros(1, 32).long(), "freq": torch.zeros(1, 1).long()}
    if "task_inputs" in names:
        sample["task_inputs"] = ids(50 + index, 77)
    if "prompt_pixel_values" in names:
        shape = sample["pixel_values"].shape
        sample |= {"prompt_pixel_values": noise(50 + index, *shape), "prompt_masks": noise(60 + index, *shape)}
    if "text_input_ids" in names:
        sample["text_input_ids"] = ids(index)
    if {"states", "actions", "returns_to_go"} <= {*names}:
        sample |= {
            "states": noise(index, 1, 4, config.state_dim), "actions": noise(index, 1, 4, config.act_dim),
            "rewards": noise(index, 1, 4, 1), "returns_to_go": noise(index, 1, 4, 1),
            "timesteps": torch.arange(4)[None], "attention_mask": torch.ones(1, 4),
        }  # fmt: skip
    if not sample:
        raise ValueError(f"inputs {', '.join(list(names)[:3])}")
    return sample


def time_series(config: Any, index: int) -> Sample:
    length = config.context_length + max(config.lags_sequence)
    count = config.num_time_features
    return {
        "past_values": noise(index, 1, length), "past_time_features": noise(index, 1, length, count),
        "past_observed_mask": torch.ones(1, length),
        "future_values": noise(index, 1, config.prediction_length),
        "future_time_features": noise(index, 1, config.prediction_length, count),
    }  # fmt: skip


GRIDS = [[[1, 4, 4]], [[1, 4, 8]], [[1, 8, 4], [1, 4, 4]]]  # of samples; the last has two images


def patches(index: int, config: Any, grid: Tensor) -> Tensor:
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None)
    channels = channels or getattr(config, "num_channels", 3)
    width = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    return noise(index, int(grid.prod(1).sum()), width)


def packed_tower(config: Any, first: str, index: int) -> Sample:
    """One image of each sample, of sizes of their own."""
    grid = torch.tensor(GRIDS[index % 3][:1])
    return {first: patches(index, config, grid), "grid_thw": grid}


def packed_images(names: Any, config: Any) -> Maker:
    """Text with images of several sizes; some samples have two."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", 2)
    image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    length = 6 + max(sum(t * h * w for t, h, w in grid) // merge**2 for grid in GRIDS)

    def make(index: int) -> Sample:
        grid = torch.tensor(GRIDS[index % 3])
        text = ids(index, length)
        start = 2
        for count in (grid.prod(1) // merge**2).tolist():
            text[:, start : start + count] = image_token
            start += count + 1
        sample = {"input_ids": text, "pixel_values": patches(index, vision, grid), "image_grid_thw": grid}
        kinds = {"mm_token_type_ids": (text == image_token).long()} if "mm_token_type_ids" in names else {}
        return {**sample, **kinds, "attention_mask": torch.ones_like(text)}

    return make


def text_around_images(model: Any, token: int, shape: tuple[int, ...]) -> Maker:
    """Text with as many image tokens as the model has features of an image."""

    def make(index: int) -> Sample:
        image = noise(index, 1, *shape)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=image)
        features = getattr(features, "pooler_output", features)
        features = features[0] if isinstance(features, (list, tuple)) else features
        count = features.numel() // features.shape[-1]
        text = ids(index, 4 + count)
        text[:, 2 : 2 + count] = token
        return {"input_ids": text, "pixel_values": image, "attention_mask": torch.ones_like(text)}

    return make
