"""What is frozen with each block, as the graph of one step says: for networks of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_cka.control.plan import FreezePlan
from lit_cka.control.step_trace import StepTrace
from lit_cka.features.layers import repeated_blocks
from tests.control.helpers import Chain, fit, freezing, weights
from tests.tracking.helpers import Classifier, dataset


class Step(pl.LightningModule):
    """Any network, in a step of its own."""

    def __init__(self, network: nn.Module, batch: Any) -> None:
        super().__init__()
        self.network, self.batch = network, batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(**batch) if isinstance(batch, dict) else self.network(batch)
        return (output if isinstance(output, Tensor) else output.logits).square().mean()


def traced(network: nn.Module, batch: Any) -> tuple[Step, FreezePlan]:
    torch.manual_seed(0)
    module = Step(network, batch)
    trace = StepTrace(module, repeated_blocks(module))
    trace.start()
    loss = module.training_step(batch, 0)
    return module, trace.plan(loss, 4)


def assert_frozen(module: Step, plan: FreezePlan, num_frozen: int) -> set[str]:
    """Autograd finds no gradient for exactly what is frozen, once the graph ends there; return the names."""
    frozen = {name for part in plan.parts[:num_frozen] for name in part.parameters}
    block = module.get_submodule(plan.blocks[num_frozen - 1])

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

    handle = block.register_forward_hook(cut)
    module.zero_grad()
    module.training_step(module.batch, 0).backward()
    handle.remove()
    graded = {name for name, value in module.named_parameters() if value.grad is not None}
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert graded == trained - frozen
    return frozen


def test_a_vision_transformer_of_timm() -> None:
    import timm

    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, drop_path_rate=0.1, **size).train()
    module, plan = traced(network, torch.randn(4, 1, 8, 8))
    for num_frozen in (1, 2, 3):
        frozen = assert_frozen(module, plan, num_frozen)
        assert {"network.cls_token", "network.pos_embed", "network.patch_embed.proj.weight"} <= frozen
    assert set(plan.parts[0].modules) >= {"network.patch_embed.proj", "network.pos_drop", "network.blocks.0.mlp.fc1"}
    assert all(name.startswith("network.blocks.1") for name in plan.parts[1].modules)
    assert not {"network.norm", "network.head", "network"} & {name for part in plan.parts for name in part.modules}
    assert all(part.can_skip for part in plan.parts)
    assert plan.parts[1].flops == plan.parts[2].flops > 0
    assert plan.flops_stem > 0
    assert FreezePlan.of(plan.state()) == plan


@pytest.mark.slow
def test_a_residual_network_with_stages() -> None:
    import timm

    network = timm.create_model("resnet10t", num_classes=3, in_chans=1, channels=(4, 4, 4, 4)).train()
    module, plan = traced(network, torch.randn(4, 1, 32, 32))
    assert len(plan.parts) == 4
    frozen = assert_frozen(module, plan, 2)
    assert any(name.startswith("network.conv1") for name in frozen)
    assert set(plan.parts[0].modules) >= {"network.bn1", "network.maxpool"}


def test_a_tied_embedding_is_trained_for_what_is_behind() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)).train()
    module, plan = traced(network, {"input_ids": torch.randint(0, 20, (4, 8)), "use_cache": False})
    frozen = assert_frozen(module, plan, 2)
    assert "network.transformer.wpe.weight" in frozen
    assert "network.transformer.wte.weight" not in frozen
    assert plan.num_trained_behind == 3  # with the last norm's


def test_encoders_of_transformers_with_masks() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    network = BertForSequenceClassification(BertConfig(vocab_size=20, **size)).train()
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]] * 2)
    module, plan = traced(network, {"input_ids": torch.randint(0, 20, (4, 6)), "attention_mask": mask})
    frozen = assert_frozen(module, plan, 2)
    assert sum("embeddings" in name for name in frozen) == 5
    assert all(part.can_skip for part in plan.parts)
    assert any("embeddings.dropout" in name for name in plan.parts[0].modules)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
def test_adapters_alone_are_frozen_where_nothing_else_is_trained() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    network = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)), LoraConfig(target_modules=["q_proj"])
    )
    module, plan = traced(network, {"input_ids": torch.randint(0, 20, (4, 6)), "use_cache": False})
    frozen = assert_frozen(module, plan, 2)
    assert len(frozen) == 4
    assert all("lora_" in name for name in frozen)


class Checkpointed(Chain):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of an evaluation
def test_checkpointed_blocks(tmp_path: Path) -> None:
    modules = []
    for net in (Checkpointed, Chain):
        torch.manual_seed(0)
        Checkpointed.reentrant = False
        modules.append(Classifier(net(), lr=0.05))
        fit(tmp_path, modules[-1], freezing(2))
    for name, value in weights(modules[0]).items():
        torch.testing.assert_close(weights(modules[1])[name], value, msg=name)
    Checkpointed.reentrant = True
    with pytest.raises(ValueError, match=r"not checkpointed in the reentrant way.*use_reentrant=False"):
        fit(tmp_path, Classifier(Checkpointed()), freezing(2))


def test_blocks_that_run_twice_in_a_step(tmp_path: Path) -> None:
    class Twice(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + self.loss([batch[0] + 1, batch[1]])

    torch.manual_seed(0)
    module, callback = Twice(Chain()), freezing(2, cache="memory")
    with pytest.warns(UserWarning, match="they run several times in a step"):
        fit(tmp_path, module, callback)
    assert callback.num_frozen == 2


def test_one_step_of_the_chain() -> None:
    torch.manual_seed(0)
    module = Classifier(Chain())
    trace = StepTrace(module, [f"net.blocks.{i}" for i in range(4)])
    trace.start()
    assert not trace.has_run
    plan = trace.plan(module.training_step(dataset(8)[:8], 0), 8)
    assert set(plan.parts[0].parameters) >= {"net.shift", "net.stem.0.weight", "net.stem.0.bias"}
    assert set(plan.parts[0].modules) == {
        "net.stem", "net.stem.0", "net.stem.1", "net.blocks.0", "net.blocks.0.norm", "net.blocks.0.linear"
    }  # fmt: skip
    assert plan.num_trained_behind == 2
    assert (plan.flops_stem, plan.flops_within(4), plan.flops_behind) == (576, 4 * 576, 288)
