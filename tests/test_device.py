"""Steps side by side take different GPUs; the GPUs are make-believe, the locks are not."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

from tcore import device


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}")
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(device, "taken", [])
    device.free_gpu.cache_clear()
    yield
    device.free_gpu.cache_clear()


def another_step() -> torch.device:
    device.free_gpu.cache_clear()
    return device.pick()


def test_steps_side_by_side_take_different_gpus(gpus):
    assert device.pick() == device.pick() == torch.device("cuda:0")
    assert another_step() == torch.device("cuda:1")
    assert another_step() == torch.device("cuda:0")  # more steps than GPUs
    os.close(device.taken.pop())  # the second step ends
    assert another_step() == torch.device("cuda:1")


def test_a_wish_is_taken_literally(gpus):
    assert device.pick("cpu").type == "cpu" and device.pick("cuda:1").index == 1
    assert not device.taken
