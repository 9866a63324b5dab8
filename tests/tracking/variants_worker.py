"""A script for `test_sharded_variants.py`: the trainings of `sharded_worker.py` under many options of FSDP.

    python tests/tracking/variants_worker.py FOLDER

writes what each process has seen to `FOLDER/<way>-<rank>.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tracking.sharded_worker import WHOLE, Way, main


def fsdp2(variant: str, tolerance: float = 1e-6) -> Way:
    return Way(f"FSDP2, {variant}", data=2, variant=variant, tolerance=tolerance)


def fsdp(variant: str, tolerance: float = 1e-6, *, tests_again: bool = False, saves: bool = True) -> Way:
    way = Way(f"FSDP, {variant}", data=2, kind="wrapped", variant=variant, tolerance=tolerance)
    return way._replace(tests_again=tests_again, saves=saves)


WAYS = [
    Way("both", data=2, tensor=2),
    fsdp2("tied"),
    fsdp2("frozen"),
    fsdp2("kept"),
    fsdp2("offload"),
    fsdp2("checkpointing"),
    fsdp2("compile"),
    fsdp2("bf16", tolerance=0.02),
    fsdp2("ignored", tolerance=0.1),  # a head whose gradients are not averaged
    fsdp("tied"),
    fsdp("frozen"),
    fsdp("gradients"),
    fsdp("not sharded", tests_again=True),
    fsdp("checkpointing"),
    fsdp("without names", tests_again=True, saves=False),
    fsdp("bf16", tolerance=0.02),
]

if __name__ == "__main__":
    main((WHOLE, *(way.whole for way in WAYS if way.whole != WHOLE), *WAYS), Path(sys.argv[1]))
