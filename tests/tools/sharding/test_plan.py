"""The plan: every image once, the same for everybody, and small."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.manifest import ClassEntry
from tools.sharding.lock import Part, parse_part
from tools.sharding.plan import Options, Plan, name_shards, order_samples
from tools.sources.source import Entry, Source, open_source

ROOT = Path(__file__).parents[3]


@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 2**63))
def test_every_position_is_planned_once_and_shards_are_full_but_the_last(num_samples, samples_per_shard, seed):
    order = order_samples(num_samples, seed)
    assert sorted(order.tolist()) == list(range(num_samples))
    assert (order == order_samples(num_samples, seed)).all()
    names = name_shards("train", num_samples, samples_per_shard)
    assert len(names) == len(set(names)) and (len(names) - 1) * samples_per_shard < max(num_samples, 1)
    assert len(names) * samples_per_shard >= num_samples


def test_the_shuffle_of_a_seed_is_fixed_for_all_time():
    assert order_samples(10, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert order_samples(10, 1).tolist() != order_samples(10, 0).tolist()
    assert order_samples(10, None).tolist() == list(range(10))


def test_units_cover_the_source_train_shuffled_and_val_in_order(synth_tree):
    source = open_source(synth_tree)
    plan = Plan(source, Options(seed=5, samples_per_shard=10))
    units = list(plan.units(plan.shards))
    assert [unit.file for unit in units] == list(plan.shards)
    assert [len(unit.entries) for unit in units] == [shard.num_images for shard in plan.shards.values()]
    assert [unit.file for unit in units if unit.split == "val"] == [f"val-{n:06d}.tar" for n in range(3)]
    for split in ("train", "val"):
        planned = [pair for u in units if u.split == split for pair in zip(u.positions, u.entries, strict=True)]
        assert sorted(planned) == list(enumerate(source.entries(split)))
        assert (planned == sorted(planned)) == (split == "val")


@given(st.integers(1, 40), st.integers(1, 12))
def test_parts_share_all_shards_out_and_differ_by_one_at_most(num_images, count):
    plan = Plan(make_source(num_images), Options(samples_per_shard=3))
    shares = [plan.share(Part(number, count)) for number in range(1, count + 1)]
    assert sorted(file for share in shares for file in share) == sorted(plan.shards)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [unit.file for share in shares for unit in plan.units(share)] == [file for share in shares for file in share]


def make_source(num_train: int, num_val: int = 2) -> Source:
    splits = {"train": num_train, "val": num_val}
    entries = {split: [Entry(f"{split}/a/{n}.JPEG", 0) for n in range(number)] for split, number in splits.items()}
    return Source("folder", (ClassEntry(0, "a", "a"),), entries, len)


@pytest.mark.parametrize(("text", "part"), [("1/1", Part(1, 1)), ("2/8", Part(2, 8)), ("08/8", Part(8, 8))])
def test_a_part_is_a_number_of_a_count(text, part):
    assert parse_part(text) == part and str(part) == text.lstrip("0")


@pytest.mark.parametrize(
    "text", ["", "0/8", "9/8", "2", "2/", "/8", "-1/8", "2/8/1", "1.5/8", "1/0", " 1/8", "٢/٨", "1/9999999"]
)
def test_another_part_is_refused(text):
    with pytest.raises(ValueError, match="expected a part such as 2/8"):
        parse_part(text)


def test_every_option_and_the_listing_name_the_job():
    jobs = [
        Plan(make_source(8), options).job
        for options in (
            Options(),
            Options(seed=1),
            Options(samples_per_shard=7),
            Options(quality=91),
            Options(encoding="raw"),
        )
    ]
    jobs.append(Plan(make_source(9), Options()).job)
    assert len(set(jobs)) == len(jobs)
    assert Plan(make_source(8), Options()).job == jobs[0]


def test_the_job_of_a_folder_made_before_is_still_the_same_so_that_it_is_taken_up():
    at_4c5107f = "f491c04cf851f222528c45c807f9f89d44af707e266ced1755441acb583fbdec"
    assert Plan(make_source(8), Options()).job == at_4c5107f


def test_room_for_raw_pixels_is_exact_but_for_the_end_of_the_tar():
    pixels, label = 256 * 256 * 3, 512  # a label fills one block
    assert Options(encoding="raw").estimate_bytes() == 512 + pixels + 512 + label
    assert Options(encoding="raw", quality=1).estimate_bytes() == Options(encoding="raw", quality=100).estimate_bytes()
    sizes = [Options(quality=quality).estimate_bytes() for quality in (75, 90, 95, 100)]
    assert sizes == sorted(sizes) and sizes[1] == 30_000


@pytest.mark.slow
def test_a_plan_of_1_3_million_images_takes_less_than_2_gib():
    """Listing, fingerprint, every unit in turn: the peak of a process that does nothing else."""
    program = """
import re
from pathlib import Path
from pipeline.manifest import ClassEntry
from tools.sharding.plan import Options, Plan
from tools.sources.source import Entry, Source
classes = tuple(ClassEntry(n, f"n{n:08d}", f"class {n}") for n in range(1000))
train = [Entry(f"train/n{n // 1282:08d}/n{n // 1282:08d}_{n:06d}.JPEG", n // 1282) for n in range(1_282_000)]
val = [Entry(f"val/n{n % 1000:08d}/ILSVRC2012_val_{n:08d}.JPEG", n % 1000) for n in range(50_000)]
plan = Plan(Source("folder", classes, {"train": train, "val": val}, len), Options())
num_images = sum(len(unit.entries) for unit in plan.units(plan.shards))
# Not getrusage: what it gives begins with the memory of the process that started this one.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(len(plan.job), len(plan.shards), num_images, peak_kib * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    digits, num_shards, num_images, peak_bytes = map(int, done.stdout.split())
    assert (digits, num_shards, num_images) == (64, 257 + 10, 1_332_000)
    assert peak_bytes < 2 << 30
