"""The tokenizer of a model, or an error where there is none: `load_tokenizer`."""

from __future__ import annotations

import os
from typing import Any

from lit_cka.checkpoints.model_folders import reading_model


def load_tokenizer(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer in a folder or on the hub.

    Args:
        path: the folder or name.
        trust_remote_code: run code that comes with it.

    Raises:
        ValueError: if there is none, or none without code of its own.
    """
    from transformers import AutoTokenizer

    missing = f"Expected a tokenizer at {str(path)!r}, but there is none; `tokenizer` can name another place."
    try:
        with reading_model(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The tokenizer at {str(path)!r} comes with code of its own, which runs where the model is given "
                "`trust_remote_code=True` alone."
            ) from error
        raise ValueError(missing) from error
    # For some architectures transformers makes up a tokenizer where there are no files, of special tokens and a space.
    special = set(tokenizer.all_special_ids)
    if not any(token.strip("▁") for token, id in tokenizer.get_vocab().items() if id not in special):
        raise ValueError(missing)
    return tokenizer
