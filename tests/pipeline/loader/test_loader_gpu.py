"""On a GPU: the CPU's samples and draws, and nearly its pixels, from every decoder. benchmarks/gpu.py times them."""

import itertools

import pytest
import torch

GPU_TOLERANCE_GREY = 1.5  # mean absolute difference between the decoders of CPU and GPU
EXACT_GREY = 1e-3  # where the CPU decodes
WAYS = {
    "mixed": ({"decode": "mixed"}, GPU_TOLERANCE_GREY),
    "cpu": ({"decode": "cpu"}, EXACT_GREY),
    "hybrid": ({"decode": "hybrid", "host_share": 0.5}, GPU_TOLERANCE_GREY),
    "auto": ({}, GPU_TOLERANCE_GREY),
    "cache": ({"decode": "mixed", "cache_gib": 1.0}, GPU_TOLERANCE_GREY),
    "raw": ({"raw": True}, EXACT_GREY),
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]


def assert_alike(one, other, tolerance_grey) -> None:
    assert other.images.is_cuda and other.labels.is_cuda and one.images.shape == other.images.shape
    assert torch.equal(one.labels, other.labels.cpu())
    assert (one.images - other.images.cpu()).abs().mean() < tolerance_grey


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("way", WAYS)
def test_training_on_the_gpu_gives_the_cpus_samples_draws_and_nearly_its_pixels(make_train, raw_shards, way, mean):
    options, tolerance_grey = WAYS[way]
    options = dict(options)
    if options.pop("raw", False):
        options["shards"] = raw_shards
    on_cpu, on_gpu = make_train(mean=mean), make_train(mean=mean, device="gpu", **options)
    for _ in range(2):
        for one, other in zip(on_cpu, on_gpu, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(on_cpu.draws, on_gpu.draws, strict=True))
            assert_alike(one, other, tolerance_grey)


@pytest.mark.parametrize("crops", ["centre", "ten"])
@pytest.mark.parametrize("decode", ["auto", "cpu", "hybrid", "raw"])
def test_evaluation_on_the_gpu_gives_the_cpus_images_nearly(make_eval, raw_shards, decode, crops):
    options = {"shards": raw_shards} if decode == "raw" else {"decode": decode}
    for one, other in zip(make_eval(crops=crops), make_eval(crops=crops, device="gpu", **options), strict=True):
        assert_alike(one, other, EXACT_GREY if decode in ("raw", "cpu") else GPU_TOLERANCE_GREY)


@pytest.mark.parametrize("way", WAYS)
def test_a_restored_loader_gives_the_same_samples_and_draws(make_train, raw_shards, way):
    options = dict(WAYS[way][0])
    if options.pop("raw", False):
        options["shards"] = raw_shards
    loader, restored = (make_train(device="gpu", **options) for _ in range(2))
    for _ in itertools.islice(loader, 3):
        pass
    restored.load_state_dict(loader.state_dict())
    for one, other in zip(loader, restored, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(a, b) for a, b in zip(loader.draws, restored.draws, strict=True))


def test_a_batch_that_is_kept_keeps_its_values_on_the_gpu(make_train):
    kept, copies = [], []
    for batch in make_train(device="gpu"):
        kept.append(batch)
        copies.append(batch.images.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))
