"""Training and evaluating from a server: the batches of a local folder, from the first shards on, on any cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import graph
from pipeline.colors import ColorStats
from pipeline.graph import stream_seed
from pipeline.readahead import ShardOrder
from pipeline.shards import ShardSet

SEED = 5  # of the fixture make_train
TIMING = {"images_per_s", "data_wait_fraction", "time_s"}
NARROW = ["--recipe", "demo", "--set", "width=0.0625", "--global-batch-size", "4", "--gpus", "0"]


@pytest.fixture
def open_remote(ready_shards, s3_bucket, tmp_path):
    """Opens the mini-set from the server, each time with the cache that is named."""
    url, opened = s3_bucket.upload(ready_shards, "set"), []

    def make(cache: str) -> ShardSet:
        opened.append(ShardSet.open(url, cache_dir=tmp_path / cache))
        return opened[-1]

    yield make
    for shards in opened:
        shards.remote.fetcher.close()


@pytest.fixture
def short_buffer(monkeypatch) -> None:
    """A shuffle buffer as small beside the mini-set as the real one is beside ImageNet."""
    monkeypatch.setattr(graph, "MAX_BUFFERED_SAMPLES", 4)


def same(one, other) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.s3
def test_training_begins_with_the_first_shards_and_gives_the_batches_of_a_local_folder(
    open_remote, s3_bucket, make_train, short_buffer
):
    shards = open_remote("cache")
    order = ShardOrder(4, stream_seed(SEED, "shards"))(1)
    late = [shards.shards("train")[position].file for position in order[2:]]
    holds = [s3_bucket.fail(name, "hold") for name in late]
    local, remote = make_train(global_batch_size=2), make_train(shards=shards, global_batch_size=2)
    batches = iter(remote)
    first = next(batches)  # a hang, if it waited for all
    for hold in holds:
        hold.released.set()
    for epoch in (1, 2):
        expected = iter(local)
        if epoch == 1:
            assert same(first, next(expected))
        else:
            batches = iter(remote)
        assert all(same(one, other) for one, other in zip(batches, expected, strict=True))
        assert remote.epoch == local.epoch == epoch + 1


@pytest.mark.s3
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_an_empty_cache(open_remote, make_train, short_buffer):
    local = make_train(global_batch_size=2)
    for _ in local:
        pass
    batches = iter(local)
    for _ in range(17):
        next(batches)
    state = local.state_dict()
    resumed = make_train(shards=open_remote("another"), global_batch_size=2)
    resumed.load_state_dict(state)
    assert all(same(one, other) for one, other in zip(resumed, batches, strict=True))
    assert all(same(one, other) for one, other in zip(resumed, local, strict=True))


@pytest.mark.s3
def test_evaluation_waits_for_its_split_alone_and_sees_what_a_local_folder_gives(open_remote, s3_bucket, make_eval):
    shards = open_remote("cache")
    holds = [s3_bucket.fail(shard.file, "hold") for shard in shards.shards("train")]
    assert all(same(one, other) for one, other in zip(make_eval(shards=shards), make_eval(), strict=True))
    for hold in holds:
        hold.released.set()


def read_metrics(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records if record["kind"] != "event"]


@pytest.mark.s3
@pytest.mark.slow
def test_the_commands_take_a_url_and_a_run_from_a_server_equals_a_local_one(ready_shards, s3_bucket, tmp_path):
    url = s3_bucket.upload(ready_shards, "set")
    for name in ("color.json", "mean_image.npy"):
        s3_bucket.client.delete_object(Bucket=s3_bucket.name, Key=f"set/{name}")
    variables = {"ALEXNET_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: object) -> str:
        command = [str(Path(sys.executable).parent / program), *map(str, words)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("alexnet-prep", "pca", "--shards", url, "--device", "cpu")
    published = ColorStats.load(
        ShardSet.open(url, cache_dir=tmp_path / "fresh").root, ShardSet.open(ready_shards).fingerprint
    )
    assert published.num_pixels == 64 * 256 * 256
    run("alexnet-train", "--shards", ready_shards, *NARROW, "--epochs", 2, "--name", "local")
    run("alexnet-train", "--shards", url, *NARROW, "--epochs", 1, "--name", "remote", "--cache-gib", 1)
    run("alexnet-train", "--resume", "--name", "remote", "--epochs", 2, "--gpus", 0)  # finds the URL in the run
    assert read_metrics(tmp_path / "runs/remote") == read_metrics(tmp_path / "runs/local")
    errors = [json.loads(run("alexnet-eval", name, "--gpus", 0, "--json")) for name in ("remote", "local")]
    assert errors[0]["top1_error"] == errors[1]["top1_error"] and errors[0]["num_images"] == 24
