"""Every architecture of four libraries, as small as it can be built, with random weights: `LIBRARIES`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from architecture_inputs import Maker, Sample, ids, image_makers, noise, transformers_makers
from torch import nn


class Case(NamedTuple):
    """An architecture.

    Attributes:
        name: of the library and the architecture.
        builds: ways to build it, the smallest first.
        makers: from the model to the ways to make its inputs.
    """

    name: str
    builds: list[Callable[[], nn.Module]]
    makers: Callable[[nn.Module], Iterator[Maker]]


# What configurations of transformers call their sizes.
DEPTHS = dict.fromkeys(
    (
        "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_block_records", "n_block", "encoder_num_layers",
        "decoder_num_layers", "decoder_num_hidden_layers", "encoder_num_hidden_layers",
        "decoder_depth", "encoder_depth", "vision_layers", "text_layers",
    ),
    2,
)  # fmt: skip
WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "width"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "projector_hidden_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(("encoder_hidden_size", "cross_attention_hidden_size", "projection_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head"), 4),
    **dict.fromkeys(("n_heads", "num_heads", "num_key_value_heads", "num_kv_heads"), 4),
    "image_size": 32, "patch_size": 8, "head_dim": 8, "d_kv": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "n_group": 1, "topk_group": 1, "attention_window": 4,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_n_groups": 1,
    "rotary_dim": 4, "mamba_d_ssm": 64, "n_mamba_heads": 1, "time_step_rank": 8, "n_groups": 1,
}  # fmt: skip
OTHERS = {
    "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 97, "image_token_index": 97, "video_token_id": 96, "vision_start_token_id": 95,
    "vision_end_token_id": 94, "audio_token_id": 93, "audio_token_index": 93, "use_cache": False,
    "attn_implementation": "eager",
}  # fmt: skip
UNSET = ("vocab_size", "n_group", "topk_group", "num_experts_per_tok", "n_routed_experts")  # where that is no choice
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FSMTConfig": {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99},
    **{
        f"{name}Config": {
            "prediction_length": 4,
            "context_length": 12,
            "num_time_features": 2,
            "lags_sequence": [1, 2, 3],
        }
        for name in ("TimeSeriesTransformer", "Informer", "Autoformer")
    },
}
SETTINGS: dict[str, dict[str, Any]] = {  # of the small sizes, those that do not go together with the others
    "Dots1Config": {"n_shared_experts": 1},
    "EsmConfig": {"mask_token_id": 3, "pad_token_id": 0},
    "KimiLinearConfig": {"num_experts_per_token": 2},
    "Kosmos2Config": {"latent_query_num": 4},
    "Mamba2Config": {"num_heads": 8},
    "XmodConfig": {"default_language": "en_XX"},
}
MOST_PARAMETERS = 1.5e8


def shrink(config: Any, sizes: dict[str, Any], depth: int = 0) -> None:
    """Make a configuration of transformers, and those inside it, small."""
    values = dict(vars(config))
    for name, value in values.items():
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, sizes, depth + 1)
        elif name in sizes and (isinstance(value, (int, str)) or name in UNSET):
            setattr(config, name, sizes[name])
        elif name == "attention_window" and name in sizes:
            setattr(config, name, 4)
        elif isinstance(value, list) and name.endswith("layer_types"):
            setattr(config, name, sorted(set(value[:8]), key=value.index)[:2] * (1 if len(set(value[:8])) > 1 else 2))
        elif name == "depths" and isinstance(value, list):
            setattr(config, name, [min(int(size), 2) for size in value])
        elif name == "hidden_sizes" and "hidden_size" in sizes and isinstance(value, list):
            setattr(config, name, [min(int(size), 32) for size in value])
        elif name == "num_heads" and "hidden_size" in sizes and isinstance(value, list):
            setattr(config, name, [min(2 ** (1 + stage), 16) for stage in range(len(value))])
        elif "hidden_size" in sizes and isinstance(value, dict) and _is_rope_of_images(config, name, value):
            value["mrope_section"] = [1, 1, 0] if value.get("partial_rotary_factor") == 0.5 else [2, 1, 1]


def _is_rope_of_images(config: Any, name: str, value: dict[str, Any]) -> bool:
    ignored = getattr(type(config), "ignore_keys_at_rope_validation", ())
    return name == "rope_parameters" and "mrope_section" in {*value, *ignored}


def model_of(kind: Any, model_type: Any, sizes: dict[str, Any]) -> nn.Module:
    config = kind(**ARGUMENTS.get(kind.__name__, {}))
    shrink(config, sizes)
    for name, value in SETTINGS.get(kind.__name__, {}).items() if "hidden_size" in sizes else ():
        setattr(config, name, value)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_type(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:.1e} parameters, still")
    model: nn.Module = model_type(config)
    return model


def transformers_cases() -> Iterator[Case]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    transformers.logging.set_verbosity_error()
    for name in ("BertModel", "LlamaModel", "T5Model", "CLIPModel", "Wav2Vec2Model"):  # what most others load as well
        getattr(transformers, name)
    for kind in sorted(MODEL_MAPPING.keys(), key=lambda kind: kind.__name__):
        builds = []
        for sizes in ({**DEPTHS, **WIDTHS, **OTHERS}, {**DEPTHS, **OTHERS}, {**DEPTHS, **WIDTHS}, DEPTHS, OTHERS):

            def build(kind: Any = kind, sizes: dict[str, Any] = sizes) -> nn.Module:
                model_type = MODEL_MAPPING[kind]
                model_type = model_type[0] if isinstance(model_type, (tuple, list)) else model_type
                return model_of(kind, model_type, sizes)

            builds.append(build)
        yield Case(f"transformers {kind.__name__.removesuffix('Config')}", builds, transformers_makers)


class Named(nn.Module):
    """A model whose images have a name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


def smallest_of_timm() -> dict[str, str]:
    """Of every module of timm a model that its name says is small."""
    import timm

    small = re.compile("atto|femto|pico|nano|xxs|xxt|tiny|_xs|_t|small|18|_s|micro|b0|mini|test_")
    smallest: dict[str, str] = {}
    entries = timm.models._registry._model_to_module  # type: ignore[attr-defined]
    for name in sorted(timm.list_models(), key=lambda name: (small.search(name) is None, len(name))):
        smallest.setdefault(entries[name], name)
    return smallest


def timm_cases() -> Iterator[Case]:
    import timm

    for module, name in sorted(smallest_of_timm().items()):
        size = (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).input_size[-1]

        def build(name: str = name) -> nn.Module:
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(f"{count:.1e} parameters")
            return Named(timm.create_model(name, pretrained=False))

        yield Case(f"timm {module}: {name}", [build], image_makers(size))


def torchvision_cases() -> Iterator[Case]:
    import torchvision

    first: dict[tuple[str, str], str] = {}
    for name in sorted(torchvision.models.list_models(), key=len):
        builder = torchvision.models.get_model_builder(name)
        family = "" if ".detection." not in builder.__module__ and ".video." not in builder.__module__ else name
        first.setdefault((builder.__module__, family), name)
    for (module, _), name in sorted(first.items()):
        if ".quantization." in module:
            continue

        def build(name: str = name, module: str = module) -> nn.Module:
            has_backbone = ".detection." in module or ".segmentation." in module
            inside: dict[str, Any] = {"weights_backbone": None} if has_backbone else {}
            if ".detection." in module and "ssd" not in name:
                inside |= {"min_size": 96, "max_size": 128}
            model = torchvision.models.get_model(name, weights=None, **inside)
            return model if ".optical_flow." in module else Named(model)

        def makers(model: nn.Module, name: str = name, module: str = module) -> Iterator[Maker]:
            if ".detection." in module:
                yield lambda index: {"x": [noise(index, 3, 96, 128)]}
            elif ".video." in module:
                size = 224 if re.search("mvit|swin|s3d", name) else 64
                yield lambda index: {"x": noise(index, 1, 3, 16, size, size)}
            elif ".optical_flow." in module:
                yield lambda index: {"image1": noise(index, 1, 3, 128, 128), "image2": noise(index, 1, 3, 128, 128)}
            else:
                yield lambda index: {"x": noise(index, *(1, 3, *[299 if "inception" in name else 224] * 2))}

        yield Case(f"torchvision {name}", [build], makers)


def open_clip_cases() -> Iterator[Case]:
    import open_clip

    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        options = sorted(key for part in (vision, text, config) for key, value in part.items() if value is not None)
        options = [key for key in options if key not in ("layers", "width", "heads", "image_size", "patch_size")]
        kind = (str(type(vision.get("layers"))), str(vision.get("timm_model_name"))[:8], str(options))
        if kind not in seen:
            seen.add(kind)
            yield Case(f"open_clip {name}", [lambda config=config: small_open_clip(config)], open_clip_makers)


def small_open_clip(config: dict[str, Any]) -> nn.Module:
    """A model of open_clip as its configuration says, of few and narrow layers; of timm the smallest of its module."""
    import open_clip
    import timm
    from open_clip.factory import _MODEL_CONFIGS

    config = json.loads(json.dumps(config))
    config["embed_dim"] = 64
    narrow = {"layers": 2, "width": 64, "heads": 2}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        module = timm.models._registry._model_to_module[vision["timm_model_name"]]  # type: ignore[attr-defined]
        vision["timm_model_name"] = smallest_of_timm()[module]
        vision["image_size"] = timm.get_pretrained_cfg(vision["timm_model_name"]).input_size[-1]
    else:
        is_resnet = isinstance(vision.get("layers"), list)
        vision |= {"layers": [1, 1, 1, 1] if is_resnet else 2, "width": 16 if is_resnet else 64, "image_size": 64}
        vision |= {} if is_resnet else {"head_width": 32, "patch_size": 16}
    if text.get("hf_model_name"):
        text["hf_model_name"] = small_text_config(text["hf_model_name"])
        text["hf_model_pretrained"] = False
    text |= narrow
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= narrow
    _MODEL_CONFIGS["small"] = config
    return open_clip.create_model("small", pretrained_image=False, pretrained_text=False)


def small_text_config(name: str) -> str:
    """A folder with the configuration of a small text encoder of the family of this name."""
    from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config: Any
    if "mt5" in name:
        config = MT5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=99)
    elif "nllb" in name:
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = M2M100Config(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, **layers)
    else:
        kind = XLMRobertaConfig if "xlm" in name else RobertaConfig
        config = kind(**sizes, vocab_size=99, max_position_embeddings=600)
    folder = Path(tempfile.gettempdir()) / f"architectures-{config.model_type}"
    config.save_pretrained(folder)
    return str(folder)


def open_clip_makers(model: Any) -> Iterator[Maker]:
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    length = min(getattr(model, "context_length", None) or 16, 77)

    def make(index: int) -> Sample:
        return {"image": noise(index, 1, 3, size, size), "text": ids(index, length)}

    yield make


LIBRARIES = {
    "transformers": transformers_cases, "timm": timm_cases, "torchvision": torchvision_cases,
    "open_clip": open_clip_cases,
}  # fmt: skip
