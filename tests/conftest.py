"""For all tests: one thread, since the models are tiny and threads of several processes get in each other's way."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are loaded, here and in started processes
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

# Where Python may not write bytecode next to its sources, each of the many processes that tests start would compile
# torch and transformers anew, for twice the time: they get a folder of their own to share it.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / ".pytest_cache" / "pycache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no process waits for the other at the end; leave out what needs
    a GPU where there is none.
    """
    items.sort(key=lambda item: "tracking" not in item.path.parts)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
