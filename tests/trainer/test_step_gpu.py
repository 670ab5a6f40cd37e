"""On a GPU: training steps are the CPU's to rounding, in the precision that is the default there too."""

from dataclasses import replace

import pytest
import torch

from trainer.distributed import Ranks
from trainer.recipe import RECIPES
from trainer.step import Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]


@pytest.fixture
def exact_products(monkeypatch):
    """Convolutions in float32, not rounded to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(device, precision, num_steps=3):
    """Logits of each of a few steps on the same noise, and the weights after them; on the CPU."""
    recipe = replace(RECIPES["demo"], dropout=0.0, precision=precision, schedule="milestones")
    learner = Learner(recipe, 10, Ranks(0, 1, torch.device(device)))
    generator, logits = torch.Generator().manual_seed(0), []
    for step in range(num_steps):
        learner.schedule.begin_step(1, step, num_steps)
        images = torch.randn(16, 3, 224, 224, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (16,), generator=generator)
        logits.append(learner.step(images.to(device), labels.to(device)).detach().float().cpu())
    return torch.stack(logits), [weight.detach().cpu() for weight in learner.model.parameters()]


def test_steps_on_a_gpu_are_the_cpus_in_float32(exact_products):
    (logits, weights), (others, other_weights) = train("cuda", "float32"), train("cpu", "float32")
    torch.testing.assert_close(logits, others, rtol=1e-3, atol=1e-3)
    for one, other in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_steps_in_bfloat16_keep_float32_weights_and_are_near_the_cpus():
    (logits, weights), (others, _) = train("cuda", "bf16"), train("cpu", "float32")
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert (logits - others).abs().max() < 0.05 * others.abs().max() + 0.05
