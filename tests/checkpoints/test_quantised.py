"""What belongs to quantised weights, by the names and types of real formats; and what looks like it, and does not."""

from __future__ import annotations

import pytest
import torch

from lit_cka.checkpoints.quantised import quantised_names, quantised_tensors

# Of one linear layer "l" (of experts, "e"), as its format writes it: type and number of dimensions.
FORMATS = {
    "block FP8": {"l.weight": ("F8_E4M3", 2), "l.weight_scale_inv": ("F32", 2)},
    "FP8 of compressed-tensors": {
        "l.weight": ("F8_E4M3", 2), "l.weight_scale": ("BF16", 2), "l.input_scale": ("BF16", 1), "l.bias": ("BF16", 1),
    },
    "FP8 of ComfyUI": {"l.weight": ("F8_E5M2", 2), "l.scale_weight": ("F32", 0), "l.lora_up": ("F16", 2)},
    "FP8 of one layer": {"weight": ("F8_E4M3", 2), "weight_scale_inv": ("F32", 2)},
    "GPTQ": {"l.qweight": ("I32", 2), "l.qzeros": ("I32", 2), "l.scales": ("F16", 2), "l.g_idx": ("I32", 1)},
    "GPTQ of one layer": {"qweight": ("I32", 2), "qzeros": ("I32", 2), "scales": ("F16", 2)},
    "AWQ": {"l.qweight": ("I32", 2), "l.qzeros": ("I32", 2), "l.scales": ("F16", 2), "l.bias": ("F16", 1)},
    "bitsandbytes, 4 bits": {
        "l.weight": ("U8", 2), "l.weight.absmax": ("F32", 1), "l.weight.quant_map": ("F32", 1),
        "l.weight.quant_state.bitsandbytes__nf4": ("U8", 1),
    },
    "bitsandbytes, 4 bits in bfloat16": {
        "l.weight": ("BF16", 2), "l.weight.absmax": ("U8", 1), "l.weight.nested_absmax": ("F32", 1),
        "l.weight.quant_state.bitsandbytes__fp4": ("U8", 1), "l.bias": ("BF16", 1),
    },
    "bitsandbytes, 8 bits": {"l.weight": ("I8", 2), "l.SCB": ("F32", 1), "l.weight_format": ("U8", 0)},
    "compressed-tensors, 4 bits": {
        "l.weight_packed": ("I32", 2), "l.weight_scale": ("BF16", 2), "l.weight_shape": ("I64", 1),
    },
    "MXFP4": {
        "e.gate_up_proj_blocks": ("U8", 4), "e.gate_up_proj_scales": ("U8", 3), "e.gate_up_proj_bias": ("BF16", 2),
    },
    "NVFP4": {"l.weight": ("U8", 2), "l.weight_scale": ("F8_E4M3", 2), "l.weight_scale_2": ("F32", 0)},
    "4-bit floats": {"l.weight": ("F4", 2), "l.weight_scale": ("F8_E8M0", 2)},
    "HQQ": {"l.W_q": ("U8", 2), "l.scale": ("F16", 2), "l.zero": ("F16", 2), "l.shape": ("I64", 1)},
    "Quanto": {"l.weight._data": ("I8", 2), "l.weight._scale": ("BF16", 2)},
    "AQLM": {"l.codes": ("I16", 3), "l.codebooks": ("F16", 4), "l.scales": ("F16", 4)},
    "VPTQ": {"l.indices": ("I32", 3), "l.weight_scale": ("F16", 1), "l.centroids.weight": ("F16", 2)},
    "MLX": {"l.weight": ("U32", 2), "l.scales": ("F16", 2), "l.biases": ("F16", 2)},
    "Marlin": {"l.B": ("I32", 2), "l.s": ("F16", 2), "l.workspace": ("I32", 1)},
    "EETQ": {"l.weight": ("I8", 2), "l.weight_scales": ("F16", 1)},
    "torchao": {"l._weight_qdata": ("float8_e4m3fn", 2), "l._weight_scale": ("float32", 2)},
    "integers, of torch": {"l.weight": ("int8", 2), "l.scales": ("bfloat16", 2)},
}  # fmt: skip
BESIDE = {"embed.weight": ("BF16", 2), "norm.weight": ("BF16", 1), "layers.0.weight": ("float32", 2), "pos": ("F32", 3)}
PLAIN = {
    "Swin": {"a.relative_position_index": ("I64", 2), "a.relative_position_bias_table": ("F32", 2)},
    "GPT-NeoX": {"a.bias": ("U8", 4), "a.masked_bias": ("F16", 0), "a.dense.weight": ("F16", 2)},
    "a mask": {"a.mask": ("BOOL", 2), "a.in_proj_weight": ("F32", 2)},
    "a mask of bytes above": {"a.bias": ("U8", 4), "a.slope": ("F16", 1), "a.dense.weight": ("F16", 2)},
    "BatchNorm": {"n.weight": ("F32", 1), "n.running_mean": ("F32", 1), "n.num_batches_tracked": ("I64", 0)},
    "CLIP": {"e.position_ids": ("I64", 2), "e.class_embedding": ("F32", 1), "e.patch_embedding.weight": ("F32", 4)},
    "a counter at the root": {"step": ("I32", 0), "l.weight": ("F32", 2), "cls_token": ("F32", 3)},
    "8-bit floats at the root": {"eight": ("F8_E4M3", 2), "half": ("F16", 2)},
    "8-bit floats alone": {"l.weight": ("F8_E4M3", 2)},
    "doubles": {"l.weight": ("F64", 2), "l.bias": ("F64", 1), "m.weight": ("float64", 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_all_of_a_quantised_layer(name: str) -> None:
    assert quantised_names({**FORMATS[name], **(BESIDE if "." in next(iter(FORMATS[name])) else {})}) == set(
        FORMATS[name]
    )
    deep = {f"model.layers.10.mlp.{key}": value for key, value in FORMATS[name].items()}
    assert quantised_names({**BESIDE, **deep}) == set(deep)


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_are_not_quantised(name: str) -> None:
    marked = {"a mask of bytes above": {"a.bias", "a.slope"}}.get(name, set())  # neither would be edited
    assert quantised_names({**BESIDE, **PLAIN[name]}) == marked


def test_tensors() -> None:
    weights = {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "l.scale": torch.ones(2, 1), "m": torch.ones(2, 2)}
    assert quantised_tensors(weights) == {"l.weight", "l.scale"}
