"""Are the default layers of every architecture read the right way? One sample at a time tells.

Every architecture of transformers, timm, torchvision and open_clip that can be built small and without a network runs
on a batch, with fewer samples than tokens and with as many, and then on each of its samples alone. What a layer's
features of sample i are in the batch has to be the mean over the positions of what it returns for sample i alone,
taken by a hook of this script. Where that is so for all default layers, the architecture is right; one clear error of
`FeatureExtractor` is refused; else it is wrong. Wrong has to be none.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from common import Result, new_parser, parse, report
from torch import Tensor, nn

from lit_cka.features import FeatureExtractor

TOKENS = 8
SECONDS = 40
# What configurations of transformers call their sizes.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "width"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head"), 4),
    **dict.fromkeys(("n_heads", "num_heads", "num_key_value_heads"), 4),
    "vocab_size": 99, "max_position_embeddings": 64, "image_size": 32, "patch_size": 8, "head_dim": 8, "d_kv": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "attn_implementation": "eager",
}  # fmt: skip


class Outcome(NamedTuple):
    verdict: str  # right, refused, wrong, not built, not run
    detail: str = ""


class TooSlowError(Exception):
    """An architecture that can't be tried in the time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def states_in(output: Any) -> Any:
    """A copy of the hidden states in a layer's output, which what follows may overwrite."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "last_hidden_state", output)
    return output.clone() if isinstance(output, Tensor) else None


def outputs_of(model: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the layers of these names return, by hooks of this script."""
    raw: dict[str, Any] = {}
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keeping(raw, name)) for name in names]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return raw


def are_alike(one: Tensor | None, many: Tensor | None, n: int) -> bool:
    """Whether a sample alone has as many positions as among others, whose length a model may make its own."""
    if one is None or many is None:
        return one is many
    return one.numel() * n == many.numel()


def keeping(raw: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that puts what a layer returns under its name."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        raw[name] = states_in(output)

    return hook


def of_one_sample(raw: Tensor | None, width: int) -> list[Tensor]:
    """The mean over all positions of what a layer returned for one sample alone: over all axes but the features', of
    which shapes may leave several.
    """
    if raw is None:
        return []
    axes = [axis for axis, size in enumerate(raw.shape) if size == width]
    return [raw.double().movedim(axis, -1).reshape(-1, width).mean(0) for axis in axes]


def tried(model: nn.Module, inputs: dict[str, Tensor]) -> Outcome:
    """Run a batch and its samples one by one."""
    n = len(next(iter(inputs.values())))
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    except TooSlowError:
        raise
    except Exception as error:
        return Outcome("not run", f"{type(error).__name__}: {error}"[:100])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FeatureExtractor(model) as extractor:
                model(**inputs)
                features, problems = extractor.drain()
    except ValueError as error:
        return Outcome("refused", str(error)[:160])
    if not features:
        return Outcome("refused", next(iter(problems.values()), "no layers")[:160])
    together = outputs_of(model, list(features), inputs)
    again = outputs_of(model, list(features), inputs)
    if any(together[name] is not None and not torch.equal(together[name], again[name]) for name in together):
        return Outcome("not run", "it draws random numbers")
    wrong: list[str] = []
    untold = 0
    for sample in range(min(n, 3)):
        try:
            raw = outputs_of(model, list(features), {key: value[sample : sample + 1] for key, value in inputs.items()})
        except TooSlowError:
            raise
        except Exception as error:
            return Outcome("not run", f"one sample: {error}"[:100])
        for name, X in features.items():
            expected = of_one_sample(raw.get(name), X.shape[1])
            if len(X) != n:
                wrong.append(f"{name}: {len(X)} rows for {n} samples")
            elif not expected or not are_alike(raw.get(name), together.get(name), n):
                untold += 1
            else:
                off = min(float((X[sample] - each).abs().max() / each.abs().max().clamp(min=1)) for each in expected)
                wrong += [f"{name}: off by {off:.2g}"] if off > 1e-3 else []
    if wrong:
        return Outcome("wrong", f"{len(wrong)} of {3 * len(features)}: {wrong[0]}")
    part = f", {len(problems)} refused: {next(iter(problems.values()))[:90]}" if problems else ""
    return Outcome("right" if untold < len(features) else "not run", f"{len(features)} layers{part}")


def both_sizes(make: Callable[[], nn.Module], inputs: Callable[[nn.Module, int], dict[str, Tensor]]) -> Outcome:
    """The worse of a batch with fewer samples than tokens and one with as many."""
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.manual_seed(0)
                model = make()
            except TooSlowError:
                raise
            except Exception as error:
                return Outcome("not built", f"{type(error).__name__}: {error}"[:100])
            outcomes = []
            for n in (3, TOKENS):
                try:
                    given = inputs(model, n)
                except Exception as error:
                    return Outcome("not run", str(error)[:100])
                outcomes.append(tried(model, given))
    except TooSlowError:
        return Outcome("not run", f"more than {SECONDS} s")
    order = ("wrong", "not run", "refused", "right")
    return min(outcomes, key=lambda outcome: order.index(outcome.verdict))


def shrink(config: Any, depth: int = 0) -> None:
    """Make a configuration of transformers, and those inside it, small."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1)
        elif name in SMALL and isinstance(value, (int, str)):
            setattr(config, name, SMALL[name])
        elif name == "attention_window":
            setattr(config, name, 4)
        elif name in ("depths", "hidden_sizes", "num_heads") and isinstance(value, list):
            setattr(config, name, [min(int(size), 2 if name == "depths" else 32) for size in value])


def transformers_inputs(model: nn.Module, n: int) -> dict[str, Tensor]:
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    torch.manual_seed(1)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = torch.randint(3, 90, (n, TOKENS))
        if "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = torch.randint(3, 90, (n, TOKENS))
    elif "pixel_values" in parameters:
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else 32
        inputs["pixel_values"] = torch.randn(n, getattr(config, "num_channels", 3), size, size)
    elif "input_values" in parameters:
        inputs["input_values"] = torch.randn(n, 4000)
    elif "input_features" in parameters:
        inputs["input_features"] = torch.randn(n, getattr(config, "num_mel_bins", 80), 3000)
    else:
        raise ValueError(f"inputs {', '.join(list(parameters)[:3])}")
    return inputs


def transformers_cases() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    transformers.logging.set_verbosity_error()
    for kind in sorted(MODEL_MAPPING.keys(), key=lambda kind: kind.__name__):

        def make(kind: Any = kind) -> nn.Module:
            config = kind()
            shrink(config)
            model_type = MODEL_MAPPING[kind]
            model_type = model_type[0] if isinstance(model_type, (tuple, list)) else model_type
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_type(config).parameters())
            if size > 3e8:
                raise ValueError(f"{size:.1e} parameters, still")
            model: nn.Module = model_type(config)
            return model

        yield f"transformers {kind.__name__.removesuffix('Config')}", make, transformers_inputs


def image_inputs(size: int) -> Callable[[nn.Module, int], dict[str, Tensor]]:
    def inputs(model: nn.Module, n: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {"x": torch.randn(n, 3, size, size)}

    return inputs


def timm_cases() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    import timm

    small = re.compile("atto|femto|pico|nano|xxs|xxt|tiny|_xs|_t|small|18|_s|micro|b0|mini")
    smallest: dict[str, str] = {}  # of every module of timm, one that its name says is small
    for name in sorted(timm.list_models(), key=lambda name: (small.search(name) is None, len(name))):
        smallest.setdefault(timm.models._registry._model_to_module[name], name)  # type: ignore[attr-defined]
    for module, name in sorted(smallest.items()):
        size = (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).input_size[-1]
        yield f"timm {module}: {name}", lambda name=name: timm.create_model(name, pretrained=False), image_inputs(size)


class Named(nn.Module):
    """A model whose images have a name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def torchvision_cases() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    import torchvision

    first: dict[str, str] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        first.setdefault(torchvision.models.get_model_builder(name).__module__, name)
    for name in sorted(first.values()):

        def make(name: str = name) -> nn.Module:
            return Named(torchvision.models.get_model(name, weights=None))

        yield f"torchvision {name}", make, image_inputs(299 if "inception" in name else 224)


def open_clip_cases() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    import open_clip

    def inputs(model: Any, n: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        size = model.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        length = getattr(model, "context_length", 77)
        return {"image": torch.randn(n, 3, size, size), "text": torch.randint(3, 90, (n, length))}

    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        kind = (str(type(vision.get("layers"))), vision.get("timm_model_name"), "multimodal_cfg" in config)
        if kind in seen or text.get("hf_model_name"):  # those of transformers ask the hub
            continue
        seen.add(kind)
        yield f"open_clip {name}", lambda name=name: open_clip.create_model(name, pretrained_image=False), inputs


LIBRARIES = {
    "transformers": transformers_cases, "timm": timm_cases, "torchvision": torchvision_cases,
    "open_clip": open_clip_cases,
}  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="which to try")
    parser.add_argument("--only", default="", help="names that hold this text")
    parser.add_argument("--first", type=int, default=None, help="try so many of each library")
    args = parse(parser, {"first": 3})
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts: dict[str, dict[str, int]] = {}
    details: list[list[Any]] = []
    for library in args.libraries:
        cases = [case for case in LIBRARIES[library]() if args.only.lower() in case[0].lower()]
        for name, make, inputs in cases[: args.first]:
            outcome = both_sizes(make, inputs)
            counts.setdefault(library, {}).setdefault(outcome.verdict, 0)
            counts[library][outcome.verdict] += 1
            details.append([name, outcome.verdict, outcome.detail])
            print(f"{name}: {outcome.verdict}. {outcome.detail}", flush=True)
    verdicts = ["right", "refused", "wrong", "not run", "not built"]
    rows = [[library, *(found.get(verdict, 0) for verdict in verdicts)] for library, found in counts.items()]
    summary = Result("Default layers, read right?", ["library", *verdicts], rows)
    others = [row for row in details if row[1] in ("wrong", "refused")]
    part = "" if len(args.libraries) == len(LIBRARIES) else "_" + "_".join(args.libraries)
    report(f"architectures{part}", args, [summary, Result("Not right", ["architecture", "verdict", "why"], others)])


if __name__ == "__main__":
    main()
