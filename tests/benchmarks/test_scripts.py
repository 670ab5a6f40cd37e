"""The scripts at a tiny size with what is installed, and their checks on pixels that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.operators import load_operators

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts, importable."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return ROOT / "benchmarks"


def run_script(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_installed(module):
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_preparation_is_timed_with_the_peers_there_are_and_the_others_are_named(synth_tree, tmp_path):
    report = tmp_path / "prepare.json"
    text = run_script(
        "prepare.py", synth_tree / "train", "--images", 12, "--rounds", 2, "--workers", 1, "--json", report,
        "--only", "ours,pillow,decode,vipsthumbnail,ffcv", "--scratch", tmp_path / "scratch",
    )  # fmt: skip
    document = json.loads(report.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["contestants"]}
    for name in ("ours", "pillow", "decode"):
        assert rows[name]["state"] == "ok", rows[name]
        assert rows[name]["images_per_s"]["n"] == 2 and rows[name]["images_per_s"]["min"] > 0
    assert rows["ours"]["psnr_db"] > 30 and rows["pillow"]["psnr_db"] > 30
    assert set(document["ours_stages_ms"]) == {
        "read", "decode", "resize and crop", "encode", "tar, checksums, index, sync"
    }  # fmt: skip
    assert document["base"] == "pillow" and rows["pillow"]["ratio"]["median"] == 1.0
    assert rows["ours"]["versions"]["alexnet-dali"] and document["machine"]["cores_used"] == 1
    if not is_installed("ffcv"):
        assert rows["ffcv"]["state"].startswith("not installed: ")
        assert "| ffcv: FFCV DatasetWriter" in text and "not installed" in text


@pytest.mark.slow
def test_feeding_is_timed_with_the_peers_there_are_and_the_others_are_named(synth_tree, tmp_path):
    report = tmp_path / "feed.json"
    text = run_script(
        "feed.py", synth_tree / "train", "--images", 128, "--rounds", 2, "--workers", 1, "--seconds", 0.2, "--skip", 1,
        "--only", "ours,ours-uint8,ours-raw,stock,stock-uint8,stock-raw,other,other-uint8,other-raw,dali,dali-raw,"
        "dataloader,webdataset,ffcv", "--against", ROOT, "--json", report, "--scratch", tmp_path / "scratch",
    )  # fmt: skip
    document = json.loads(report.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["contestants"]}
    own = {f"{name}{kind}" for name in ("ours", "other") for kind in ("", "-uint8", "-raw")}
    for name in rows.keys() - {"ffcv"} - (set() if load_operators() else own):
        assert rows[name]["state"] == "ok", rows[name]
        assert rows[name]["ratio"]["n"] == 2 and rows[name]["mean_error"] < 1.0
    if not load_operators():
        assert all("our own operators cannot be compiled" in rows[name]["state"] for name in own)
        return
    assert document["base"] == "dali" and rows["dali"]["ratio"]["median"] == 1.0
    if not is_installed("ffcv"):
        assert rows["ffcv"]["state"].startswith("not installed: ") and "| ffcv: FFCV" in text
    assert "mean JPEG bytes" in text
    for pair in ("ours / stock", "ours-raw / stock-raw", "ours / other", "ours-uint8 / other-uint8"):
        assert document["pairs"][pair]["n"] == document["pairs"][pair]["cpu_ms"]["n"] == 2
        assert f"{pair} " in text


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("prepare.py", ["--only", "nobody"], "--only nobody: no such contestant"),
        ("prepare.py", ["--rounds", "0"], "--rounds 0: expected 1 or more"),
        ("prepare.py", ["--workers", "1000"], "--workers 1000: expected 1 to"),
        ("feed.py", ["--images", "5"], "--images 5: expected a batch"),
        ("feed.py", ["--base", "nobody"], "--base nobody: no such contestant"),
        ("feed.py", ["--against", "nowhere"], "--against nowhere: no pipeline/loader.py in it"),
        ("feed.py", ["--only", "other"], "--only other: no such contestant"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(script, arguments, complaint):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and complaint in done.stderr and "Traceback" not in done.stderr


def test_a_terminated_run_leaves_no_temporary_folder(synth_tree, tmp_path):
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "prepare.py"), str(synth_tree / "train"), "--only", "decode"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert running.stderr is not None
    assert "start, warm up" in running.stderr.readline()
    assert len(list(tmp_path.iterdir())) == 1
    running.terminate()
    assert running.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_photographs_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "prepare.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no RGB or grey JPEG at any depth" in done.stderr


@pytest.fixture
def photograph(tmp_path):
    """A smooth 400x300 picture with some detail, as JPEG."""
    y, x = np.mgrid[0:300, 0:400].astype(np.float64)
    waves = [
        128 + 80 * np.sin(x / a + y / b) + 30 * np.sin(x / 3 + c) for a, b, c in ((31, 47, 0), (23, 61, 1), (51, 29, 2))
    ]
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.stack(waves, 2).clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return path


def test_psnr_is_high_for_the_same_pixels_and_low_for_another_crop(scripts, photograph, tmp_path):
    from prepare import LEAST_PSNR_DB, mean_psnr, refer

    right, shifted = tmp_path / "right", tmp_path / "shifted"
    reference = refer(photograph, None)
    with Image.open(photograph) as image:  # 400 x 300
        resized = np.asarray(image.resize((341, 256), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.asarray(reference), resized[:, 42 : 42 + 256])
    for folder, image in ((right, reference), (shifted, Image.fromarray(np.roll(np.asarray(reference), 2, axis=1)))):
        folder.mkdir()
        image.save(folder / "000000000.jpg", quality=95)
    assert mean_psnr(right, [str(photograph)], whole=False) > LEAST_PSNR_DB + 8
    assert mean_psnr(shifted, [str(photograph)], whole=False) < LEAST_PSNR_DB


def test_an_output_of_another_size_or_with_a_gap_is_refused(scripts, photograph, tmp_path):
    from harness.children import Failed
    from prepare import mean_psnr

    Image.new("RGB", (256, 255)).save(tmp_path / "000000000.jpg")
    with pytest.raises(Failed, match="image 0 is RGB"):
        mean_psnr(tmp_path, [str(photograph)], whole=False)
    with pytest.raises(Failed, match="image 0 is not in the output"):
        mean_psnr(tmp_path / "nowhere", [str(photograph)], whole=False)


def test_the_place_flip_and_shift_of_a_crop_are_found_again(scripts):
    from feed import find_crop

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:256]
    stored = np.stack([127 + 60 * np.sin(x / 9 + k) * np.cos(y / (11 + k)) for k in range(3)], 2)
    stored = (stored + rng.normal(0, 6, stored.shape)).clip(0, 255).astype(np.uint8)
    for top, left, flip in ((0, 0, False), (32, 32, True), (5, 17, True), (31, 2, False)):
        shift = np.array([-120.5, 3.25, 40.0])
        crop = stored[top : top + 224, left : left + 224]
        image = ((crop[:, ::-1] if flip else crop) + shift).transpose(2, 0, 1).astype(np.float32)
        found = find_crop(image, stored)
        assert (found.y, found.x, found.flip) == (top, left, flip)
        np.testing.assert_allclose(found.shift, shift, atol=1e-3)
        assert found.error < 1e-3
    # what is not in the picture leaves an error far above the limit
    other = stored[::-1][:224, :224].transpose(2, 0, 1).astype(np.float32)
    from feed import LARGEST_ERROR

    assert find_crop(other, stored).error > 2 * LARGEST_ERROR


@pytest.mark.slow
def test_steps_are_timed_beside_the_usual_way_and_the_limits(tmp_path):
    report = tmp_path / "step.json"
    text = run_script(
        "step.py", "--batch", 2, "--rounds", 2, "--seconds", 0, "--workers", 1, "--only", "ours,usual,limit-products",
        "--json", report,
    )  # fmt: skip
    document = json.loads(report.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in document["contestants"]}
    assert all(row["state"] == "ok" and row["images_per_s"]["n"] == 2 for row in rows.values())
    assert rows["ours"]["num_parameters"] == rows["usual"]["num_parameters"] == 60_965_224
    assert 0 < rows["ours"]["lrn_fraction"] < 1 and "lrn_fraction" not in rows["limit-products"]
    assert document["base"] == "usual" and set(document["pairs"]) == {"ours / usual", "ours / limit-products"}
    assert "| usual: the usual reproduction" in text


def test_the_peers_networks_are_ours_with_the_same_weights(scripts):
    import torch
    from peers.step import count, torchvision_net, usual_net

    from trainer.model import AlexNet
    from trainer.recipe import RECIPES, override

    across = override(RECIPES["paper"], ["lrn_across_towers=true", "lrn_alpha_over_n=true", "conv1_pad=both"])
    for net, recipe in ((usual_net(10, groups=2), across), (torchvision_net(10)[0], RECIPES["owt"])):
        ours = AlexNet(recipe, 10).eval()
        layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
        for mine, theirs in zip(ours.children(), layers, strict=True):
            mine.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), net.eval()(images), rtol=1e-4, atol=1e-5)
    assert count(usual_net(1000, groups=1)) == 62_378_344


@pytest.mark.slow
def test_growth_is_measured_in_every_part(tmp_path):
    report = tmp_path / "growth.json"
    run_script(
        "growth.py", "--quick", "--samples", "1e3,6e3", "--classes", "10", "--ranks", "1,2", "--scratch", tmp_path,
        "--json", report,
    )  # fmt: skip
    document = json.loads(report.read_text(encoding="utf-8"))
    assert [row["samples"] for row in document["samples"]] == [1000, 6000]
    assert [row["world_size"] for row in document["ranks"]] == [1, 2]
    assert document["classes"][0]["parameters"] > 0
    (start,), (epochs,) = document["start"], document["epochs"]
    assert start["to_first_step_s"] > 0 and start["memory_mib"] > 0
    assert 0 < epochs["step_s"] < epochs["epoch_s"] and epochs["evaluate_s"] > 0 and epochs["save_s"] > 0
    assert not list(tmp_path.glob("growth-*"))


def test_kinds_are_known_and_every_entry_has_a_way(scripts):
    import feed
    import prepare
    import step
    from peers import feed as peers_feed
    from peers import prepare as peers_prepare
    from peers import step as peers_step

    assert sorted(entry.name for entry in prepare.ENTRIES) == sorted(peers_prepare.WAYS)
    raced = [*feed.ENTRIES, *feed.AGAINST]
    assert sorted(entry.name for entry in raced) == sorted(peers_feed.WAYS)
    assert sorted(entry.name for entry in step.ENTRIES) == sorted(peers_step.WAYS)
    assert {name for pair in step.PAIRS for name in pair} <= {entry.name for entry in step.ENTRIES}
    assert {entry.kind for entry in (*prepare.ENTRIES, *raced, *step.ENTRIES)} == {
        "ours",
        "peer",
        "control",
        "limit",
    }
    assert {name for pair in feed.PAIRS for name in pair} <= {entry.name for entry in raced}


OF_BEFORE = """
class ShardSet:
    root, fingerprint = "here", "f"
    @classmethod
    def open(cls, root): return cls()
class ColorStats:
    @staticmethod
    def load(root, fingerprint): return "colours"
class TrainLoader:
    def __init__(self, shards, colors, *, global_batch_size, seed, num_threads, mean="image", dtype="float32"):
        self.given = [colors, global_batch_size, num_threads, mean, dtype]
    def __iter__(self):
        yield self.given, "labels"
"""
RACE_IT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from peers import feed as peers_feed
job = SimpleNamespace(project=Path(sys.argv[1]), shards={"jpeg": "here"}, workers=3)
batches = peers_feed.ours(job, "jpeg", mean="channel", dtype="uint8")
print(next(batches) == next(batches), *next(batches)[0])
"""


def test_a_version_whose_loader_takes_keywords_can_be_raced_and_no_other_is_raced_for_it(scripts, tmp_path):
    (tmp_path / "before" / "pipeline").mkdir(parents=True)
    (tmp_path / "before" / "pipeline" / "__init__.py").write_text(OF_BEFORE, encoding="utf-8")

    def race(project):
        return subprocess.run(
            [sys.executable, "-c", RACE_IT, project],
            env={**os.environ, "PYTHONPATH": f"{scripts}{os.pathsep}{tmp_path / 'before'}"},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )

    assert race(tmp_path / "before").stdout.split() == ["True", "colours", "128", "3", "channel", "uint8"]
    assert f"__init__.py, expected a file of {ROOT}" in race(ROOT).stderr


def test_a_slope_is_that_of_the_later_readings_and_the_error_covers_noise(scripts):
    import soak

    times_s = [10.0 * n for n in range(400)]
    grown = [500 + 36 * t / 3600 + (300 if n < 90 else 0) for n, t in enumerate(times_s)]  # a start that is left out
    slope, error = soak.fit_slope(times_s, grown)
    assert slope == pytest.approx(36) and error == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(1).normal(0, 5, 400)
    slope, error = soak.fit_slope(times_s, [500 + one for one in noise])
    assert abs(slope) < 2 * error and 0 < error < 10


@pytest.mark.slow
def test_a_soak_of_training_counts_its_processes_and_finds_nothing_left(ready_shards):
    words = (ready_shards, "--minutes", 0.2, "--interval-s", 0.5, "--batch", 8, "--limit-mib", 1e9, "--train")
    said = run_script("soak.py", *words)
    assert "1 rank(s) on cpu: resident memory" in said and "left behind: nothing" in said
    assert "zombies at most 0" in said and int(said.partition("threads ")[2].partition(",")[0]) > 2


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([15], False),
        ([15, 16], True),
        ([11, 15, 16, 15, 15, 15, 16, 17], False),
        ([15, 15, 15, 16, 15, 15, 15, 16], False),
        ([15, 15, 15, 16, 16, 17, 17, 18], True),
        (list(range(20, 60)), True),
    ],
)
def test_a_count_has_grown_if_it_stays_above_what_it_was(counts, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import soak

    assert soak.has_grown(counts) is expected


@pytest.mark.parametrize(("limit", "status"), [(1e9, 0), (-1e9, 1)])
def test_a_soak_says_what_it_held_and_fails_above_its_limit(ready_shards, limit, status):
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "soak.py"), str(ready_shards), "--minutes", "0.03"),
            *("--interval-s", "0.1", "--batch", "8", "--limit-mib", str(limit)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == status, done.stderr
    assert "epochs in 0.0 min on cpu, decode cpu: resident memory" in done.stdout
    assert ("memory, open files or threads grow" in done.stderr) == (status == 1)
