"""`alexnet-bench`: how rates are taken, what they are held against, and what the commands print.

Time is a fake clock wherever a duration decides; nothing is asserted about how fast this machine is.
"""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.common.errors import UserError
from pipeline.loader import Batch, read_pixels
from pipeline.manifest import Shard
from pipeline.shards import ShardSet
from trainer.bench import run as bench_run
from trainer.bench import tasks as bench_feed
from trainer.bench import tasks as bench_step
from trainer.bench.rates import Rate, Round, Task, Work, alternate
from trainer.commands.bench import command
from trainer.distributed import Ranks
from trainer.model import AlexNet
from trainer.optim import make_optimizer, make_schedule
from trainer.recipe import RECIPES, override
from trainer.step import train_step

ALONE = Ranks(0, 1, torch.device("cpu"))
NARROW = override(RECIPES["demo"], ["width=0.0625", "global_batch_size=4"])
NARROW_FLAGS = [
    "--recipe",
    "demo",
    "--set",
    "width=0.0625",
    "--global-batch-size",
    "4",
    "--gpus",
    "0",
    "--seconds",
    "0.2",
]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def spend(clock: FakeClock, seconds: float, images: int = 8, log: list | None = None, name: str = "") -> Task:
    """A task whose step takes `seconds` on the fake clock."""

    def run(num_steps: int) -> Work:
        clock.now_s += seconds * num_steps
        if log is not None:
            log.append((name, num_steps))
        return Work(images * num_steps)

    return Task(run)


def test_a_rate_is_the_median_of_rounds_and_images_are_rate_times_time():
    rate = Rate((Round(100, 1.0, 0.0, 0.5), Round(100, 2.0, 0.5, 1.0), Round(100, 4.0, 0.0, 2.0)))
    told = rate.to_json()
    assert [told[name] for name in ("images_per_s", "lowest", "highest", "spread")] == [50.0, 25.0, 100.0, 1.5]
    assert (told["num_images"], told["duration_s"], rate.cores_used) == (300, 7.0, 0.5)
    assert rate.waited_fraction == 0.5 / 7
    assert all(one.per_s * one.duration_s == one.num_done for one in rate.rounds)


def test_a_ratio_compares_rounds_of_the_same_turn():
    machine_slows_down = Rate(tuple(Round(100, seconds, 0.0, 0.0) for seconds in (1.0, 2.0, 4.0)))
    twice_as_fast = Rate(tuple(Round(200, seconds, 0.0, 0.0) for seconds in (1.0, 2.0, 4.0)))
    assert machine_slows_down.ratio_to(twice_as_fast) == 0.5


def test_tasks_take_turns_in_rounds_of_about_equal_time_with_an_untimed_lead():
    clock, log = FakeClock(), []
    tasks = {name: spend(clock, s, log=log, name=name) for name, s in (("quick", 0.1), ("slow", 0.5))}
    rates = alternate(tasks, num_rounds=4, duration_s=8.0, ranks=ALONE, clock=clock)
    assert rates["quick"].per_s == pytest.approx(80.0) and rates["slow"].per_s == pytest.approx(16.0)
    assert [len(rate.rounds) for rate in rates.values()] == [4, 4]
    assert [one.duration_s for one in rates["quick"].rounds] == pytest.approx([2.0] * 4)
    timed = log[-16:]  # pairs of lead and round
    assert [steps for _, steps in timed[::2]] == [1] * 8
    assert [name for name, _ in timed[1::2]] == ["quick", "slow", "slow", "quick"] * 2
    assert {steps for name, steps in timed[1::2] if name == "quick"} == {20}


def test_a_step_longer_than_a_round_is_still_a_round():
    clock = FakeClock()
    rate = alternate({"slow": spend(clock, 30.0)}, num_rounds=2, duration_s=1.0, ranks=ALONE, clock=clock)["slow"]
    assert [(one.num_done, one.duration_s) for one in rate.rounds] == [(8, 30.0)] * 2


def test_the_limit_is_measured_on_the_images_of_the_shards(ready_shards):
    shards = ShardSet.open(ready_shards)
    stored = set()
    for tar in shards.tars("train"):
        with tarfile.open(tar) as members:
            stored |= {members.extractfile(one).read() for one in members if one.name.endswith(".jpg")}
    places = bench_feed.find_samples(shards)
    read, found = bench_feed._make_read(places), [np.empty(place.size, np.uint8) for place in places]
    for number, image in enumerate(found):
        read(number, image)
    assert {image.tobytes() for image in found} == stored and len(places) == 64
    some = bench_feed.find_samples(shards, limit=8)
    assert len(some) == 8 and {place.tar for place in some} == set(shards.tars("train"))


def test_the_limit_decodes_each_image_to_the_pixels_that_the_loader_starts_from(ready_shards):
    shards = ShardSet.open(ready_shards)
    places = bench_feed.find_samples(shards)
    decode, into = bench_feed._make_decode(places), np.empty((256, 256, 3), np.uint8)
    number = 0
    for images, _ in read_pixels(shards, batch_size=16):
        for image in images.numpy():
            decode(number, into)
            assert np.abs(into.astype(int) - image).mean() < 1.0  # two builds of libjpeg-turbo
            number += 1
    assert number == 64


def test_the_limit_spreads_every_image_over_the_threads_in_turn():
    seen = []
    task = bench_feed._spread(lambda number, _: seen.append(number), 64, 3)
    assert task.run(2).num_done == 96 and task.run(1).num_done == 48
    assert sorted(seen) == sorted(number % 64 for number in range(144))


def test_the_limit_of_raw_shards_is_reading_the_same_bytes(ready_shards, tmp_path):
    shards = ShardSet.open(ready_shards)
    pixels = [image.numpy() for image in next(iter(read_pixels(shards, batch_size=6)))[0]]
    tar, lines = tmp_path / "train-000000.tar", []
    with tarfile.open(tar, "w") as out:
        for key, image in enumerate(pixels):
            member = tarfile.TarInfo(f"{key:09d}.rgb")
            member.size = image.nbytes
            (tmp_path / "image").write_bytes(image.tobytes())
            with (tmp_path / "image").open("rb") as file:
                out.addfile(member, file)
    with tarfile.open(tar) as members:
        lines = [f"rgb {one.offset_data} {one.size} {one.name} cls 0 5 {one.name[:9]}.cls" for one in members]
    tar.with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
    listed = Shard(tar.name, "train", len(pixels), tar.stat().st_size, "")
    manifest = replace(shards.manifest, encoding="raw", shards=(listed,), totals={"train": len(pixels), "val": 0})
    raw = ShardSet(tmp_path, manifest)
    places = bench_feed.find_samples(raw)
    read, into = bench_feed._make_read(places), np.empty((256, 256, 3), np.uint8)
    for number, image in enumerate(pixels):
        read(number, into)
        assert np.array_equal(into, image)
    words, task = bench_feed.limit_task(places, "raw", 2)
    assert words.startswith("reading") and task.run(1).num_done == 32


def test_a_damaged_index_is_an_error_that_names_it(ready_shards, tmp_path):
    shards = ShardSet.open(ready_shards)
    for path in (*shards.tars("train"), *shards.indices("train")):
        (tmp_path / path.name).symlink_to(path)
    index = tmp_path / "train-000001.idx"
    kept = index.read_text().splitlines()[:-1]
    index.unlink()
    index.write_text("\n".join(kept))
    with pytest.raises(UserError, match=r"train-000001\.idx: 14 rows, expected 16"):
        bench_feed.find_samples(ShardSet(tmp_path, shards.manifest))


def test_macs_are_those_counted_by_hand_for_the_paper():
    assert bench_step.count_macs(RECIPES["paper"]) == {
        "conv1": 55 * 55 * 96 * 11 * 11 * 3,
        "conv2": 27 * 27 * 256 * 5 * 5 * 48,
        "conv3": 13 * 13 * 384 * 3 * 3 * 256,
        "conv4": 13 * 13 * 384 * 3 * 3 * 192,
        "conv5": 13 * 13 * 256 * 3 * 3 * 192,
        "fc6": 9216 * 4096,
        "fc7": 4096 * 4096,
        "fc8": 4096 * 1000,
    }
    assert sum(bench_step.count_macs(RECIPES["paper"]).values()) == 724_406_816
    assert bench_step.count_step_flops(RECIPES["paper"]) == 6 * 724_406_816 - 2 * 105_415_200


def test_the_timed_step_is_the_training_step_and_its_parts_are_told_apart():
    ticks = FakeClock()

    def tick() -> float:
        ticks.now_s += 1.0
        return ticks.now_s

    trainee = bench_step.Trainee(replace(NARROW, dropout=0.0), 4, ALONE, tick)
    batch = bench_step.make_batch(trainee, 4)
    assert batch.images.shape == (4, 3, 224, 224) and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert bench_step.step_task(trainee, batch).run(2).num_done == 8
    assert trainee.take_parts_s(2) == {"forward": 1.0, "backward": 1.0, "update": 1.0}
    assert trainee.take_parts_s(2) == {}

    expected = AlexNet.from_recipe(trainee.recipe, 4).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(expected, trainee.recipe)
    make_schedule(trainee.recipe, optimizer).begin_step(1, 0, 1)
    for _ in range(2):
        train_step(expected, optimizer, batch.images, batch.labels, torch.float32)
    for got, want in zip(trainee.net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, want)


class FakeLoader:
    """Makes a batch in `seconds` on the fake clock, two of them ahead of whoever asks."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self._clock, self._seconds, self._ready_s = clock, seconds, 0.0
        self.spec = SimpleNamespace(decode="cpu", num_threads=2, encoding="jpeg")

    def __iter__(self):
        for _ in range(5):
            self._ready_s = max(self._ready_s, self._clock.now_s - 2 * self._seconds) + self._seconds
            self._clock.now_s = max(self._clock.now_s, self._ready_s)
            yield Batch(torch.empty(0), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("loader_s", "limit", "together", "waited"), [(0.4, "feeding", 10, 0.75), (0.05, "step", 40, 0)]
)
def test_the_slower_of_loader_and_step_is_named_as_the_limit(
    ready_shards, monkeypatch, loader_s, limit, together, waited
):
    clock = FakeClock()

    def step(_trainee, _batch) -> None:
        clock.now_s += 0.1

    monkeypatch.setattr(bench_run, "make_train_loader", lambda *_args, **_kwargs: FakeLoader(clock, loader_s))
    monkeypatch.setattr(bench_run, "limit_task", lambda *_: ("nothing", spend(clock, 0.01)))
    monkeypatch.setattr(bench_step.Trainee, "step", step)
    job = bench_run.BenchJob("train", NARROW, str(ready_shards), False, 20.0, 4, True)
    result = bench_run.measure(job, ALONE, clock)
    assert result["diagnosis"]["limit"] == limit and result["diagnosis"]["advice"]
    assert result["images_per_s"] == pytest.approx(together, rel=0.05)
    assert result["loader"]["images_per_s"] == pytest.approx(4 / loader_s, rel=0.1)
    assert result["step"]["images_per_s"] == pytest.approx(40)
    assert result["data_wait_fraction"] == pytest.approx(waited, abs=0.03)


def run_json(*words: object) -> dict:
    done = CliRunner().invoke(command, [*map(str, words), "--json", "--rounds", "3"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def check_rate(rate: dict, unit: str = "images") -> None:
    rates = sorted(one[f"num_{unit}"] / one["duration_s"] for one in rate["rounds"])
    assert [rate["lowest"], rate[f"{unit}_per_s"], rate["highest"]] == pytest.approx(rates)
    assert sum(one[f"num_{unit}"] for one in rate["rounds"]) == rate[f"num_{unit}"] > 0
    assert rate["spread"] == pytest.approx((rates[2] - rates[0]) / rates[1]) and rate["num_rounds"] == 3


def check_surroundings(result: dict) -> None:
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["dali"]
    assert result["hardware"]["num_cores"] >= 1 and result["hardware"]["gpus"] is not None
    memory = result["memory"]
    assert memory["peak_rss_bytes"] > 1 << 26 and memory["gpu_bytes"] is None


def test_loader_reports_its_rate_beside_decoding_alone(ready_shards):
    result = run_json("loader", "--shards", ready_shards, *NARROW_FLAGS)
    check_surroundings(result)
    check_rate(result)
    check_rate(result["limit"])
    assert result["limit"]["num_distinct"] == 64 and "libjpeg-turbo" in result["limit"]["what"]
    assert result["num_images"] % 4 == 0 and result["ratio"] > 0


@pytest.mark.parametrize("decode", ["mixed", "hybrid", "cpu"])
def test_loader_is_measured_as_the_feeding_flags_say(ready_shards, decode):
    result = run_json("loader", "--shards", ready_shards, *NARROW_FLAGS, "--decode", decode)
    assert result["decode"] == decode


def test_step_needs_no_shards_and_its_operations_agree_with_its_rate():
    result = run_json("step", *NARROW_FLAGS)
    check_surroundings(result)
    check_rate(result)
    check_rate(result["limit"], "products")
    recipe = override(RECIPES["demo"], ["width=0.0625"])
    assert result["tflops"] * 1e12 == pytest.approx(result["images_per_s"] * bench_step.count_step_flops(recipe, 1000))
    assert result["limit"]["tflops"] * 1e12 == pytest.approx(result["limit"]["products_per_s"] * 2 * 1024**3)
    assert result["ms_per_step"] == pytest.approx(4000 / result["images_per_s"])
    assert list(result["parts_ms"]) == ["forward", "backward", "update"] and min(result["parts_ms"].values()) > 0


@pytest.mark.slow
def test_train_reports_all_three_and_what_to_change(ready_shards):
    result = run_json("train", "--shards", ready_shards, *NARROW_FLAGS)
    check_surroundings(result)
    for rate in (result, result["loader"], result["step"], result["limit"]):
        check_rate(rate)
    assert 0 <= result["data_wait_fraction"] <= 1
    assert result["diagnosis"]["limit"] in ("feeding", "step", "overlap") and result["diagnosis"]["advice"]


@pytest.mark.parametrize("what", ["loader", "step", "train"])
def test_the_table_shows_the_numbers_of_the_object(what, ready_shards, capsys):
    result = run_json(what, "--shards", ready_shards, *NARROW_FLAGS)
    bench_run.show(result)
    said = capsys.readouterr().out
    assert f"{result['images_per_s']:,.0f} ({result['lowest']:,.0f} to {result['highest']:,.0f})" in said
    assert result["limit"]["what"] in said and f"{result['cores_used']:.1f}" in said
    for line in result.get("diagnosis", {}).get("advice", []):
        assert line in said


def test_a_small_set_gets_a_batch_that_it_can_fill_but_never_one_that_was_asked_for(ready_shards):
    words = ["loader", "--shards", str(ready_shards), "--gpus", "0", "--seconds", "0.1", "--rounds", "1", "--json"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert json.loads(done.stdout)["global_batch_size"] == 64
    assert "64 training images, so batches of 64 instead of 128" in done.stderr
    with pytest.raises(UserError, match="fewer than one global batch of 128"):
        CliRunner().invoke(command, [*words, "--global-batch-size", "128"], catch_exceptions=False)


@pytest.mark.parametrize("what", ["loader", "train"])
def test_without_shards_the_error_says_how_to_make_synthetic_ones(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        CliRunner().invoke(command, [what], env={"ALEXNET_SHARDS": ""}, catch_exceptions=False)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("shards: no shards")
    assert "alexnet-prep synth images && alexnet-prep shard images --out shards && alexnet-prep pca" in str(
        raised.value
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_report_their_sum_once(ready_shards, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", "--no-python", Path(sys.executable).parent / "alexnet-bench", "train"]
    words += ["--shards", ready_shards, *NARROW_FLAGS, "--rounds", "3", "--json"]
    done = subprocess.run(map(str, words), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout)  # one object, not two
    assert result["num_ranks"] == 2 and result["global_batch_size"] == 4
    for rate in (result, result["loader"], result["step"], result["limit"]):
        check_rate(rate)
    assert result["num_images"] % 4 == 0  # two of each rank a step


def test_the_bytes_of_a_step_are_those_counted_by_hand() -> None:
    paper = RECIPES["paper"]
    weights = 4 * 8 * 60_965_224
    assert bench_step.count_step_bytes(paper, 1) - bench_step.count_step_bytes(paper, 2) == pytest.approx(weights / 2)
    ins = [3 * 227**2, 96 * 27**2, 256 * 13**2, 384 * 13**2, 384 * 13**2, 9216, 4096, 4096]
    outs = [96 * 55**2, 256 * 27**2, 384 * 13**2, 384 * 13**2, 256 * 13**2, 4096, 4096, 1000]
    layers = 2 * ins[0] + 3 * sum(ins[1:]) + 3 * sum(outs)
    pooled = outs[0] + outs[1] + outs[4]
    maps = layers + 5 * sum(outs[:-1]) + 2 * pooled + 1.5 * pooled
    assert bench_step.count_step_bytes(paper, 10**9) == pytest.approx(4 * maps, rel=1e-5)
