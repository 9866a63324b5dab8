"""Are the default layers of every architecture read the right way? One sample at a time tells.

Every architecture of transformers, timm, torchvision and open_clip that can be built small and without a network runs
on a batch of a few samples, of as many as there are tokens, of one, and of texts of unequal lengths, and then on each
of its samples alone. What a layer's features of sample i are in the batch has to be the mean over the positions of
what it returns for sample i alone, taken by a hook of this script. Where that is so for all default layers that are
not refused by an error of their own, the architecture is right; where all are refused, it is refused; else it is
wrong. Wrong has to be none. Each architecture has a process of its own, so that none holds up the others.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from architecture_inputs import TOKENS, Maker, Sample, joined, with_padding
from architecture_models import LIBRARIES, Case
from common import RESULTS, Result, new_parser, parse, report
from torch import Tensor, nn

from lit_cka.features import FeatureExtractor

MOST_ALONE = 3  # samples of a batch
VERDICTS = ["right", "refused", "wrong", "not run", "not built"]


class Outcome(NamedTuple):
    verdict: str  # one of VERDICTS
    detail: str = ""


class Run(NamedTuple):
    """What the layers returned, by a hook of this script, for a batch and for each of its first samples alone."""

    together: dict[str, Tensor]
    alone: list[dict[str, Tensor]]
    samples: list[Sample]


def outputs_of(model: nn.Module, names: list[str], inputs: Sample) -> dict[str, Tensor]:
    """The hidden states that the layers of these names return; copies, which what follows does not overwrite."""
    raw: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while isinstance(output, (tuple, list)) and output:
                output = output[0]
            output = getattr(output, "last_hidden_state", output)
            if isinstance(output, Tensor):
                raw[name] = output.clone()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keeping(name)) for name in names]
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return raw


def expected_means(raw: Tensor, width: int, sample: Sample, name: str) -> list[Tensor]:
    """The mean over the positions that count of what a layer returned for one sample alone: over all axes but the
    features', of which shapes may leave several.
    """
    of_others = ("decoder_input_ids" in sample and "decoder" in name) or re.search("vision|visual|image", name)
    kept = None if of_others else sample.get("attention_mask")
    means = []
    for axis in (axis for axis, size in enumerate(raw.shape) if size == width):
        rows = raw.double().movedim(axis, -1).reshape(-1, width)
        if kept is not None and not kept.all():
            if len(rows) != kept.numel():
                return []  # of tokens that a model has merged: which count is its own affair
            rows = rows[kept.flatten() != 0]
        means.append(rows.mean(0))
    return means


def depends_on_others(alone: Tensor, together: Tensor, width: int) -> bool:
    """Whether what a layer returns for a sample alone is not to be found in what it returns for the batch."""
    if alone.ndim != together.ndim or alone.numel() > 2e6:
        return alone.ndim != together.ndim
    for axis in (axis for axis, size in enumerate(alone.shape) if size == width == together.shape[axis]):
        one, all_of_them = (raw.movedim(axis, -1).reshape(-1, width).double() for raw in (alone, together))
        one = one[:: max(len(one) // 16, 1)]
        scale = float(one.abs().max().clamp(min=1e-6))
        if float(torch.cdist(one, all_of_them).amin(dim=1).max()) < 1e-3 * scale * width**0.5:
            return False
    return True


def mistakes(features: dict[str, Tensor], run: Run) -> tuple[list[str], int]:
    """What is wrong, and for how many layers nothing could be told."""
    n = len(run.samples)
    wrong, untold = [], 0
    for name, X in features.items():
        if len(X) != n:
            wrong.append(f"{name}: {len(X)} rows for {n} samples")
            continue
        raws = [raw.get(name) for raw in run.alone]
        means: list[list[Tensor]] = [
            [] if raw is None else expected_means(raw, X.shape[1], sample, name)
            for raw, sample in zip(raws, run.samples, strict=False)
        ]
        if not all(means):
            untold += 1
            continue
        scale = max(float(raw.abs().max()) for raw in raws if raw is not None)
        spread = float(torch.stack([sample[0] for sample in means]).std(0, correction=0).max())
        off = max(
            min(float((row - each).abs().max()) for each in sample) for row, sample in zip(X, means, strict=False)
        )
        if n > 1 and spread < 1e-4 * scale:
            untold += 1  # all samples look alike
        elif not off <= max(0.02 * spread, 2e-5 * scale):
            together = run.together[name]
            # Of other positions than the sample's own, such as all texts of the batch for each video (X-CLIP).
            has_more = together.numel() > n * max(raw.numel() for raw in raws if raw is not None)
            if has_more or any(depends_on_others(raw, together, X.shape[1]) for raw in raws if raw is not None):
                untold += 1
            else:
                wrong.append(f"{name}: off by {off:.2g}, where samples differ by {spread:.2g}")
    return wrong, untold


def tried(model: nn.Module, samples: list[Sample]) -> Outcome:
    """Run a batch and its samples one by one."""
    batch = joined(samples)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FeatureExtractor(model) as extractor:
                torch.manual_seed(0)
                model(**batch)
                features, problems = extractor.drain()
    except ValueError as error:
        return Outcome("refused", str(error)[:160])
    if not features:
        return Outcome("refused", next(iter(problems.values()), "no layers")[:160])
    alone = [outputs_of(model, list(features), sample) for sample in samples[:MOST_ALONE]]
    wrong, untold = mistakes(features, Run(outputs_of(model, list(features), batch), alone, samples))
    if wrong:
        return Outcome("wrong", f"{len(wrong)} of {len(features)}, {len(samples)} samples: {wrong[0]}")
    part = f", {len(problems)} refused: {next(iter(problems.values()))[:120]}" if problems else ""
    detail = f"{len(features)} layers{part}"
    return Outcome("right", detail) if untold < len(features) else Outcome("not run", f"none of {detail} can be told")


def all_sizes(model: nn.Module, make: Maker) -> Outcome:
    """The worst of several batches."""
    numbers = (3, TOKENS, 1) if "input_ids" in make(0) else (3, 1)
    batches = [[make(index) for index in range(n)] for n in numbers]
    outcomes = [tried(model, samples) for samples in batches[:1]]
    outcomes += [each for each in (tried(model, samples) for samples in batches[1:]) if each.verdict != "not run"]
    if "input_ids" in make(0) and "attention_mask" not in make(0):
        try:
            padded = [with_padding(make)(index) for index in range(3)]
            model(**joined(padded))
            outcomes.append(tried(model, padded))
        except (TypeError, AttributeError):  # it takes no mask, or what its configuration lacks
            pass
        outcomes = [each for each in outcomes if each.verdict != "not run"] or outcomes
    order = ("wrong", "not run", "refused", "right")
    return min(outcomes, key=lambda outcome: order.index(outcome.verdict))


def outcome_of(case: Case) -> Outcome:
    """Of the first way to build an architecture and to call it that works."""
    failures: list[Outcome] = []
    for build in case.builds:
        try:
            torch.manual_seed(0)
            model = build().eval()
        except Exception as error:
            failures.append(Outcome("not built", f"{type(error).__name__}: {error}"[:100]))
            continue
        try:
            for make in case.makers(model):
                try:
                    samples = [make(index) for index in range(3)]
                    with torch.no_grad():
                        for inputs in (joined(samples), *samples):
                            model(**inputs)
                except Exception as error:
                    failures.append(Outcome("not run", f"{type(error).__name__}: {error}"[:100]))
                    continue
                return all_sizes(model, make)
        except Exception as error:
            failures.append(Outcome("not run", f"{type(error).__name__}: {error}"[:100]))
    return next((failure for failure in failures if failure.verdict == "not run"), failures[0])


def in_process(case: Case, seconds: int) -> Outcome:
    """The outcome, by a process of its own, which is stopped when its time is over."""

    def send(connection: Connection) -> None:
        warnings.simplefilter("ignore")
        connection.send(tuple(outcome_of(case)))

    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=send, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return Outcome(*ours.recv()) if ours.poll(seconds) else Outcome("not run", f"more than {seconds} s")
    except EOFError:
        return Outcome("not run", "the process died")
    finally:
        process.kill()
        process.join()


def outcomes_file(library: str) -> Path:
    return RESULTS / "architectures" / f"{library}.json"


def outcomes_so_far(library: str) -> dict[str, list[str]]:
    """By the architectures' names, from earlier runs."""
    path = outcomes_file(library)
    return json.loads(path.read_text()) if path.exists() else {}


def summary() -> list[Result]:
    """The tables of all that was tried, in this run and in earlier ones."""
    counts, others, untried = [], [], []
    for library in LIBRARIES:
        outcomes = outcomes_so_far(library)
        found = [verdict for verdict, _ in outcomes.values()]
        counts += [[library, len(found), *(found.count(verdict) for verdict in VERDICTS)]] if found else []
        others += [[name, *outcome] for name, outcome in outcomes.items() if outcome[0] in ("wrong", "refused")]
        for verdict in ("not run", "not built"):
            names = [name.partition(" ")[2] for name, outcome in outcomes.items() if outcome[0] == verdict]
            untried += [[library, verdict, ", ".join(names)]] if names else []
    return [
        Result("Default layers, read right?", ["library", "architectures", *VERDICTS], counts),
        Result("Not right", ["architecture", "verdict", "why"], others),
        Result("Not tried", ["library", "", "architectures"], untried),
    ]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=list(LIBRARIES), help="which, or none")
    parser.add_argument("--only", nargs="+", default=[""], help="names that hold one of these texts; others stay")
    parser.add_argument("--resume", action="store_true", help="try those that no earlier run has tried")
    parser.add_argument("--again", nargs="*", choices=VERDICTS, default=[], help="of these verdicts, those as well")
    parser.add_argument("--seconds", type=int, default=40, help="after which an architecture is given up")
    parser.add_argument("--first", type=int, default=None, help="try so many of each library")
    args = parse(parser, {"first": 3})
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in args.libraries:
        cases = [case for case in LIBRARIES[library]() if any(text.lower() in case.name.lower() for text in args.only)]
        outcomes = {} if args.only == [""] and not args.resume else outcomes_so_far(library)
        done = {name for name, outcome in outcomes.items() if args.resume and outcome[0] not in args.again}
        cases = [case for case in cases if case.name not in done]
        for case in cases[: args.first]:
            outcome = in_process(case, args.seconds)
            outcomes[case.name] = list(outcome)
            print(f"{case.name}: {outcome.verdict}. {outcome.detail}", flush=True)
            if not args.quick:
                outcomes_file(library).parent.mkdir(parents=True, exist_ok=True)
                outcomes_file(library).write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")
    report("architectures", args, summary())


if __name__ == "__main__":
    main()
