"""Out of GPU memory: the batch that would fit, from two small steps, on a device of known size."""

from dataclasses import replace

import pytest
import torch

from pipeline.common.errors import UserError
from tests.trainer.trained import DEMO
from trainer import train
from trainer import train as run
from trainer.config import Job
from trainer.distributed import Ranks
from trainer.safety import GpuMeter, explain, find_fitting_batch
from trainer.step import Learner

MIB = 1 << 20


class Device:
    """Of so many bytes, on which a step takes `fixed` and `each` for every image; what was run on it."""

    def __init__(self, size: int, fixed: int, each: int) -> None:
        self.size, self.fixed, self.each, self.ran, self._peak = size, fixed, each, [], 0

    def run(self, number: int) -> None:
        self.ran.append(number)
        self._peak = self.fixed + self.each * number
        if self._peak > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def reset(self) -> None:
        self._peak = 0

    def peak(self) -> int:
        return self._peak

    def available(self) -> int:
        return self.size


@pytest.mark.parametrize("size_mib", [600, 1000, 5000, 40_000])
@pytest.mark.parametrize("each_mib", [1, 7, 38])
def test_the_batch_that_is_named_fits_and_is_not_far_from_the_largest(size_mib, each_mib):
    device = Device(size_mib * MIB, 500 * MIB, each_mib * MIB)
    found = find_fitting_batch(device.run, device, 100_000)
    largest = (size_mib - 500) // each_mib
    fits = int((0.95 * size_mib - 500) / each_mib)
    if fits < 1:
        assert found is None
    else:
        assert found <= fits <= largest and found >= min(fits, fits - 7) and (found < 16 or found % 8 == 0)


def test_what_will_be_held_later_is_counted():
    device = Device(1000 * MIB, 100 * MIB, MIB)
    assert find_fitting_batch(device.run, device, 2000) == 848  # 950 - 100, in eights
    assert find_fitting_batch(device.run, device, 2000, later_bytes=400 * MIB) == 448


def test_small_steps_that_do_not_fit_either_are_made_smaller_and_a_full_device_is_said_to_be():
    device = Device(150 * MIB, 100 * MIB, 10 * MIB)
    assert find_fitting_batch(device.run, device, 512) == 4
    assert device.ran == [32, 8, 2, 4]
    full = Device(100 * MIB, 200 * MIB, MIB)
    assert find_fitting_batch(full.run, full, 512) is None
    assert "nvidia-smi" in explain(512, None, 1)


def test_a_batch_that_was_tried_is_never_the_answer():
    device = Device(10_000 * MIB, 0, MIB)
    assert find_fitting_batch(device.run, device, 64) < 64


def test_the_line_names_the_flag_for_all_ranks():
    assert explain(2048, 1792, 2) == (
        "out of GPU memory with --global-batch-size 4096 (2048 on each of 2 GPUs); --global-batch-size 3584 would fit "
        "(two smaller steps were measured)"
    )


class Counted(Device):
    """Counts the images that go through the net, and fails with too many."""

    def __call__(self, _net, inputs) -> None:
        self.run(len(inputs[0]))


def test_the_steps_that_are_tried_share_the_weights_and_change_nothing():
    learner = Learner(replace(DEMO, global_batch_size=8), 4, Ranks(0, 1, torch.device("cpu")))
    device = Counted(1000 * MIB, 900 * MIB, 10 * MIB)  # 5 images after the spare
    learner.model.register_forward_pre_hook(device)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    line = learner.explain_out_of_memory(torch.randn(64, 3, 224, 224), torch.zeros(64, dtype=torch.int64), device)
    assert "--global-batch-size 64; --global-batch-size 4 would fit" in line
    assert device.ran == [4, 8]
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
    assert all(weight.grad is None for weight in learner.model.parameters())


def test_a_run_that_is_out_of_memory_says_which_batch_would_fit(ready_shards, tmp_path, monkeypatch):
    device = Device(1000 * MIB, 900 * MIB, 10 * MIB)
    hook = torch.nn.Module.register_forward_pre_hook

    class Small(run.Learner):
        def __init__(self, *words) -> None:
            super().__init__(*words)
            hook(self.model, lambda _net, inputs: device.run(len(inputs[0])))

    monkeypatch.setattr(run, "Learner", Small)
    monkeypatch.setattr(train, "GpuMeter", lambda: device)
    recipe = replace(DEMO, global_batch_size=32, epochs=1, schedule="milestones")
    job = Job(shards=str(ready_shards), runs=tmp_path, name="run", recipe=recipe, seed=0, use_gpu=False)
    with pytest.raises(
        UserError, match=r"out of GPU memory with --global-batch-size 32; --global-batch-size 4 would fit"
    ):
        train.run_rank(job)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_batch_named_on_a_gpu_fits_there():
    learner = Learner(DEMO, 10, Ranks(0, 1, torch.device("cuda", 0)))
    learner.schedule.begin_step(1, 0, 1)
    torch.cuda.set_per_process_memory_fraction(2500 * MIB / torch.cuda.get_device_properties(0).total_memory)

    class Limited(GpuMeter):
        def available(self) -> int:
            return 2500 * MIB

    try:
        images = torch.randn(2048, 3, 224, 224, device="cuda")
        labels = torch.zeros(2048, dtype=torch.int64, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            learner.step(images, labels)
        line = learner.explain_out_of_memory(images, labels, Limited())
        fitting = int(line.rpartition("--global-batch-size ")[2].split()[0])
        learner.step(images[:fitting], labels[:fitting])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
