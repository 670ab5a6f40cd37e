"""Where images are decoded and kept does not change a run: the same numbers, and a resumed run keeps its own way."""

import json
from dataclasses import replace

import pytest
import torch

from pipeline.common.errors import UserError
from trainer import checkpoint
from trainer.feed import Feeding
from trainer.job import Job
from trainer.recipe import RECIPES
from trainer.train import run_rank

RECIPE = replace(RECIPES["demo"], width=0.0625, global_batch_size=8, epochs=2)


@pytest.fixture
def train(ready_shards, tmp_path):
    """Trains two epochs, or as many as `recipe` says, and gives the run's folder."""

    def train(name, feeding, recipe=RECIPE, resume=None):
        job = Job(
            shards=str(ready_shards),
            runs=tmp_path,
            name=name,
            recipe=recipe,
            seed=0,
            use_gpu=False,
            resume=resume,
            num_threads=2,
            feeding=feeding,
        )
        assert run_rank(job) == 0
        return tmp_path / name

    return train


def model_of(run):
    return checkpoint.load(run / "checkpoints" / "last.pt")["model"]


def test_a_cache_and_a_resumption_with_it_give_the_weights_of_plain_feeding(train):
    plain, cached = train("plain", Feeding()), train("cached", Feeding(cache="raw"))
    halved = train("halved", Feeding(cache="raw"), replace(RECIPE, schedule="milestones", epochs=1))
    straight = train("straight", Feeding(), replace(RECIPE, schedule="milestones"))
    train("halved", Feeding(cache="raw"), replace(RECIPE, schedule="milestones"), resume=halved)
    for one, other in ((plain, cached), (straight, halved)):
        weights = model_of(other)
        assert all(torch.equal(value, weights[name]) for name, value in model_of(one).items())
    assert json.loads((cached / "config.json").read_text())["feeding"]["cache"] == "raw"


def test_a_run_resumed_with_another_decoder_is_refused_by_name(train):
    recipe = replace(RECIPE, epochs=1, schedule="milestones")
    run = train("run", Feeding(decode="hybrid", host_share=0.5), recipe)
    with pytest.raises(UserError, match="saved with decoder hybrid, this one has host"):
        train("run", Feeding(), replace(recipe, epochs=2), resume=run)
