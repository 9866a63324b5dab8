"""Whether the tests notice when the code is broken: small changes, one at a time, and the tests that must fail of them.

    python tests/mutations.py [--only NAME] [--list]

applies each change to a copy of the tree in a temporary folder, runs the tests that are named with it, and prints
"killed" if they fail and "survived" if they do not. What is known to survive stands here with the reason. Before, all
these tests run once on the unchanged copy. No part of the suite: it takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("lit_cka", "tests", "configs", "docs", "benchmarks", "pyproject.toml", "README.md", "train.py", "analyze.py")
SECONDS = 240  # after which tests hang, which is noticed, too


@dataclass(frozen=True)
class Mutant:
    """A change that breaks something.

    Attributes:
        name: what is broken.
        edits: files within `lit_cka/`, what stands there once, and what is put in its place.
        tests: arguments of pytest that choose the tests that must fail.
        survives: why none can fail; empty if some must.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]
    survives: str = ""


def zoo(*kinds: str) -> tuple[str, ...]:
    return ("tests/tracking/test_zoo.py", "-k", " or ".join(kinds))


LOOPS, RECORDED = "tracking/evaluation_loops.py", "reference/recorded_dataloader.py"
PRESERVED, TRACKER = "tracking/preserved_state.py", "tracking/tracker.py"
JACKKNIFE, INTERVALS = "functional/jackknife.py", "functional/intervals.py"
OF_JACKKNIFE = ("tests/functional/test_jackknife.py",)
F32, EDITS = "functional/float32_spectrum.py", "functional/edits.py"
SPLITS = ("tests/functional/test_float32_spectrum.py",)
FUNCTIONS, BY_NAME = ("tests/functional/test_edits.py",), ("tests/editing/test_edits.py",)
STATISTICS, SUMMARY = "study/statistics.py", "study/summary.py"
OF_STATISTICS, OF_SUMMARY = ("tests/study/test_statistics.py",), ("tests/study/test_summary.py",)
OF_STUDY, OF_STUDY_EDITS = ("tests/study/test_study.py",), ("tests/study/test_edits.py",)
NEAREST, MOMENTS = "functional/nearest_neighbours.py", "functional/permutation_moments.py"
CALIBRATION, PERMUTED = "analysis/calibration.py", "functional/permutations.py"
OF_NEAREST, OF_CCA = ("tests/functional/test_nearest_neighbours.py",), ("tests/functional/test_svcca.py",)
OF_PERMUTED, OF_CALIBRATION = ("tests/functional/test_permutations.py",), ("tests/analysis/test_calibration.py",)
UNCERTAINTY, OF_UNCERTAINTY = "analysis/uncertainty.py", ("tests/analysis/test_uncertainty.py",)
OF_SAMPLED, OF_RANKME = ("tests/functional/test_sampled_features.py",), ("tests/functional/test_rankme.py",)

MUTANTS = [
    # Measures of `compare`, and what they are by chance.
    Mutant(
        "measures: a sample is its own neighbour",
        ((NEAREST, "scatter_(1, itself, torch.inf)", "scatter_(1, itself, 0.0)"),),
        OF_NEAREST,
    ),
    Mutant("measures: no ties", ((NEAREST, "farthest + tie", "farthest"),), OF_NEAREST),
    Mutant("measures: cosines not from the mean", ((NEAREST, "    u = u - u.mean(dim=0)\n", ""),), OF_NEAREST),
    Mutant(
        "measures: no centring of kernels",
        ((NEAREST, "((mean - nearest.values) / 2)", "(1 - nearest.values / 2)"),),
        OF_NEAREST,
    ),
    Mutant(
        "measures: the wrong way round",
        ((NEAREST, "torch.argsort(orders.to(indices.device), dim=1)", "orders"),),
        OF_NEAREST,
    ),
    Mutant(
        "measures: singular values for variance",
        (("functional/svcca.py", "S.square().cumsum(0) / S.square().sum()", "S.cumsum(0) / S.sum()"),),
        OF_CCA,
    ),
    Mutant(
        "measures: rounding is a direction", (("functional/svcca.py", "int((smallest < S).sum())", "len(S)"),), OF_CCA
    ),
    Mutant("measures: equal weights", (("functional/pwcca.py", "x.S[:, None] * x.Vh", "x.Vh"),), OF_CCA),
    Mutant(
        "measures: weights of squares",
        (("functional/pwcca.py", ".abs().sum(dim=-1)", ".square().sum(dim=-1)"),),
        OF_CCA,
    ),
    Mutant(
        "measures: features with themselves",
        (("functional/sampled_features.py", "(whole - single)", "whole"),),
        OF_SAMPLED,
    ),
    Mutant("measures: no share of features", (("functional/sampled_features.py", " * (d / (d - 1))", ""),), OF_SAMPLED),
    Mutant("measures: ranks from 0", (("functional/rankme.py", "    if centre:\n", "    if False:\n"),), OF_RANKME),
    Mutant(
        "intervals: of the part that was drawn",
        ((UNCERTAINTY, "(debiased[i, first:], n, samples", "(debiased[i, first:], len(drawn), samples"),),
        OF_UNCERTAINTY,
    ),
    Mutant(
        "intervals: the first samples",
        (
            (
                UNCERTAINTY,
                "torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))",
                "torch.arange(n)",
            ),
        ),
        OF_UNCERTAINTY,
    ),
    Mutant(
        "intervals: half of a matrix with itself",
        ((UNCERTAINTY, "first = i if is_same else 0", "first = i + 1 if is_same else 0"),),
        OF_UNCERTAINTY,
    ),
    Mutant(
        "intervals: about the plain estimate",
        (("analysis/comparison.py", "values if settings.debiased else", "values if True else"),),
        OF_UNCERTAINTY,
    ),
    Mutant(
        "chance: a triangle counted once",
        ((PERMUTED, "(block.triu(1) + block.triu(0))", "block.triu(0)"),),
        OF_PERMUTED,
    ),
    Mutant(
        "chance: TF32 and bfloat16",
        ((PERMUTED, "    with FullFloat32(Ks.device.type):\n", "    if True:\n"),),
        OF_PERMUTED,
        survives="this CPU may have no bfloat16 products",
    ),
    Mutant("chance: traces", ((MOMENTS, "A = matrix - trace / (n - 1) * (eye - 1 / n)", "A = matrix"),), OF_PERMUTED),
    Mutant("chance: a coefficient", ((MOMENTS, "26 * n - 22", "26 * n - 21"),), OF_PERMUTED),
    Mutant(
        "chance: the diagonals' variance",
        ((MOMENTS, "2 * (n - 1) * T2, n * (n + 1)", "2 * n * T2, n * (n + 1)"),),
        OF_PERMUTED,
    ),
    Mutant(
        "chance: the observed order left out",
        ((CALIBRATION, "torch.cat([torch.arange(len(Xs[0]))[None], orders])", "orders"),),
        OF_CALIBRATION,
    ),
    Mutant("chance: no search", ((CALIBRATION, "flatten(1).amax(dim=1)", "flatten(1)[:, 0]"),), OF_CALIBRATION),
    Mutant(
        "chance: the diagonal is the best", ((CALIBRATION, "considered.fill_diagonal_(False)", "pass"),), OF_CALIBRATION
    ),
    Mutant("chance: distances", ((CALIBRATION, "sign = -1.0 if", "sign = 1.0 if"),), OF_CALIBRATION),
    Mutant("chance: Bonferroni", ((CALIBRATION, "(p_values * num_pairs)", "p_values"),), OF_CALIBRATION),
    # What a recording leaves behind.
    Mutant(
        "random states are not restored",
        (
            (
                LOOPS,
                "        with isolate_rng(), _hooks_of(trainer, callback):",
                "        with _hooks_of(trainer, callback):",
            ),
            ("samples/drawing.py", "        stack.enter_context(preserved_rng())\n", ""),
        ),
        zoo("GlobalGenerators", "Shuffled", "DropoutLeftOn"),
    ),
    Mutant(
        "random states are restored for the data alone",
        (
            (
                LOOPS,
                "        with isolate_rng(), _hooks_of(trainer, callback):",
                "        with _hooks_of(trainer, callback):",
            ),
        ),
        zoo("GlobalGenerators", "Shuffled", "DropoutLeftOn"),
        survives="`unread`, which the same run is in, restores them as well.",
    ),
    Mutant(
        "generators that modules hold are not restored",
        ((PRESERVED, "    with preserved_generators(objects):\n", "    with preserved_generators([]):\n"),),
        zoo("TorchGenerator", "NumpyGenerator", "PythonGenerator"),
    ),
    Mutant(
        "generators that samplers hold are not restored",
        (
            (
                "samples/drawing.py",
                "    with untouched(*holders, *(sampler for sampler in samplers if sampler is not None)):",
                "    with untouched(*holders):",
            ),
        ),
        zoo("ShuffledByAGenerator"),
    ),
    Mutant(
        "attributes of modules are not restored",
        ((PRESERVED, "    undo.append(put_back)\n    return list(kept.values())", "    return list(kept.values())"),),
        zoo("CountsItsCalls", "MetricsByHand"),
    ),
    Mutant(
        "buffers are not restored",
        (
            (
                PRESERVED,
                "        if buffer is not None:\n            _keep_content(buffer, undo)\n",
                "        if buffer is not None:\n",
            ),
        ),
        ("tests/tracking/test_adapters.py", "-k", "put_back"),
    ),
    Mutant(
        "submodules that are added stay",
        ((PRESERVED, "    for name in modules.keys() - before.keys():\n        del modules[name]\n", ""),),
        zoo("MetricsTrackedByEpoch"),
    ),
    Mutant(
        "logged results are not reset",
        (
            (LOOPS, "    connector.reset_results()  # of this loop: a training has logged, too\n", ""),
            (
                LOOPS,
                "        connector.reset_results()\n        trainer.state.stage = stage",
                "        trainer.state.stage = stage",
            ),
        ),
        zoo("MetricsThatAreLogged", "StoppedEarly"),
        survives="Lightning resets them at the end of each evaluation; this is for one that fails",
    ),
    Mutant(
        "results of the training are reset in place of the validation's",
        (
            (
                LOOPS,
                "    stage = trainer.state.stage\n    if not trainer.testing",
                "    connector.reset_results()\n    stage = trainer.state.stage\n    if not trainer.testing",
            ),
        ),
        zoo("WeightsLoadedByACallbackThatLogs"),
    ),
    Mutant(
        "logged metrics of before are lost",
        (
            (
                LOOPS,
                "        trainer.state.stage = stage\n        vars(connector).update(connected)\n",
                "        trainer.state.stage = stage\n",
            ),
        ),
        ("tests/tracking/test_loops.py", "-k", "logged_before"),
    ),
    Mutant(
        "loggers are reached",
        (
            (
                LOOPS,
                "    trainer.loggers, loop.verbose = [_SilentLogger(logger) for logger in loggers], False\n",
                "    loop.verbose = False\n",
            ),
        ),
        zoo("LooksAtItsTrainer"),
    ),
    Mutant(
        "all callbacks' hooks are called",
        (
            (
                LOOPS,
                " if each is callback or (others and _may_change_batches(each))]",
                "]",
            ),
        ),
        zoo("Plain", "StoppedEarly"),
    ),
    Mutant(
        "no callback may change the batches",
        ((LOOPS, "each is callback or (others and _may_change_batches(each))]", "each is callback]"),),
        zoo("BatchesChangedByACallback"),
    ),
    Mutant(
        "the user is asked for dataloaders twice",
        ((LOOPS, "        is_set_up = True\n\n    loop.setup_data", "\n    loop.setup_data"),),
        ("tests/tracking/test_loops.py", "-k", "asks_for_data_once"),
    ),
    Mutant(
        "the loop's progress is not put back",
        ((LOOPS, "        vars(loop).update(of_loop)\n", ""),),
        ("tests/tracking/test_logging.py", "-k", "by_itself"),
    ),
    Mutant(
        "the loop goes on where a checkpoint was written",
        ((LOOPS, "        batch_progress=type(loop.batch_progress)(), _restarting=False, _seen", "        _seen"),),
        ("tests/tracking/test_resume.py", "-k", "middle"),
    ),
    # Weights.
    Mutant(
        "weights are not put back after an exchange",
        (
            (
                "reference/exchange.py",
                "            self._copy(self._before, are_whole=False)\n            self._before = {}",
                "            self._before = {}",
            ),
        ),
        ("tests/tracking/test_training.py", "-k", "leaves_the_weights or itself_again"),
    ),
    Mutant(
        "weights are put back at the end of the run alone",
        (("tracking/recorder.py", "                self._pass.finish()\n", ""),),
        ("tests/tracking/test_training.py", "-k", "leaves_the_weights or itself_again"),
    ),
    Mutant(
        "buffers are not exchanged",
        (
            (
                "reference/places.py",
                "    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}\n    return {",
                "    tensors = dict(module.named_parameters())\n    return {",
            ),
        ),
        (
            "tests/reference/test_reference.py",
            "tests/tracking/test_training.py",
            "-k",
            "kinds_of_reference or stage_test_alone",
        ),
    ),
    Mutant(
        "a test is compared with the weights that the model has by then",
        (
            (
                "reference/storage.py",
                "        return None if self.are_live else self.weights\n",
                "        return None\n",
            ),
        ),
        ("tests/tracking/test_training.py", "-k", "stage_test or best_weights or hooks_load"),
    ),
    Mutant(
        "weights that hooks load are not noticed",
        (("reference/storage.py", "        return bool(self._moved(module))", "        return False"),),
        ("tests/tracking/test_training.py", "-k", "hooks_load or running_statistics_that"),
    ),
    Mutant(
        "weights that hooks change are not put back",
        (("tracking/recorder.py", "                    self.start.put_back(trainer.lightning_module)\n", ""),),
        zoo("WeightsRoundedByAHook"),
    ),
    Mutant(
        "frozen weights that feed the reference are not watched",
        (
            (
                "reference/running.py",
                "            self._moved[name] = self._fed[name].moved()",
                "            self._moved[name] = None",
            ),
        ),
        ("tests/tracking/test_misuse.py", "-k", "frozen_encoder"),
    ),
    Mutant(
        "adapters unfreeze what was frozen",
        (("reference/adapters.py", "            parameter.requires_grad_(requires_grad)\n", "            pass\n"),),
        ("tests/tracking/test_adapters.py",),
    ),
    # Which samples.
    Mutant(
        "samples are matched by position",
        (
            (
                RECORDED,
                "        positions = index.find(keys[:, :2])\n",
                "        positions = torch.arange(len(keys))\n",
            ),
        ),
        zoo("Shuffled"),
    ),
    Mutant(
        "the hash covers the first 16 bytes of a row",
        (("samples/hashing.py", "xxh3_128_digest(row)])", "xxh3_128_digest(row[:16])])"),),
        ("tests/samples/test_hashing.py",),
    ),
    Mutant(
        "the hash knows no dtype",
        (("samples/hashing.py", 'f"{kind} {tensor.dtype} {tuple(shape)}"', 'f"{kind} {tuple(shape)}"'),),
        ("tests/samples/test_hashing.py",),
    ),
    Mutant(
        "samples count twice on ranks that share them",
        (
            (
                "samples/shares.py",
                "        return self._rank + self._num_ranks * (start + np.arange(len(indices))) < self._end",
                "        return np.ones(len(indices), dtype=bool)",
            ),
        ),
        ("tests/samples/test_shares.py", "tests/tracking/test_ranks.py", "-k", "counts_once or scores_of_one_process"),
    ),
    Mutant(
        "ranks do not settle which samples count",
        (
            (
                "samples/counting.py",
                "            if place is not None and (state == COUNTS or rank < ranks.rank):",
                "            if False:",
            ),
        ),
        ("tests/samples/test_samples.py",),
    ),
    Mutant(
        "rows that another rank has are not found",
        (
            (
                "parallel/rows_of_ranks.py",
                "    return ranks < group.size, answer",
                "    return (ranks < group.size) & False, answer",
            ),
        ),
        ("tests/tracking/test_ranks.py", "-k", "other_ranks"),
    ),
    Mutant(
        "batches of the minibatch estimator are mixed",
        (
            (
                "tracking/pairing.py",
                "                unknown |= found  # a batch stays together\n                found =",
                "                _ =",
            ),
        ),
        ("tests/tracking/test_ranks.py", "-k", "other_ranks"),
    ),
    Mutant(
        "ranks without a file know of no recording",
        (("reference/storage.py", "        empty.expect(trainer.strategy.broadcast(list(empty.dataloaders)))\n", ""),),
        ("tests/tracking/test_resume.py", "-k", "another_number_of_ranks", "-m", "slow or not slow"),
    ),
    Mutant(
        "the sampler's indices are taken for all batches of its own size",
        (("samples/samples.py", "        if rows.votes and n not in rows.votes:\n            return None\n", ""),),
        ("tests/samples/test_sampler_indices.py", "tests/samples/test_samples.py"),
    ),
    # Data that are not what they were.
    Mutant(
        "data that differ at every pass are recorded",
        (
            (
                "tracking/recorder.py",
                "        is_fixed = not self._samples.changing(dataloaders)\n",
                "        is_fixed = True\n",
            ),
        ),
        (
            "tests/tracking/test_misuse.py",
            "tests/tracking/test_resume.py",
            "-k",
            "can_not_be_copied or differ_at_every_pass",
        ),
    ),
    Mutant(
        "a trial is stored as the recording",
        (("tracking/recorder.py", "                model.forget_recording(stage)", "                pass"),),
        ("tests/tracking/test_resume.py", "-k", "differ_at_every_pass"),
    ),
    Mutant(
        "batches that have changed are compared",
        (
            (
                RECORDED,
                '        return known is not None and known.content not in ("", samples.content_key())',
                "        return False",
            ),
        ),
        ("tests/tracking/test_misuse.py", "-k", "next_epoch"),
    ),
    Mutant(
        "a shuffled dataset has its first fingerprint for good",
        (
            (
                "samples/samples.py",
                "        elif id(loader) not in self._data and _may_shuffle(loader):",
                "        elif False:",
            ),
        ),
        ("tests/tracking/test_misuse.py", "-k", "next_epoch"),
    ),
    Mutant(
        "steps that pass something else are compared",
        ((RECORDED, "        return known is not None and known.passed != passed", "        return False"),),
        ("tests/tracking/test_inputs.py",),
    ),
    Mutant(
        "features that depend on the batch are not noticed",
        (("tracking/other_batches.py", "        if name is not None and score < _LOWEST", "        if False"),),
        ("tests/tracking/test_other_batches.py",),
    ),
    Mutant(
        "a step that runs once more is logged",
        (
            (LOOPS, "    loop._results = type(results)(training=False)\n", ""),
            (
                LOOPS,
                "    loop._results.batch, loop._results.dataloader_idx = results.batch, results.dataloader_idx\n",
                "",
            ),
        ),
        zoo("ShuffledWithStatisticsOfTheBatch"),
    ),
    Mutant(
        "a model that draws is not noticed",
        (
            (
                "tracking/recording_pass.py",
                "        if name is not None:\n            warn(",
                "        if False:\n            warn(",
            ),
        ),
        zoo("GlobalGenerators"),
    ),
    # Files.
    Mutant(
        "the digest of a file is not looked at",
        (("checkpoints/tensor_files.py", ' and about.get("sha256") == _digest(tensors, notes)', ""),),
        ("tests/checkpoints/test_tensor_files.py", "tests/tracking/test_resume.py", "-k", "damage or altered"),
    ),
    Mutant(
        "files of another training are taken",
        (
            (
                "checkpoints/tensor_files.py",
                " and all(found.notes.get(key) == value for key, value in notes.items())",
                "",
            ),
        ),
        (
            "tests/checkpoints/test_tensor_files.py",
            "tests/tracking/test_resume.py",
            "-k",
            "sound_file or another_training",
        ),
    ),
    Mutant(
        "a name may be a path",
        (
            (
                "checkpoints/tensor_files.py",
                '    if not name or "/" in name or "\\\\" in name or name.startswith("."):',
                "    if not name:",
            ),
        ),
        ("tests/checkpoints/test_tensor_files.py",),
    ),
    # Numbers.
    Mutant(
        "the pivot of stored features is left out",
        (
            (
                "reference/feature_store.py",
                "        return self.offsets(positions).to(device, torch.float64) + self._pivot.to(device)",
                "        return self.offsets(positions).to(device, torch.float64)",
            ),
        ),
        ("tests/reference/test_feature_store.py",),
    ),
    Mutant(
        "features are stored in half precision, whatever it costs",
        (("reference/rounding.py", "MAX_ROUNDING_COST = 1e-4", "MAX_ROUNDING_COST = 1.0"),),
        ("tests/reference", "tests/tracking/test_training.py", "-k", "bits or rounding or not_rounded"),
    ),
    Mutant(
        "recentring leaves out a term",
        (
            (
                "functional/moments.py",
                "        aa + 4 * (ax @ d) + 2 * dd * a + 4 * (d_xx @ d) + n * dd * dd,",
                "        aa + 4 * (ax @ d) + 2 * dd * a + n * dd * dd,",
            ),
        ),
        ("tests/functional/test_moments.py",),
    ),
    Mutant(
        "pairs of tiles count once",
        (("functional/sample_space.py", "            sums += (1 if t == u else 2) *", "            sums += 1 *"),),
        ("tests/functional/test_sample_space.py", "tests/statistics/test_layer.py"),
    ),
    Mutant(
        "ranks do not agree on the mean",
        (
            (
                "statistics/agreement.py",
                "    if group.size == 1:\n        return  # the mean",
                "    if True:\n        return  # the mean",
            ),
        ),
        ("tests/statistics/test_layer.py",),
    ),
    Mutant(
        "NaN in the recording is not explained",
        (("tracking/explanations.py", "            if not store.is_finite:", "            if False:"),),
        ("tests/tracking/test_misuse.py", "-k", "nan_in_the_recording"),
    ),
    Mutant(
        "a layer that has not run is left out in silence",
        ((TRACKER, "            if name in problems and not self._ran_once:", "            if False:"),),
        ("tests/tracking/test_misuse.py", "-k", "sanity_check or without_features or later_alone"),
    ),
    Mutant(
        "samples that are left out are counted on the first rank alone",
        (("tracking/pairing.py", "(numbers,) = group.add_up([torch.tensor(mine", "(numbers,) = ([torch.tensor(mine"),),
        ("tests/tracking/test_ranks.py", "-k", "one_rank_alone or left_out"),
    ),
    # What differs between checkpoints.
    Mutant(
        "the relative change is that of the new weight",
        (
            (
                "functional/update_size.py",
                "        base += torch.dot(w0, w0)\n",
                "        base += parts[0].square().sum()\n",
            ),
        ),
        ("tests/functional/test_update_size.py",),
    ),
    Mutant(
        "the cosine is of weights in place of updates",
        (("functional/update_size.py", "[part - w0 for part in parts]", "list(parts)"),),
        ("tests/functional/test_update_size.py",),
    ),
    Mutant(
        "the effective rank is by the squares",
        (
            (
                "functional/update_spectrum.py",
                "torch.special.entr(s / s.sum())",
                "torch.special.entr(s**2 / (s**2).sum())",
            ),
        ),
        ("tests/functional/test_update_spectrum.py",),
    ),
    Mutant(
        "rounding adds directions to an update of low rank",
        (("functional/update_spectrum.py", "eigenvalues > noise", "eigenvalues > 0"),),
        ("tests/functional/test_update_spectrum.py",),
    ),
    Mutant(
        "all tensors of a comparison stay in memory",
        (
            (
                "editing/difference.py",
                "        weights = [self._read(self._W0, found[0].base_name)",
                "        weights = self.__dict__.setdefault(found[0].base_name, [])\n"
                "        weights += [self._read(self._W0, found[0].base_name)",
            ),
            (
                "editing/difference.py",
                "        W1, record = weights.pop(1), both.record",
                "        W1, record = weights[position], both.record",
            ),
            ("editing/difference.py", "            weights.clear()\n", "            pass\n"),
        ),
        ("tests/editing/test_difference.py", "-k", "memory", "-m", "slow"),
    ),
    Mutant(
        "weights that are tied in the file alone count as tied",
        (
            (
                "editing/difference.py",
                "if first != plain and self._is_one_in_base(base_name, first):",
                "if first != plain:",
            ),
        ),
        ("tests/editing/test_difference.py",),
    ),
    # Edits of weights.
    Mutant(
        "an edit: the large eigenvalues are not lowered",
        ((F32, "if number:\n        symmetric", "if not number:\n        symmetric"),),
        SPLITS,
    ),
    Mutant(
        "an edit: directions found in float64 are not put in",
        ((F32, "leading.T.to(torch.float32)]", "torch.zeros_like(leading.T, dtype=torch.float32)]"),),
        SPLITS,
    ),
    Mutant(
        "an edit: it is looked for leading directions in one step alone",
        (
            (F32, "if values[number] <= _ALIKE * values[-1]:", "if True:"),
            (F32, "        if step == 1:", "        if False:"),
        ),
        SPLITS,
    ),
    Mutant(
        "an edit: the wrong eigenvectors of those that are asked for",
        (("functional/lapack.py", "self._vectors[first:last].clone()", "self._vectors[: last - first].clone()"),),
        ("tests/functional/test_lapack.py",),
    ),
    Mutant(
        "an edit: a Gram matrix of the transpose",
        (("functional/lapack.py", '"N" if by_rows else "T"', '"T" if by_rows else "N"'),),
        ("tests/functional/test_lapack.py",),
    ),
    Mutant(
        "an edit: LAPACK's complaints are not read",
        (("functional/lapack.py", "    if says:\n", "    if False:\n"),),
        ("tests/functional/test_lapack.py",),
    ),
    Mutant(
        "an edit: what float32 could do to the rank is not asked",
        (
            (
                "functional/spectral.py",
                'if RULES[rule] == "energy":\n        is_doubtful = is_energy',
                "if True:\n        is_doubtful = False and is_energy",
            ),
        ),
        SPLITS,
    ),
    Mutant(
        "an edit: a rank that float32 can't tell stays that of float32",
        (("functional/spectral.py", "        k = split_rank(s, rule, R)\n    directions", "    directions"),),
        SPLITS,
    ),
    Mutant(
        "an edit: a later chunk's products in place of the sum",
        (("functional/update_gram.py", "gram.add_(product) if start else", "gram.copy_(product) if start else"),),
        ("tests/functional/test_update_gram.py",),
    ),
    Mutant(
        "an edit: the two parts' weights the other way round",
        (("functional/update_parts.py", "alpha=inside - outside", "alpha=outside - inside"),),
        ("tests/functional/test_update_parts.py",),
    ),
    Mutant(
        "an edit: rows of the last block are left out",
        (
            (
                "functional/update_gram.py",
                "for start in range(0, len(part), step):",
                "for start in range(0, len(part) - 1, step):",
            ),
        ),
        ("tests/functional/test_update_parts.py",),
    ),
    Mutant(
        "an edit: neighbours are not told apart",
        (
            (
                F32,
                "told_apart = (basis @ (turn[:, : last - k] if complement else turn[:, last - k :])).T",
                "told_apart = (basis[:, : last - k] if complement else basis[:, last - k :]).T",
            ),
        ),
        SPLITS,
    ),
    Mutant(
        "an edit: weights that float32 has no room for",
        (("functional/spectral.py", "_TINY < total < 1 / _TINY", "True"),),
        SPLITS,
    ),
    Mutant(
        "an edit: a threshold of the mean, not the median",
        ((EDITS, "s.quantile(0.5)", "s.mean()"),),
        FUNCTIONS,
    ),
    Mutant(
        "an edit: what is dropped is not rescaled",
        ((EDITS, "alpha=1 / (1 - drop)", "alpha=1.0"),),
        FUNCTIONS,
    ),
    Mutant(
        "an edit: shrinking by the energy, not its root",
        (("functional/spectral.py", "return math.sqrt(self.lambda_high", "return (self.lambda_high"),),
        FUNCTIONS,
    ),
    Mutant(
        "an edit: the smallest elements are kept",
        ((EDITS, "torch.topk(delta.abs(), kept, sorted=False)", "torch.topk(-delta.abs(), kept, sorted=False)"),),
        FUNCTIONS,
    ),
    Mutant(
        "an edit: seeds are the same for all weights",
        (("editing/edits.py", "+ zlib.crc32(place.name.encode())", ""),),
        BY_NAME,
    ),
    # A study.
    Mutant(
        "study: what is left of both counts twice",
        ((STATISTICS, "max(self.V_models - self.V_left, 0.0)", "self.V_models"),),
        OF_STATISTICS,
    ),
    Mutant(
        "study: models are not drawn",
        ((STATISTICS, "return h_units, h_models, max(h_models, h_both) if", "return h_units, h_models, h_units if"),),
        OF_STATISTICS,
    ),
    Mutant(
        "study: samples of one original count apart",
        ((STATISTICS, "    if units is None:\n", "    if True:\n"),),
        OF_STATISTICS,
    ),
    Mutant(
        "study: test sets count by their samples",
        ((STATISTICS, "minlength=G) / (len(given) * len(d))", "minlength=G) / sum(each.shape[1] for each in given)"),),
        OF_STATISTICS,
    ),
    Mutant("study: no correction", ((STATISTICS, "(len(order) - place) * p_values", "p_values"),), OF_STATISTICS),
    Mutant("study: a point beats its equal", ((STATISTICS, "and (x > a or y > b)", ""),), OF_STATISTICS),
    Mutant("study: a trade is called more", ((SUMMARY, "mean * shifted.mean < 0", "mean * 0 < 0"),), OF_SUMMARY),
    Mutant("study: enlarged updates are judged", ((SUMMARY, "<= _LARGER]", "< 9]"),), OF_SUMMARY),
    Mutant("study: less is called more", ((SUMMARY, "if shifted.mean > 0 else", "if True else"),), OF_SUMMARY),
    Mutant(
        "study: the null has half the size",
        (("study/edits.py", "alpha=sizes[0] / sizes[1])", "alpha=0.5 * sizes[0] / sizes[1])"),),
        OF_STUDY_EDITS,
    ),
    Mutant(
        "study: every edit is a shrinkage",
        (("study/edits.py", "is_same = is_same and _distance(W, null[name]) <= rounding", "pass"),),
        OF_STUDY_EDITS,
    ),
    Mutant(
        "study: a checkpoint that was written anew is not noticed",
        (("study/study.py", "load_result(path).identity == checkpoint.identity()", "True"),),
        OF_STUDY,
    ),
    Mutant(
        "study: a bad checkpoint ends it",
        (("study/study.py", "except (ValueError, OSError) as error:", "except KeyError as error:"),),
        OF_STUDY,
    ),
    Mutant(
        "study: other samples pass",
        (("study/storage.py", "or a.digest != b.digest", ""),),
        OF_STUDY,
    ),
    Mutant(
        "study: NaN passes",
        (("study/evaluation.py", "            check_finite(name, None, value)\n", "            pass\n"),),
        OF_STUDY,
    ),
    Mutant(
        "an edit: an excluded parameter is edited",
        (
            (
                "editing/settings.py",
                'self._matches("keep_finetuned", name) or self._matches("exclude", name)',
                'self._matches("keep_finetuned", name)',
            ),
        ),
        BY_NAME,
    ),
    Mutant(
        "an edit: a parameter kept as pretrained is fine-tuned",
        (
            (
                "editing/parameter.py",
                'return record["reason"] in (None, AS_PRETRAINED)',
                'return record["reason"] is None',
            ),
        ),
        BY_NAME,
    ),
    Mutant(
        "an edit: one factor for all is that of the sum, not of squares",
        (("editing/shrinking.py", "return math.sqrt(kept / all_of_it)", "return kept / all_of_it"),),
        BY_NAME,
    ),
    Mutant(
        "an edit: an address is taken for the memory",
        (
            (
                "reference/places.py",
                "storage is not None and storage is other._storage() and self._where",
                "self._where",
            ),
        ),
        ("tests/reference/test_marks.py",),
    ),
    # Packed sequences.
    Mutant(
        "packed images are those of the samples in reverse",
        (
            (
                "features/packed.py",
                "lengths = [sum(next(parts) for _ in range(count)) for count in packed.num_parts]",
                "lengths = [sum(next(parts) for _ in range(count)) for count in packed.num_parts[::-1]]",
            ),
        ),
        ("tests/tracking/test_packed.py",),
    ),
    Mutant(
        "modules are not told of what they are called with as one sequence",
        (
            (
                "features/extractor.py",
                "            self._pooling.packed.note(name, target, arguments, outermost=outermost)\n",
                "",
            ),
        ),
        ("tests/tracking/test_packed.py",),
    ),
    Mutant(
        "a sample without rows has the mean over none",
        (("features/packed.py", "            if 0 in lengths:\n", "            if -1 in lengths:\n"),),
        ("tests/features/test_packed.py",),
    ),
    Mutant(
        "a sample is left out of the trace once, not twice",
        ((JACKKNIFE, "2 * (m - 2) / (m - 3) * rows", "(m - 2) / (m - 3) * rows"),),
        OF_JACKKNIFE,
    ),
    Mutant(
        "a sample's row counts, and not what crosses it",
        ((JACKKNIFE, "(m - 2) / (m - 3) * rows", "rows"),),
        OF_JACKKNIFE,
    ),
    Mutant(
        "single samples are in the variance of pairs",
        ((JACKKNIFE, "- 2 / (m - 2) * rows", "- 0 * rows"),),
        OF_JACKKNIFE,
    ),
    Mutant("pairs are not as many", ((JACKKNIFE, " * (m * (m - 3))\n", "\n"),), OF_JACKKNIFE),
    Mutant(
        "a part knows the variance of all",
        ((INTERVALS, "(1 / m - 1 / n).clamp(min=0)", "(0 / m - 0 / n).clamp(min=0)"),),
        OF_JACKKNIFE,
    ),
    Mutant(
        "another reference's Gram matrices are taken for this one's",
        (("statistics/sampled_layers.py", "known is None or not all(", "known is None or not any("),),
        ("tests/statistics/test_sampled_layers.py",),
    ),
    Mutant(
        "the part of pairs stays in that of single samples",
        ((INTERVALS, "- 2 * (pair_error / (1 - T)).square()", ""),),
        OF_JACKKNIFE,
    ),
    Mutant("an interval of a part is that of all", ((INTERVALS, "* (m / n)\n    q", "\n    q"),), OF_JACKKNIFE),
    Mutant("pairs fall as single samples do", ((INTERVALS, "* (m / n) ** 2", "* (m / n)"),), OF_JACKKNIFE),
    Mutant(
        "the variance is that at the estimate",
        ((INTERVALS, "c1 * middle.clamp", "c1 * cka.clamp"),),
        OF_JACKKNIFE,
    ),
    Mutant(
        "a normal quantile", ((INTERVALS, ".clamp(2.5, m - 1).nan_to_num(m - 1)", ".clamp(1e9, 1e9)"),), OF_JACKKNIFE
    ),
    Mutant(
        "changes are not paired",
        ((INTERVALS, "difference = without[0] - without[1]", "difference = without[0]"),),
        OF_JACKKNIFE,
    ),
    Mutant(
        "each rank draws by itself",
        (
            (
                "statistics/sampled_layers.py",
                "order[: min(int((hashes != NO_HASH).sum()), size)]",
                "order[: int((hashes != NO_HASH).sum())]",
            ),
        ),
        ("tests/statistics/test_layer.py", "-k", "draw"),
    ),
    Mutant(
        "the last samples are drawn, not the same ones",
        (("statistics/subsample.py", "(self.hashes < limit)", "(self.hashes > -limit)"),),
        ("tests/statistics/test_layer.py", "-k", "draw"),
    ),
    Mutant(
        "a resumed training has forgotten its last evaluation",
        (("tracking/callback.py", 'self._intervals.load(state_dict.get("intervals", {}))', "pass"),),
        ("tests/tracking/test_intervals.py",),
    ),
    Mutant(
        "changes of other samples",
        (
            (
                "tracking/intervals.py",
                "return now.n == before.n and torch.equal(now.hashes, before.hashes)",
                "return len(now.hashes) == len(before.hashes) or True",
            ),
        ),
        ("tests/tracking/test_intervals.py",),
    ),
    Mutant(
        "the reference does not move",
        ((TRACKER, "self.recording.dataloaders[dataloader] = recorded", "pass"),),
        ("tests/tracking/test_moving.py",),
    ),
    Mutant(
        "every evaluation is the best one",
        (("tracking/moving.py", "broadcast(value < self._best)", "broadcast(True)"),),
        ("tests/tracking/test_moving.py",),
    ),
]


def copied(folder: Path) -> Path:
    """Copy the tree; return where it is."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, tests: Sequence[str]) -> int | None:
    """Return what pytest returns, 0 if all is well and 1 if a test has failed; None if it was stopped for its time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def result(folder: Path, mutant: Mutant) -> str:
    """Return "killed", "survived", or what is wrong with the mutant; the copy is as it was afterwards."""
    originals = {folder / "lit_cka" / file: (folder / "lit_cka" / file).read_text() for file, _, _ in mutant.edits}
    try:
        for file, old, new in mutant.edits:
            path = folder / "lit_cka" / file
            text = path.read_text()
            if text.count(old) != 1:
                return f"broken: {text.count(old)} times in {file}: {old!r}"
            path.write_text(text.replace(old, new))
        code = run_tests(folder, mutant.tests)
    finally:
        for path, text in originals.items():
            path.write_text(text)
    return {0: "survived", 1: "killed", None: "killed (hangs)"}.get(code, f"broken: pytest ended with {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only is None or options.only in mutant.name]
    if options.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    unexpected = 0
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        for tests in sorted({mutant.tests for mutant in chosen}):
            if run_tests(folder, tests) != 0:
                print(f"The tests fail without any change: {' '.join(tests)}")
                return 1
        for mutant in chosen:
            start = time.monotonic()
            found = result(folder, mutant)
            is_expected = found == "survived" if mutant.survives else found.startswith("killed")
            unexpected += not is_expected
            why = f" ({mutant.survives})" if mutant.survives else ""
            mark = "" if is_expected else "  <-- not as expected"
            print(f"{found:9} {time.monotonic() - start:5.0f} s  {mutant.name}{why}{mark}", flush=True)
    print(f"{len(chosen)} changes, {unexpected} not as expected")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
