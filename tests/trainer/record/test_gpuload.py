"""What is read of a GPU, by a stand-in for CUDA: memory always, utilisation where NVML is at hand."""

import pytest
import torch

from trainer.record.environment import GpuLoad, read_gpu_load


def test_there_is_nothing_to_read_on_a_cpu():
    assert read_gpu_load(torch.device("cpu")) is None


@pytest.mark.parametrize("failure", [ModuleNotFoundError("pynvml"), RuntimeError("driver"), None])
def test_a_missing_nvml_costs_one_number_and_no_run(monkeypatch, failure):
    def utilization(_device):
        if failure:
            raise failure
        return 97

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    found = read_gpu_load(torch.device("cuda", 0))
    assert found == GpuLoad(None if failure else 0.97, 77 << 30, 80 << 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_real_gpu_says_what_it_has():
    held = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    found = read_gpu_load(held.device)
    assert found is not None and (1 << 28) <= found.memory_bytes < found.total_bytes
    assert found.utilisation is None or 0.0 <= found.utilisation <= 1.0
