"""Names on the hub: which options have them, whether the hub can be reached, and what these options take instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = "a local folder in `save_pretrained` format"
# By class and argument, the library that looks a name up, and what may stand there instead.
_TAKES = {
    ("TextClassifier", "model_name"): ("transformers", _FOLDER),
    ("CausalLanguageModel", "model_name"): ("transformers", _FOLDER),
    ("TextModel", "path"): ("transformers", _FOLDER),
    ("TextModel", "tokenizer"): ("transformers", _FOLDER),
    ("ImageClassifier", "model_name"): ("timm", "`local-dir:FOLDER`, or a `checkpoint` without `pretrained`"),
    ("CLIPImageClassifier", "pretrained"): ("open_clip", "the path of a file of weights"),
    ("TextDataModule", "dataset"): ("datasets", "a local folder, or give `train`, `val` and `test` files without it"),
    ("TextDataModule", "tokenizer"): ("transformers", _FOLDER),
}  # fmt: skip


class HubName(NamedTuple):
    """An option with a name on the hub."""

    option: str
    name: str
    library: str
    takes: str


def hub_names(options: Any, prefix: str = "") -> Iterator[HubName]:
    """Yields the options of our classes, as a config holds them, whose value is no local path."""
    if isinstance(options, list):
        for index, value in enumerate(options):
            yield from hub_names(value, f"{prefix}[{index}]")
    if not isinstance(options, Mapping):
        return
    class_name = str(options.get("class_path", "")).rpartition(".")[2]
    arguments = options.get("init_args") or {}
    for argument, value in arguments.items() if isinstance(arguments, Mapping) else ():
        library, takes = _TAKES.get((class_name, argument), ("", ""))
        is_looked_up = library != "timm" or arguments.get("pretrained")
        if library and is_looked_up and isinstance(value, str) and not _is_local(value):
            yield HubName(f"{prefix}.init_args.{argument}", value, library, takes)
    for name, value in options.items():
        yield from hub_names(value, f"{prefix}.{name}" if prefix else name)


def _is_local(name: str) -> bool:
    return name.startswith("local-dir:") or Path(name).exists()


def offline_if_unreachable(options: Mapping[str, Any]) -> None:
    """Turn the hub's offline mode on for this process where names are to be looked up, but the hub has no address.

    Otherwise each name takes most of a minute of retries before it fails, or is taken from the cache after all.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if not any(hub_names(options)) or getproxies() or "HF_HUB_OFFLINE" in os.environ:
        return
    import socket

    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None:  # it has read the environment already
            constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_failure(error: BaseException, options: Mapping[str, Any]) -> str | None:
    """What to do about a name that could not be had from the hub; None for another error."""
    errors = list(chain(error))
    kinds = {_package(type(each).__module__) for each in errors}
    if "huggingface_hub" not in kinds and not any(isinstance(each, ConnectionError) for each in errors):
        return None
    libraries = {package for each in errors for package in _packages_of(each)}
    failed = [each for each in hub_names(options) if each.library in libraries]
    if not failed:
        said = " ".join(str(error).split())
        return f"Expected a hub that can be reached, or a local folder in place of a name, but: {said}"
    option, name, _, takes = failed[0]
    others = "".join(f" So does `{each.option}` ({each.name!r})." for each in failed[1:] if each.takes == takes)
    return (
        f"Expected `{option}` to be in the cache, or on a hub that can be reached, but {name!r} is not. "
        f"It also takes {takes}.{others}"
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _packages_of(error: BaseException) -> Iterator[str]:
    traceback = error.__traceback__
    while traceback is not None:
        yield _package(str(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next


def _package(module: str) -> str:
    return module.partition(".")[0]
