"""Look into trained models: `python analyze.py monosoup --config configs/monosoup_digits.yaml`.

compare    the matrix of all layers of two models, with intervals and p-values
probe      where fine-tuning changed a model, and whether linear probes gained
project    all layers of several models on several datasets in one interactive map
monosoup   edit a fine-tuned model in memory, evaluate all variants, draw what came of it
edit       edit checkpoint files into a checkpoint file, without any model code
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = ("compare", "probe", "project", "monosoup", "edit")


def main(args: list[str] | None = None) -> object:
    """Run the command line with `args`, by default the process's."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] not in COMMANDS:
        print(__doc__)
        print(f"usage: analyze.py {{{','.join(COMMANDS)}}} --help")
        if args and args[0] not in ("-h", "--help"):
            print(f"error: unknown command {args[0]!r}", file=sys.stderr)
        sys.exit(0 if args and args[0] in ("-h", "--help") else 2)
    # Each command loads what it needs: `edit` no Lightning, say.
    return import_module(f"lit_cka.commands.{args[0]}").main(args[1:])


if __name__ == "__main__":
    main()
