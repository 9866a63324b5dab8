"""`lit-cka COMMAND`, and `python -m lit_cka COMMAND`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import lit_cka
from lit_cka.commands.messages import USAGE, fail, suggestion
from lit_cka.commands.stopping import stopping_in_a_line

# What a command does, and its module in lit_cka.commands.
COMMANDS = {
    "fit": ("fine-tune a model and watch its representations", "training"),
    "validate": ("validate a model, tracked as in `fit`", "training"),
    "test": ("test a model, tracked as in `fit`", "training"),
    "predict": ("predict with a model", "training"),
    "compare": ("the matrix of all layers of two models, with intervals and p-values", "compare"),
    "plan": ("how many samples a comparison takes, from a pilot", "plan"),
    "probe": ("where fine-tuning changed a model, and whether linear probes gained", "probe"),
    "project": ("all layers of several models on several datasets in one interactive map", "project"),
    "monosoup": ("edit a fine-tuned model in memory, evaluate all variants, draw what came of it", "monosoup"),
    "study": ("many checkpoints, edits and test sets in one run: what an edit gains, and beyond shrinkage", "study"),
    "edit": ("edit checkpoint files into a checkpoint file, without any model code", "edit"),
    "diff": ("what differs between checkpoint files, tensor by tensor, without any model code", "diff"),
    "configs": ("list the configs that ship, print one, or copy it", "configs"),
}


def main() -> None:
    """Run the process's command line."""
    sys.path.append(os.getcwd())  # for the user's own classes, which an installed command would not find; last
    run(sys.argv[1:])


def run(args: list[str]) -> object:
    """Run a command line, and return what the command made."""
    command = args[0] if args else "--help"
    if command in ("-h", "--help", "--version"):
        print(f"lit-cka {lit_cka.__version__}" if command == "--version" else _help())
        sys.exit(0 if args else USAGE)
    if command not in COMMANDS:
        near = suggestion(command, COMMANDS)
        fail(f"Expected a command, but got {command!r}{near} `lit-cka --help` lists them.", USAGE)
    name = COMMANDS[command][1]
    with stopping_in_a_line("The same command goes on from there." if command in ("edit", "study") else ""):
        # Each command loads what it needs: `edit` no Lightning, say.
        module = import_module(f"lit_cka.commands.{name}")
        return module.main(args if name == "training" else args[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: lit-cka COMMAND [options]\n",
            "See what fine-tuning does to a model's representations, and edit the weights.\n",
            *(f"  {name:{width}}  {said}" for name, (said, _) in COMMANDS.items()),
            "\nlit-cka COMMAND --help shows a command's options, lit-cka --version the version.",
            "To begin with: lit-cka fit --config digits",
        ]
    )


if __name__ == "__main__":
    main()
