"""Folders of `save_pretrained`, which may be a stranger's: `reading_model` keeps a load within its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_cka.checkpoints.shards import shards_in_index


@contextmanager
def reading_model(path: str | os.PathLike[str]) -> Iterator[None]:
    """While active, a model or its configuration is loaded from `path`: from a folder, if it is one, and nothing else.

    Names on the hub that stand in the folder's files are not looked up. For a name on the hub, nothing is changed.

    Raises:
        ValueError: if a shard would be outside of the folder, the folder holds an adapter for a model somewhere else,
            or it can't be loaded, whatever the library raises.
        FileNotFoundError: if the folder has no configuration or no weights.
    """
    if not os.path.isdir(path):
        yield
        return
    _check(Path(path))
    try:
        with _hub_off():
            yield
    except ImportError:  # of a package that the model takes
        raise
    except Exception as error:  # whatever bytes do to a library
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        kind = FileNotFoundError if isinstance(error, OSError) and _lacks_a_part(Path(path)) else ValueError
        raise kind(f"The model in {str(path)!r} could not be loaded: {error or type(error).__name__}") from error


def _lacks_a_part(folder: Path) -> bool:
    has_weights = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    return not (folder / "config.json").is_file() or not has_weights


def _check(folder: Path) -> None:
    for index in sorted(folder.glob("*.index.json")):
        shards_in_index(index)
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return
    try:
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(adapter)!r} is damaged or no configuration of an adapter.") from error
    raise ValueError(
        f"Expected a whole model in {str(folder)!r}, but it holds an adapter for {base!r}, and what a file names is "
        "not opened. Load it with peft, and save what `merge_and_unload()` returns with its tokenizer."
    )


@contextmanager
def _hub_off() -> Iterator[None]:
    import huggingface_hub.constants

    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE  # read at each request
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
