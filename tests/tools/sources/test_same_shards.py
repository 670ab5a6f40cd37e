"""The same images in five layouts: the same shards, byte by byte; and what sets of real size cost."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout_builders import BUILDERS
from tools.sharding.make import make_shards
from tools.sources import LAYOUTS
from tools.sources.archive import keep_open
from tools.sources.source import open_source

SAMPLES_PER_SHARD = 16
NUM_REAL_CLASSES = 12


@pytest.fixture(scope="module")
def tree(synth_tree: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Photographs where there are some (validation by other images of the same folder's classes), else `synth_tree`."""
    root = tmp_path_factory.mktemp("tree")
    try:
        real = request.getfixturevalue("real_images") / "imagenet-sample/train"
    except pytest.skip.Exception:
        return shutil.copytree(synth_tree, root / "tree")
    folders = sorted(real.iterdir())
    for place, folder in enumerate(folders[:NUM_REAL_CLASSES]):
        for extra in (0, NUM_REAL_CLASSES, 2 * NUM_REAL_CLASSES):  # several images to a class, whatever they show
            path = next(folders[place + extra].iterdir())
            target = root / "tree/train" / folder.name / f"{folder.name}_{place + extra}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for place, folder in enumerate(reversed(folders[:NUM_REAL_CLASSES])):
        target = root / "tree/val" / folder.name / f"ILSVRC2012_val_{place + 1:08d}.JPEG"
        target.parent.mkdir(parents=True)
        shutil.copy(next(folders[3 * NUM_REAL_CLASSES + place].iterdir()), target)
    return root / "tree"


@pytest.fixture(scope="module")
def layouts(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: build(tree, root / name) for name, build in BUILDERS.items()}


def hash_shards(source: Path, out: Path) -> dict[str, str]:
    make_shards(open_source(source), out, num_workers=2, samples_per_shard=SAMPLES_PER_SHARD)
    files = [path for path in sorted(out.iterdir()) if path.suffix in (".tar", ".idx")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_layout_has_a_builder_and_is_found_for_what_it_is(layouts):
    assert tuple(BUILDERS) == LAYOUTS
    for name, root in layouts.items():
        assert open_source(root).layout == open_source(root, layout=name).layout == name


def test_shards_of_the_same_images_are_byte_identical_whatever_the_layout(layouts, tmp_path):
    hashes = {name: hash_shards(root, tmp_path / name) for name, root in layouts.items()}
    assert len(hashes["folder"]) >= 6
    for name in LAYOUTS:
        assert hashes[name] == hashes["folder"], name
        assert json.loads((tmp_path / name / "manifest.json").read_text())["layout"] == name


def test_every_image_is_read_to_the_byte_in_another_process_too(layouts, tree):
    for name, root in layouts.items():
        source = open_source(root)
        sent = pickle.dumps(source.read)
        assert len(sent) < 1000, "the listing must not travel with it"
        read = pickle.loads(sent)
        for split in ("train", "val"):
            files = {path.stem: path.read_bytes() for path in (tree / split).rglob("*.JPEG")}
            entries = source.entries(split)
            found = {entry.base_name.rpartition(".")[0]: read(entry) for entry in entries}
            assert found == files and len(entries) == len(files), (name, split)


def test_classes_order_and_base_names_are_those_of_the_folder_layout(layouts):
    def describe(root: Path) -> list:
        source = open_source(root)
        return [
            [(entry.base_name.rpartition(".")[0], entry.label) for entry in source.entries(split)]
            for split in ("train", "val")
        ] + [[(c.index, c.wnid) for c in source.classes]]

    wanted = describe(layouts["folder"])
    assert all(describe(root) == wanted for root in layouts.values())


def test_a_file_that_is_gone_is_an_os_error_of_that_image(layouts, tmp_path):
    for name, root in layouts.items():
        copy = shutil.copytree(root, tmp_path / name)
        source = open_source(copy)
        shutil.rmtree(copy)
        keep_open.cache_clear()
        with pytest.raises(OSError):
            source.read(source.entries("val")[-1])


def test_a_file_cut_short_after_it_was_listed_is_an_os_error_of_that_image(layouts, tmp_path):
    for name in ("official", "parquet", "webdataset"):
        copy = shutil.copytree(layouts[name], tmp_path / name)
        source = open_source(copy)
        for path in [*copy.rglob("*.tar"), *copy.rglob("*.parquet")]:
            with path.open("r+b") as file:
                file.truncate(100)
        with pytest.raises(OSError, match="has 100 bytes, expected"):
            source.read(source.entries("train")[0])


@pytest.mark.slow
def test_1_3_million_entries_are_ordered_and_planned_in_less_than_a_gigabyte():
    """In a process of its own: the peak of memory is the process's."""
    program = """
import gc
import re
from pathlib import Path
from pipeline.images.imagenet import load_ilsvrc2012
from tools.sources.listing import Entry, Listing, put_in_order
from tools.sources.archive import MemberReader
from tools.sharding.plan import Options, Plan
from tools.sources.source import Source
gc.disable()  # as open_source does
names = list(load_ilsvrc2012())
def entries():
    for number in range(1_300_000):
        wnid = names[number % 1000]
        yield Entry(f"data/train-00000-of-00294.parquet/{wnid}_{number * 7919 % 1300021}.JPEG", number % 1000,
                    (number % 294, number << 17, 196_000, 31_000, 110_000 + number % 1000, 262_144))
labels = {name: label for label, name in enumerate(names)}
listing = Listing("parquet", Path("x"), MemberReader("x", ()), list(entries()), labels=labels)
classes, train, val = put_in_order(listing)
assert [entry.label for entry in train] == [number // 1300 for number in range(1_300_000)]
source = Source("parquet", (), {"train": train, "val": val}, listing.read)
plan = Plan(source, Options())
assert sum(len(unit.entries) for unit in plan.units(plan.shards)) == 1_300_000 and len(plan.job) == 64
# Not getrusage: what it gives begins with the memory of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert int(done.stdout) < 1_000_000  # kilobytes


def test_the_command_takes_layout_share_and_subset(synth_tree, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("n00000001\nn00000003\n")
    prep = [Path(sys.executable).with_name("alexnet-prep"), "shard", synth_tree / "train", "--out", tmp_path / "out"]
    options = ["--layout", "folder", "--val-fraction", "0.25", "--subset", names, "--seed", "3"]
    done = subprocess.run([*prep, *options], capture_output=True, text=True, check=True)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["totals"] == {"train": 24, "val": 8}
    assert [entry["wnid"] for entry in manifest["classes"]] == ["n00000001", "n00000003"]
    assert f"2 classes of {names}; 32 images of other classes not used" in done.stderr
    for wrong in (["--val-fraction", "1"], ["--val-fraction", "nan"], ["--layout", "tfrecord"]):
        failed = subprocess.run([*prep, *wrong], capture_output=True, text=True, check=False)
        assert failed.returncode in (1, 2) and "rror: " in failed.stderr and "Traceback" not in failed.stderr
