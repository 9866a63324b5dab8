"""The tokenizer of a model, or an error where there is none: `load_tokenizer`."""

from __future__ import annotations

import os
from typing import Any


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Returns the tokenizer in a folder or on the hub.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    missing = f"Expected a tokenizer at {str(path)!r}, but there is none; `tokenizer` can name another place."
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(missing) from error
    # For some architectures transformers makes up a tokenizer where there are no files, of special tokens and a space.
    special = set(tokenizer.all_special_ids)
    if not any(token.strip("▁") for token, id in tokenizer.get_vocab().items() if id not in special):
        raise ValueError(missing)
    return tokenizer
