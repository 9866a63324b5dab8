"""Where to compute: what is here is taken, anything else is one clear error."""

import pytest
import torch

from lit_cka.parallel.devices import usable_device


def test_a_device_that_is_here() -> None:
    assert usable_device("cpu", torch.float64) == usable_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99"])
def test_a_device_that_is_not(device: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `device` to be one that computes in float32 here.*'{device}'"):
        usable_device(device)


@pytest.mark.gpu
def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2 * torch.cuda.device_count()):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert usable_device("cuda") == torch.device("cuda", rank % torch.cuda.device_count())
    assert usable_device("cuda:0") == torch.device("cuda", 0)
