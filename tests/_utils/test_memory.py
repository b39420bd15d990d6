"""One answer to how much memory is free."""

import psutil
import pytest
import torch

from reftheads._utils.memory import free_bytes


def test_main_memory_counts_for_all_devices_but_cuda(monkeypatch):
    free = psutil.virtual_memory()._replace(available=4000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert free_bytes() == free_bytes("cpu") == free_bytes(torch.device("meta")) == 4000


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)])
def test_a_cuda_device_is_asked_itself(monkeypatch, device):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(torch.device(device)) or (5000, 9000))
    assert free_bytes(device) == 5000 and asked == [torch.device(device)]
