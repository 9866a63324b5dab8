"""`lit-cka fit`, `validate`, `test` and `predict`: a LightningCLI for any LightningModule and LightningDataModule."""

from __future__ import annotations

import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.commands.configs import find_config
from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.hub import offline_if_unreachable
from lit_cka.commands.messages import without_noise
from lit_cka.commands.parsing import Parser
from lit_cka.data.from_model import tokenizer_for
from lit_cka.files import file_name, partial_name, require_writable, written_whole
from lit_cka.tracking.callback import CKACallback

COMMANDS = {
    "fit": "Fine-tune a model and watch its representations. Any LightningModule and LightningDataModule will do.",
    "validate": "Validate a model, tracked as in `fit` if there is a `CKACallback` among the trainer's callbacks.",
    "test": "Test a model, tracked as in `fit` if there is a `CKACallback` among the trainer's callbacks.",
    "predict": "Predict with a model.",
}
# In place of what Lightning and jsonargparse say.
_HELP = {
    "model": "A LightningModule, by its class path. Its arguments: `--model.ARGUMENT`, and `--model.help CLASS` lists "
    "them.",
    "data": "A LightningDataModule, by its class path.",
    "optimizer": "In place of the module's own: a class of torch.optim, by its class path.",
    "lr_scheduler": "Behind `--optimizer`: a class of torch.optim.lr_scheduler.",
    "seed_everything": "The seed of all random numbers; true for a random one.",
    "ckpt_path": "A checkpoint to resume from, or to take the weights of: a path, `last` or `best`.",
    "weights_only": "Whether to refuse pickled objects in it.",
    "print_config": "Print all options as a config, and exit.",
}
# Of the Trainer's options, those of the short help.
_TRAINER = (
    "accelerator", "devices", "strategy", "precision", "max_epochs", "max_steps", "callbacks", "logger",
    "limit_train_batches", "limit_val_batches", "default_root_dir",
)  # fmt: skip


class TrainingParser(Parser, LightningArgumentParser):
    """The parser of a command that runs Lightning's Trainer."""


class TrainCLI(LightningCLI):
    """LightningCLI that can train another config first, and says at the end of `fit` what came out and where it is.

    Args:
        args: the command line, of which the first word is the command.
        options: is filled with the options, as a config would hold them, once they are known.
    """

    def __init__(self, args: list[str], options: dict[str, Any]) -> None:
        self._options = options
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={command: {"description": COMMANDS[command]} for command in COMMANDS},
            args=args,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        header = [f"{name}=={version(name)}" for name in ("lit-cka", "lightning")]  # of a saved config
        parser = TrainingParser(brief=_is_brief, dump_header=header, **kwargs)
        parser.add_command_options("-c")
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        for command, subparser in self._subcommand_parsers.items():
            assert isinstance(subparser, TrainingParser)
            subparser.prog = f"lit-cka {command}"
            subparser.example = f"lit-cka {command} --config digits"
            subparser.describe(_HELP)
        self.config = parser.parse_args(args)
        self._options.update(self.config[self.config.subcommand].as_dict())

    def _parse_ckpt_path(self) -> None:
        """Leave the model as the options describe it. Lightning would take its class and arguments from the checkpoint,
        which may be a stranger's, and with them names on a hub and paths.
        """

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
        parser.add_argument(
            "--save_pretrained",
            type=str | None,
            default=None,
            help="Write the model and its tokenizer to this new folder at the end of `fit`, for transformers to read.",
        )

    def _option(self, name: str) -> Any:
        return self.config[self.subcommand].get(name)

    def before_instantiate_classes(self) -> None:
        self._check_folders()
        offline_if_unreachable(self._options)
        if self._option("num_threads") is not None:
            torch.set_num_threads(self._option("num_threads"))
        pretrain = self._option("pretrain")
        if self.subcommand != "fit" or pretrain is None:
            return
        pretrain = find_config(pretrain)
        if not Path(weights_path(pretrain)).is_file():
            Console(markup=False).rule(f"First: {pretrain}")
            main(["fit", "--config", pretrain])
            Console().rule("Now the fine-tuning")
            # The first training has used random numbers: this one starts from its own seed again.
            pl.seed_everything(self._option("seed_everything"), workers=True)

    def _check_folders(self) -> None:
        """Raise a ValueError where something could not be written at the end of a training."""
        trainer = self._options["trainer"]
        require_writable("trainer.default_root_dir", trainer.get("default_root_dir") or ".")
        loggers = trainer.get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
            if isinstance(arguments.get("save_dir"), str):
                require_writable("trainer.logger.init_args.save_dir", arguments["save_dir"])
        if self._option("save_weights") is not None:
            require_writable("save_weights", str(Path(self._option("save_weights")).parent))
        folder = self._option("save_pretrained")
        if self.subcommand == "fit" and folder is not None:
            require_writable("save_pretrained", str(Path(folder).parent))
            if os.path.lexists(folder):
                raise ValueError(
                    f"Expected `save_pretrained` to be a new folder, but {folder!r} exists already. Remove it, or name "
                    "another."
                )

    def before_fit(self) -> None:
        if self._option("save_pretrained") is not None and not hasattr(self.model, "save_pretrained"):
            raise ValueError(
                f"Expected a model with a method `save_pretrained`, such as TextClassifier, but "
                f"{type(self.model).__name__} has none. `--save_weights` writes any model's weights."
            )

    def after_fit(self) -> None:
        if self._option("save_weights") is not None:
            path = Path(self._option("save_weights"))
            partial = self._checkpoint_beside(path)
            if self.trainer.is_global_zero:
                os.replace(partial, path)
        if self._option("save_pretrained") is not None:
            self._save_pretrained(Path(self._option("save_pretrained")))
        # Here, since Lightning asks all ranks for it.
        self._report(Path(self.trainer.log_dir or self.trainer.default_root_dir))

    def _checkpoint_beside(self, path: Path) -> Path:
        """Write a checkpoint through the trainer, so that sharded strategies gather the weights; returns its path."""
        partial = path.with_name(self.trainer.strategy.broadcast(partial_name(f"{path.stem}.ckpt")))
        self.trainer.save_checkpoint(partial, weights_only=True)
        return partial

    def _save_pretrained(self, folder: Path) -> None:
        checkpoint = self._checkpoint_beside(folder)
        if not self.trainer.is_global_zero:
            return
        try:
            with written_whole(folder, new=True) as partial:
                self.model.save_pretrained(partial, weights=load_state_dict(checkpoint))
                tokenizer_for(self.datamodule, getattr(self.datamodule, "tokenizer", None)).save_pretrained(partial)
        finally:
            checkpoint.unlink()

    @rank_zero_only
    def _report(self, folder: Path) -> None:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        trackers = [callback for callback in callbacks if isinstance(callback, CKACallback)]
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items() if "acc" in name}
        for name, value in metrics.items():
            console.print(f"{name}: {value:.3f}")
        if self._option("save_pretrained") is not None:
            console.print(f"Model and tokenizer: {self._option('save_pretrained')}")
        for tracker in trackers:
            if tracker.history and not tracker.options.log_figures:  # else it has done so itself
                path = folder / file_name(tracker.options.prefix)
                tracker.save(path)
                console.print(f"CKA of each layer over time: {path / 'cka_heatmap.png'}")
        for logger in loggers:
            console.print(f"TensorBoard log: {logger.log_dir}")
            runner = "uv run " if os.environ.get("UV") else ""
            console.print(f"Look at it with: {runner}tensorboard --logdir {shlex.quote(logger.save_dir or '.')}")


def weights_path(config: str) -> str:
    """Where the training that a config describes writes its weights."""
    import yaml

    content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    path = content.get("save_weights") if isinstance(content, dict) else None
    if not path:
        raise ValueError(f"Expected {config!r} to have `save_weights`, since it is to be trained first.")
    return str(path)


def main(args: list[str]) -> TrainCLI:
    """Run a command line, of which the first word is the command."""
    torch.set_float32_matmul_precision("high")
    without_noise()
    options: dict[str, Any] = {}
    with failing_in_a_line(options):
        cli = TrainCLI(args, options)
    return cli


def _is_brief(option: str) -> bool:
    group, _, name = option.rpartition(".")
    return name in _TRAINER if group == "trainer" else not group and name != "trainer"
