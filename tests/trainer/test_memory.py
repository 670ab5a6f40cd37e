"""Out of GPU memory: one line that says what happened, how much memory there is, and what to type instead."""

from dataclasses import replace

import pytest
import torch

from pipeline.common.errors import UserError
from tests.trainer.trained import DEMO
from trainer import train
from trainer.config import Job
from trainer.distributed import Ranks
from trainer.step import Learner, explain_out_of_memory

WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.50 MiB is free."
    "\nIncluding non-PyTorch memory, this process has 78.9 GiB memory in use. If reserved but unallocated memory is"
)


@pytest.mark.parametrize(
    ("size", "world_size", "tried", "remedy"),
    [
        (4096, 2, "4096 (2048 on each of 2 GPUs)", "--global-batch-size 2048 or more --gpus"),
        (6, 2, "6 (3 on each of 2 GPUs)", "--global-batch-size 2 or more --gpus"),
        (33, 1, "33", "--global-batch-size 16 or more --gpus"),
        (2, 2, "2 (1 on each of 2 GPUs)", "--set width=0.5"),
    ],
)
def test_the_line_has_the_memory_and_a_batch_that_all_ranks_can_share(size, world_size, tried, remedy):
    line = explain_out_of_memory(torch.OutOfMemoryError(WORDS), size, world_size)
    assert line == (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.50 MiB is "
        f"free, with --global-batch-size {tried}; use {remedy}"
    )


def test_a_run_that_is_out_of_memory_names_a_smaller_batch(ready_shards, tmp_path, monkeypatch):
    def step(*_) -> None:
        raise torch.OutOfMemoryError(WORDS)

    monkeypatch.setattr(Learner, "step", step)
    recipe = replace(DEMO, global_batch_size=32, epochs=1, schedule="milestones")
    job = Job(shards=str(ready_shards), runs=tmp_path, name="run", recipe=recipe, seed=0, use_gpu=False)
    with pytest.raises(UserError, match=r"out of memory.*with --global-batch-size 32; use --global-batch-size 16 or"):
        train.run_rank(job)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_torchs_own_words_on_a_gpu_name_its_memory():
    learner = Learner(DEMO, 10, Ranks(0, 1, torch.device("cuda", 0)))
    learner.schedule.begin_step(1, 0, 1)
    torch.cuda.set_per_process_memory_fraction((2500 << 20) / torch.cuda.get_device_properties(0).total_memory)
    try:
        images = torch.randn(2048, 3, 224, 224, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as error:
            learner.step(images, torch.zeros(2048, dtype=torch.int64, device="cuda"))
        line = explain_out_of_memory(error.value, 2048, 1)
        assert "total capacity of" in line and "; use --global-batch-size 1024 or more" in line and "\n" not in line
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
