"""Where images are decoded and kept does not change a run: the same numbers, and a resumed run keeps its own way."""

import json
from dataclasses import replace

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.options import LoaderOptions
from trainer import checkpoint
from trainer.commands.options import read_feeding
from trainer.config import Job
from trainer.recipe import RECIPES
from trainer.train import run_rank

RECIPE = replace(RECIPES["demo"], width=0.0625, global_batch_size=8, epochs=2)


@pytest.fixture
def train(ready_shards, tmp_path):
    """Trains two epochs, or as many as `recipe` says, and gives the run's folder."""

    def train(name, options, recipe=RECIPE, resume=None):
        job = Job(
            shards=str(ready_shards),
            runs=tmp_path,
            name=name,
            recipe=recipe,
            seed=0,
            use_gpu=False,
            resume=resume,
            loader=options,
        )
        assert run_rank(job) == 0
        return tmp_path / name

    return train


def model_of(run):
    return checkpoint.load(run / "checkpoints" / "last.pt")["model"]


def same_weights(one, other) -> bool:
    weights = model_of(other)
    return all(torch.equal(value, weights[name]) for name, value in model_of(one).items())


def test_threads_and_prefetching_change_no_bit_also_in_a_resumed_run(train):
    recipe = replace(RECIPE, schedule="milestones")
    other = LoaderOptions(num_threads=1, prefetch_batches=1)
    straight = train("straight", LoaderOptions(num_threads=3), recipe)
    halved = train("halved", other, replace(recipe, epochs=1))
    train("halved", LoaderOptions(prefetch_batches=4), recipe, resume=halved)
    assert same_weights(straight, halved)
    feeding = json.loads((train("whole", other, recipe) / "config.json").read_text())["feeding"]
    assert feeding["prefetch_batches"] == 1 and "num_threads" not in feeding  # of this machine


def test_a_run_resumed_with_another_decoder_is_refused_by_name(train):
    recipe = replace(RECIPE, epochs=1, schedule="milestones")
    run = train("run", LoaderOptions(decode="hybrid", host_share=0.5), recipe)
    with pytest.raises(UserError, match=r"saved with decoder hybrid, .*, this one has cpu, "):
        train("run", LoaderOptions(), replace(recipe, epochs=2), resume=run)


def test_the_settings_of_an_earlier_versions_run_are_read_as_todays():
    early = {"decode": "host", "host_share": None, "hw_decoder_load": 0.9, "cache": "raw", "prefetch_batches": 2}
    assert LoaderOptions(**read_feeding({"feeding": early})) == LoaderOptions(decode="cpu", prefetch_batches=2)
    assert read_feeding({}) == {}
