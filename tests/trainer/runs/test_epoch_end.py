"""What the end of an epoch changes and records: the schedule's news, also on shards without validation images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.console import Progress
from pipeline.shards import ShardSet
from tests.sharding import make
from tests.trainer.trained import DEMO
from tools.pca import compute
from tools.synth import make_tree
from trainer import train
from trainer.config import Job

RECIPE = replace(
    DEMO, global_batch_size=8, epochs=3, schedule="milestones", lr_milestones=(2,), conv1_lr_events=((3, 0.0),)
)


@pytest.fixture(scope="module")
def train_only(tmp_path_factory) -> Path:
    """Sixteen training images in two classes, with their colours, and none to validate on."""
    folder = tmp_path_factory.mktemp("train-only")
    make_tree(folder / "tree", num_classes=2, num_train=16, num_val=0, seed=0)
    make(folder / "tree", folder / "shards")
    shards = ShardSet.open(folder / "shards")
    compute(shards, device="cpu", num_threads=1, progress=Progress("pca", 16, "images")).save(shards.root)
    return folder / "shards"


def test_the_schedules_news_are_told_and_recorded_without_validation_images_too(
    train_only, ready_shards, tmp_path, capsys
):
    for name, shards in (("with", ready_shards), ("without", train_only)):
        job = Job(shards=str(shards), runs=tmp_path, name=name, recipe=RECIPE, seed=0, use_gpu=False)
        assert train.run_rank(job) == 0
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        events = [(r["name"], r["epoch"], r["text"]) for r in records if r["kind"] == "event" and "text" in r]
        assert events == [
            ("lr_cut", 1, "rate 0.0005 from epoch 2"),
            ("schedule", 2, "conv1 frozen from epoch 3"),
        ], name
        assert "rate 0.0005 from epoch 2" in capsys.readouterr().err, name
