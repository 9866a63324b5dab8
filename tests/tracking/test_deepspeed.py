"""DeepSpeed's ZeRO: whole weights in stages 1 and 2, partitions of them in stage 3."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="no deepspeed here, which is built where it is installed")

from tests import sync_worker
from tests.tracking import deepspeed_worker
from tests.tracking.every_way import (  # noqa: F401  # the tests
    test_a_model_that_is_not_trained_has_a_cka_of_1,
    test_a_probe,
    test_a_process_without_batches_is_an_error_on_all,
    test_a_resumed_training_goes_on_with_its_reference,
    test_a_test_of_a_checkpoint_finds_the_initial_weights,
    test_a_training_is_the_same_with_and_without,
    test_damaged_weights_of_one_process_are_an_error_on_all,
    test_other_weights_of_the_same_architecture,
    test_scores_are_those_of_the_whole_model,
    test_the_blocks_are_found,
    ways_of,
)
from tests.tracking.sharded_worker import SECONDS

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ways_of(metafunc, deepspeed_worker.WAYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `deepspeed_worker.py` have left what they saw; all of them have ended, or been ended."""
    folder = tmp_path_factory.mktemp("deepspeed")
    sync_worker.run_to_end(deepspeed_worker.__file__, folder, seconds=3 * SECONDS)
    return folder
