"""On a GPU: the CPU's samples and draws, and nearly its pixels."""

import pytest
import torch

GPU_TOLERANCE_GREY = 1.5  # mean absolute difference between the decoders of CPU and GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_the_gpu_gives_the_cpus_samples_draws_and_nearly_its_pixels(make_train, make_eval, mean):
    on_cpu, on_gpu = make_train(mean=mean), make_train(mean=mean, device="gpu")
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other.images.is_cuda and other.labels.is_cuda
        assert on_cpu.draws.keys == on_gpu.draws.keys
        assert all(torch.equal(a, b) for a, b in zip(on_cpu.draws[:3], on_gpu.draws[:3], strict=True))
        assert torch.equal(one.labels, other.labels.cpu())
        assert (one.images - other.images.cpu()).abs().mean() < GPU_TOLERANCE_GREY
    for crops in ("centre", "ten"):
        pairs = zip(make_eval(mean=mean, crops=crops), make_eval(mean=mean, crops=crops, device="gpu"), strict=True)
        for one, other in pairs:
            assert torch.equal(one.labels, other.labels.cpu())
            assert (one.images - other.images.cpu()).abs().mean() < GPU_TOLERANCE_GREY
