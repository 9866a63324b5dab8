"""What a study is to do, and whether a folder holds the beginning of the same one: `Plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_cka.files import write_json

# What may differ between two runs of one study: where and how fast, and which checkpoints, each of which counts alone.
_FREE = (
    "output", "needs", "num_threads", "config", "working_directory", "study.checkpoints", "study.device",
    "data.init_args.num_workers",
)  # fmt: skip
_SHOWN = 5


class Plan:
    """The options of a study, as a config holds them, in its output folder.

    Args:
        options: by name, in groups.
        pretrained: the identity of the pretrained model, see `Checkpoint.identity`.
    """

    def __init__(self, options: Mapping[str, Any], pretrained: list[int]) -> None:
        content = {"options": dict(options), "pretrained": pretrained}
        self.content: dict[str, Any] = json.loads(json.dumps(content, default=str))

    def begin(self, output: Path) -> None:
        """Write the plan into the folder, unless it is there.

        Raises:
            ValueError: if another one is there; the message says what differs.
        """
        path = output / "plan.json"
        if not path.exists():
            write_json(path, self.content, durable=True)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = differences(before["options"], self.content["options"])
            if before["pretrained"] != self.content["pretrained"]:
                differing.append("the file of the pretrained model has changed since")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected {str(path)!r} to be the plan of a study, but it is not ({error}). Name another `output`."
            ) from error
        if differing:
            more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise ValueError(
                f"Expected the options that the study in {str(output)!r} was begun with, but these differ: "
                f"{', '.join(differing[:_SHOWN])}{more}. Name another `output`, or take the options of before."
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a few words on each option that differs and counts.

    Example:
        >>> differences({"seed": 0, "num_threads": 1}, {"seed": 1, "num_threads": 2})
        ['`seed` (0 before, 1 now)']
    """
    old, new = _flat(before), _flat(now)
    return [
        f"`{name}` ({_said(old, name)} before, {_said(new, name)} now)"
        for name in dict.fromkeys([*old, *new])
        if _said(old, name) != _said(new, name) and not any(f"{name}.".startswith(f"{free}.") for free in _FREE)
    ]


def _said(options: Mapping[str, Any], name: str) -> str:
    return json.dumps(options[name]) if options.get(name) is not None else "not given"


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
