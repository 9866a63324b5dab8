"""Fine-tune a model and watch its representations: `python train.py fit --config configs/digits.yaml`.

A LightningCLI with `fit`, `validate`, `test` and `predict`. Any LightningModule and LightningDataModule that Python
can import will do, by its class path; every option can be overridden behind the config.
"""

from __future__ import annotations

import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from lit_cka import CKACallback


class TrainCLI(LightningCLI):
    """LightningCLI that can train another config first, and says at the end of `fit` what came out and where it is."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--pretrain",
            type=str | None,
            default=None,
            help="Config to `fit` first. Its weights, at `save_weights` there, are for `model.checkpoint` here. "
            "Skipped if they exist already.",
        )
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads for torch. Small models are fastest on one.",
        )
        parser.add_argument(
            "--save_weights", type=str | None, default=None, help="Write the weights here at the end of `fit`."
        )

    def _option(self, name: str) -> Any:
        return self.config[self.subcommand].get(name)

    def before_instantiate_classes(self) -> None:
        if self._option("num_threads") is not None:
            torch.set_num_threads(self._option("num_threads"))
        pretrain = self._option("pretrain")
        if self.subcommand != "fit" or pretrain is None:
            return
        weights = weights_path(pretrain)
        if not Path(weights).is_file():
            Console().rule(f"First: {pretrain}")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                main(["fit", "--config", pretrain])
            Console().rule("Now the fine-tuning")
            # The first training has used random numbers: this one starts from its own seed again.
            pl.seed_everything(self._option("seed_everything"), workers=True)

    def after_fit(self) -> None:
        if self._option("save_weights") is not None:
            # Through the trainer, so that sharded strategies gather the weights; atomically.
            path = Path(self._option("save_weights"))
            self.trainer.save_checkpoint(path.with_suffix(".partial"), weights_only=True)
            if self.trainer.is_global_zero:
                os.replace(path.with_suffix(".partial"), path)
        self._report()

    @rank_zero_only
    def _report(self) -> None:
        console = Console(soft_wrap=True, highlight=False)
        trackers = [callback for callback in self.trainer.callbacks if isinstance(callback, CKACallback)]
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items() if "acc" in name}
        for name, value in metrics.items():
            console.print(f"{name}: {value:.3f}")
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        for tracker in trackers:
            if tracker.history:
                tracker.save(folder / tracker.prefix)
                console.print(f"CKA of each layer over time: {folder / tracker.prefix / 'cka_heatmap.png'}")
        for logger in loggers:
            console.print(f"TensorBoard log: {logger.log_dir}")
            runner = "uv run " if os.environ.get("UV") else ""
            console.print(f"Look at it with: {runner}tensorboard --logdir {shlex.quote(logger.save_dir or '.')}")


def weights_path(config: str) -> str:
    """Where the training that a config describes writes its weights."""
    import yaml

    path = yaml.safe_load(Path(config).read_text()).get("save_weights")
    if not path:
        raise ValueError(f"Expected {config!r} to have `save_weights`, since it is to be trained first.")
    return str(path)


def main(args: ArgsType = None) -> TrainCLI:
    """Run the command line with `args`, by default the process's."""
    torch.set_float32_matmul_precision("high")
    return TrainCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
