"""How a command that compares models runs: its options read, its folder checked, the ranks of torchrun joined."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from lit_cka.commands.failures import failing_in_a_line
from lit_cka.commands.hub import offline_if_unreachable
from lit_cka.commands.messages import num_ranks
from lit_cka.commands.parsing import Parser
from lit_cka.files import require_writable

Result = TypeVar("Result")


def run(parser: Parser, args: list[str], command: Callable[[Any, dict[str, Any]], Result]) -> Result:
    """Parse `args`, and give the command its options, as objects and as they were written.

    A wrong value or a missing file ends the process with one line and status 1. Under torchrun, ranks share what the
    command lets them share; each has a GPU of its own, where there are GPUs.
    """
    config = parser.parse_args(args)
    plain = plain_options(parser, config)
    import torch

    from lit_cka.parallel.ranks import Ranks

    if config.get("num_threads") is not None:
        torch.set_num_threads(config.num_threads)
    if num_ranks() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with failing_in_a_line(plain):
        require_writable("output", config.output)
        offline_if_unreachable(plain)
        with Ranks():
            return command(parser.instantiate_classes(config), plain)


def plain_options(parser: Parser, config: Any) -> dict[str, Any]:
    """The options as a config would hold them."""
    import yaml

    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=True))
    plain.pop("config", None)
    return plain
